"""Files of records, of any size and in the forms that people have them in, read in order a piece at a time, and written with
further columns.

What a file is, is told from what it holds: parquet, JSON lines, or JSON of one value over several lines; plain or packed by gzip,
bzip2, xz or zstd; in UTF-8, UTF-16 or UTF-32. What it is to be, is told from its name, ``form_of``. All else is refused by name.
"""

import hashlib
import os
import stat
from pathlib import Path

from .forms import PARQUET, form_of, is_parquet
from .json_file import Json
from .packing import pyarrow
from .parquet_file import Parquet
from .pipe import arriving
from .record import BUFFER, PIECE_BYTES, PIECE_ROWS, Record, pieces, stamp
from .values import read_lines
from .writing import Lines, write_json, write_parquet

__all__ = [
    "PIECE_BYTES", "PIECE_ROWS", "Json", "Lines", "Parquet", "Record", "arriving", "check_unchanged", "content_hash", "form_of",
    "is_parquet", "open_file", "pieces", "pyarrow", "read_lines", "write_json", "write_parquet",
]  # fmt: skip


def open_file(path: str | Path, what: str = "source", format: str | None = None) -> Json | Parquet:
    """``path`` as what it holds.

    Args:
        what: the argument's name, for errors.
        format: ``jsonl`` or ``parquet``, whatever it seems to hold.

    Raises:
        ValueError: it holds nothing that is read, or is broken. OSError: it cannot be read, is a directory, or a pipe, which can
            be read once. ImportError: parquet or zstd, and no pyarrow.
    """
    path = Path(path)
    if format not in (None, "jsonl", "parquet"):
        raise ValueError(f"{path}: format={format!r}; expected jsonl or parquet")
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        more = ", and patterns are not expanded here; give one file" if set("*?[") & set(path.name) else ""
        raise FileNotFoundError(f"{what}: {str(path)!r} does not exist{more}") from error
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{what}: {path} is a directory; give a file in it, one at a time")
    if not stat.S_ISREG(mode):
        raise OSError(f"{what}: {path} is no regular file, and is to be read more than once; save it into a file first")
    with open(path, "rb") as file:
        parquet = file.read(4) in PARQUET
    parquet = parquet or is_parquet(path) if format is None else format == "parquet"
    return Parquet(path) if parquet else Json(path)


def content_hash(file: Json | Parquet) -> str:
    """Of all its bytes: two runs go together only where this is equal."""
    digest = hashlib.sha256()
    with open(file.path, "rb") as content:
        while block := content.read(BUFFER):
            digest.update(block)
    return digest.hexdigest()[:16]


def check_unchanged(file: Json | Parquet) -> None:
    """Raises ValueError where the file was written since it was opened."""
    if stamp(file.path) != file.stamp:
        raise ValueError(f"{file.path} was changed while it was worked on; start anew with --overwrite")
