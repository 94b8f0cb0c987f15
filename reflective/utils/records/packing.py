"""Files packed by gzip, bzip2, xz or zstd: how they begin and are named, and what is in them; pyarrow, which zstd needs."""

import bz2
import gzip
import io
import lzma
import zlib
from typing import Any, BinaryIO

from .record import BUFFER

PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
PACKING = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
BROKEN = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)  # and OSError of bz2 and pyarrow


def pyarrow(what: str = "parquet") -> Any:
    """The module, for ``what`` files.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise ImportError(f"{what} files need pyarrow: pip install 'reflective-kernels[batch]'") from error
    return pyarrow


def unpacked(file: BinaryIO, packing: str | None) -> Any:
    """What is in ``file``, as a stream of bytes. Raises ImportError where zstd has no pyarrow."""
    match packing:
        case None:
            return file
        case "gzip":
            return gzip.GzipFile(fileobj=file)
        case "bz2":
            return bz2.BZ2File(file)
        case "xz":
            return lzma.LZMAFile(file)
    return io.BufferedReader(pyarrow(packing).CompressedInputStream(file, packing), BUFFER)


def packed(file: BinaryIO, packing: str | None) -> Any:
    """A stream of bytes that are packed into ``file``. Raises ImportError where zstd has no pyarrow."""
    match packing:
        case None:
            return file
        case "gzip":
            return gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0)  # the same bytes at any time
        case "bz2":
            return bz2.BZ2File(file, "wb")
        case "xz":
            return lzma.LZMAFile(file, "wb")
    return pyarrow(packing).CompressedOutputStream(_Open(file), packing)


class _Open:
    """``file`` for pyarrow, which closes what it has written into, and others do not."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self.write, self.flush = file.write, file.flush

    def close(self) -> None:
        pass
