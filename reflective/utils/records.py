"""Files of records, of any size and in the forms that people have them in, read in order a piece at a time, and written with
further columns.

What a file is, is told from what it holds: parquet, JSON lines, or JSON of one value over several lines; plain or packed by gzip,
bzip2, xz or zstd; in UTF-8, UTF-16 or UTF-32. What it is to be, is told from its name, ``form_of``. All else is refused by name.
"""

import bz2
import codecs
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import re
import stat
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeVar

from typing_extensions import Self

from .outputs import json_text

if TYPE_CHECKING:  # pyarrow is needed for parquet and zstd alone
    import pyarrow as pa

T = TypeVar("T")
PIECE_ROWS, PIECE_BYTES = 4096, 32 << 20  # read and written at a time, at most; one row at the least
_BUFFER = 1 << 20
_HEAD = 4096  # bytes that tell what a file is
_SPACE = b" \t\r\n"
_SPACES = re.compile(r"[ \t\r\n]*")
_ESCAPE = 16  # characters of the longest thing that is not a string but may be cut: an escaped pair of surrogates
_PARQUET = b"PAR1", b"PARE"
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_PACKING = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
_STRANGE = {
    b"PK\x03\x04": "a zip archive, or a workbook", b"7z\xbc\xaf": "a 7z archive", b"\x04\x22\x4d\x18": "packed by lz4",
    b"ARROW1": "an Arrow file", b"ORC": "an ORC file", b"Obj\x01": "an Avro file", b"SQLite": "a database",
}  # fmt: skip
_LINES = (".jsonl", ".ndjson", ".jsonlines")
_BROKEN = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)  # and OSError of bz2 and pyarrow
_OTHERS = (
    ".csv", ".tsv", ".xlsx", ".xls", ".ods", ".arrow", ".feather", ".orc", ".avro", ".zip", ".tar", ".tgz", ".7z", ".lz4", ".br",
    ".pkl", ".db", ".sqlite", ".xml", ".yaml", ".yml",
)  # fmt: skip


class Record(NamedTuple):
    """Attributes: ``number``: of its line or row, from 1; ``fields``; ``fault``: why it could not be read; ``size``: bytes."""

    number: int
    fields: dict[str, Any]
    fault: str | None
    size: int


class Json:
    """A file of JSON: a value a line, blank lines left out; or an array, or values one behind the other, over several lines.

    Raises:
        ValueError: it is no JSON from its first line on; packed and broken; broken, where a value is no line.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._stat = path, _stat(path)
        with open(path, "rb") as file:
            self._packing = _starting(_PACKED, file.read(_HEAD))
        head = self._head()
        if head.startswith(_PARQUET):
            raise ValueError(f"{path} is parquet, packed by {self._packing}; unpack it, for parquet packs by itself")
        if self._packing and _starting(_PACKED, head):
            raise ValueError(f"{path} is packed twice; unpack it once")
        if strange := _starting(_STRANGE, head):
            raise ValueError(f"{path} is {strange}; give JSON lines, JSON or parquet")
        self._encoding = _encoding(head)
        self._name = Path(path.stem if self._packing else path).suffix.lower()
        start = codecs.getincrementaldecoder(self._encoding)("replace").decode(head)
        begin = start.lstrip()[:1]
        if "\0" in start[:64] or (begin not in ("", "{", "[") and self._name not in (*_LINES, ".json")):
            raise ValueError(
                f"{path} holds no JSON, but begins with {start[:40]!r}; give JSON lines, JSON or parquet, as pandas makes it of a "
                f"table: pandas.read_csv({path.name!r}).to_parquet({path.stem + '.parquet'!r})"
            )
        self.whole = begin in ("{", "[") and self._is_whole(begin)
        self.row = "item" if self.whole else "line"
        plain = not self.whole and not self._packing and self._encoding == "utf-8-sig"
        self._count = None if plain else sum(1 for _ in self.records())  # what is broken is to be told now

    def __len__(self) -> int:
        return sum(not _blank(line) for line in self._lines()) if self._count is None else self._count

    def records(self, columns: Iterable[str] | None = None) -> Iterator[Record]:
        """Every record, of ``columns`` or of all."""
        for record in self._values() if self.whole else read_lines(self._lines()):
            kept = record.fields if columns is None else {k: record.fields.get(k) for k in columns}
            yield record._replace(fields=kept)

    def _is_whole(self, begin: str) -> bool:
        """Whether values stretch over lines, or are those of one array, of a file that begins with a bracket.

        A line that is broken is a row that is broken, unless it can only be the beginning of something longer.
        """
        if begin == "[" and self._name == ".json":
            return True
        first, *more = self._lines(most=2)
        try:
            value = json.loads(first)
        except (ValueError, RecursionError):
            return begin == "[" or first.strip() == b"{" or self._name == ".json"
        return begin == "[" and not more and all(isinstance(item, dict) for item in value)

    def _values(self) -> Iterator[Record]:
        with self._opened() as stream, io.TextIOWrapper(stream, self._encoding, newline="") as text:
            yield from _values(text)

    def _lines(self, most: int | None = None) -> Iterator[bytes]:
        """Lines in UTF-8; of those that are not blank the first ``most``."""
        with self._opened() as stream:
            lines: Iterable[bytes] = stream
            if self._encoding != "utf-8-sig":
                lines = (line.encode() for line in io.TextIOWrapper(stream, self._encoding, newline="\n"))
            if most is not None:
                lines = itertools.islice((line for line in lines if not _blank(line)), most)
            yield from lines

    def _head(self) -> bytes:
        with self._opened() as stream:
            return stream.read(_HEAD)

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        """What is in the file, unpacked.

        Raises:
            ValueError: in reading, where it is broken.
        """
        try:
            with open(self.path, "rb") as file, _unpacked(file, self._packing) as stream:
                yield stream
        except (*_BROKEN, OSError) as error:
            if not isinstance(error, _BROKEN) and error.errno is not None:
                raise
            raise ValueError(f"{self.path}, packed by {self._packing}, is broken: {error}") from error
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error

    def schema(self, without: Iterable[str] = ()) -> "pa.Schema":
        """Types that hold every value of each column: null where there is none, float where there are floats and integers.

        Raises:
            ValueError: a column that fits no type.
        """
        pa = pyarrow()
        import pyarrow.parquet as pq

        types: dict[str, pa.DataType] = {}
        for piece in self._pieces():
            for name in dict.fromkeys(k for r in piece for k in r.fields if k not in without):
                with self._naming(name, piece):
                    found = pa.array([r.fields.get(name) for r in piece]).type
                    both = [pa.schema([(name, t)]) for t in (types.get(name, found), found)]
                    types[name] = pa.unify_schemas(both, promote_options="permissive").field(name).type
        # Some values fit none of the joint types, and some types no file: better known now than when all is scored.
        for name, kind in types.items():
            with self._naming(name):
                pq.ParquetWriter(io.BytesIO(), pa.schema([(name, kind)])).close()
        for piece in self._pieces():
            for name, kind in types.items():
                with self._naming(name, piece):
                    pa.array([r.fields.get(name) for r in piece], kind)
        return pa.schema(list(types.items()))

    def tables(self, schema: "pa.Schema") -> Iterator[tuple[int, "pa.RecordBatch"]]:
        """Rows, and their columns of ``schema`` (of which there may be none), piece by piece."""
        for piece in self._pieces():
            yield len(piece), pyarrow().RecordBatch.from_pylist([r.fields for r in piece], schema=schema)

    def _pieces(self) -> Iterator[list[Record]]:
        return pieces(self.records(), lambda record: record.size, PIECE_ROWS, PIECE_BYTES)

    @contextmanager
    def _naming(self, column: str, piece: list[Record] | None = None) -> Iterator[None]:
        try:
            yield
        except (pyarrow().ArrowException, OverflowError) as error:
            lines = f", lines {piece[0].number} to {piece[-1].number}" if piece else ""
            raise ValueError(
                f"{self.path}{lines}: column {column!r} fits no parquet column ({error}); give an output that ends in .jsonl"
            ) from error


class Parquet:
    """A parquet file."""

    row = "row"

    def __init__(self, path: Path) -> None:
        pyarrow()
        import pyarrow.parquet as pq

        self.path, self._stat = path, _stat(path)
        try:
            self._file = pq.ParquetFile(path, buffer_size=_BUFFER)
        except pyarrow().ArrowException as error:
            raise ValueError(f"{path} is no parquet file: {error}") from error
        names, about = self._file.schema_arrow.names, self._file.metadata
        if len(set(names)) < len(names):
            raise ValueError(f"{path}: several columns have the same name; rename them")
        size = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
        self._rows = min(PIECE_ROWS, max(1, PIECE_BYTES * about.num_rows // max(size, 1)))

    def __len__(self) -> int:
        return self._file.metadata.num_rows

    def records(self, columns: Iterable[str] | None = None) -> Iterator[Record]:
        names = None if columns is None else [c for c in columns if c in self._file.schema_arrow.names]
        rows = itertools.chain.from_iterable(
            zip(table.to_pylist(), itertools.repeat(table.nbytes // max(1, len(table))))
            for table in self._file.iter_batches(self._rows, columns=names)
        )
        return (Record(number, fields, None, size) for number, (fields, size) in enumerate(rows, 1))

    def schema(self, without: Iterable[str] = ()) -> "pa.Schema":
        known = self._file.schema_arrow
        return pyarrow().schema([f for f in known if f.name not in without], metadata=known.metadata)

    def tables(self, schema: "pa.Schema") -> Iterator[tuple[int, "pa.RecordBatch"]]:
        return ((len(table), table.select(schema.names)) for table in self._file.iter_batches(self._rows))

    def check_columns(self, some: Iterable[str]) -> None:
        """Raises ValueError unless there is one of these columns, and none of them is binary."""
        fields = {field.name: field.type for field in self._file.schema_arrow}
        found = [name for name in some if name in fields]
        if not found:
            raise ValueError(f"{self.path}: expected one of the columns {', '.join(some)}; found {', '.join(fields)}")
        for name in found:
            if _binary(fields[name]):
                raise ValueError(f"{self.path}: column {name!r} is binary, and no text; cast it to strings")

    def check_json(self) -> None:
        """Raises ValueError where a column holds what JSON cannot say."""
        for field in self._file.schema_arrow:
            if _binary(field.type):
                raise ValueError(
                    f"{self.path}: column {field.name!r} is binary, which JSON cannot say; give an output that ends in .parquet"
                )


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
        parquet = file.read(4) in _PARQUET
    parquet = parquet or is_parquet(path) if format is None else format == "parquet"
    return Parquet(path) if parquet else Json(path)


def is_parquet(output: str | Path) -> bool:
    return Path(output).suffix.lower() == ".parquet"


def form_of(output: str | Path) -> tuple[str, str | None]:
    """What ``output`` is to hold by its name, ``parquet``, ``array`` (``.json``) or ``lines`` (all others), and how it is packed.

    Raises:
        ValueError: a name that promises something else.
    """
    name = Path(output)
    packing = _PACKING.get(name.suffix.lower())
    suffix = Path(name.stem if packing else name).suffix.lower()
    if suffix in _OTHERS or (packing and suffix in (".parquet", ".tar")):
        raise ValueError(
            f"output: {output}: {''.join(name.suffixes)} is not written; give .jsonl, .jsonl.gz, .json or .parquet"
        )
    if suffix == ".parquet":
        return "parquet", None
    if packing == "zstd":
        pyarrow("zstd")
    return "array" if suffix == ".json" else "lines", packing


def content_hash(file: Json | Parquet) -> str:
    """Of all its bytes: two runs go together only where this is equal."""
    digest = hashlib.sha256()
    with open(file.path, "rb") as content:
        while block := content.read(_BUFFER):
            digest.update(block)
    return digest.hexdigest()[:16]


def check_unchanged(file: Json | Parquet) -> None:
    """Raises ValueError where the file was written since it was opened."""
    if _stat(file.path) != file._stat:
        raise ValueError(f"{file.path} was changed while it was worked on; start anew with --overwrite")


def read_lines(lines: Iterable[bytes], first: int = 1) -> Iterator[Record]:
    """Records of JSON lines. As bytes: JSON strings may hold what str.splitlines takes for line ends, and one bad byte
    spoils one line."""
    return (Record(n, *_parse(line), len(line)) for n, line in enumerate(lines, first) if not _blank(line))


def _blank(line: bytes) -> bool:
    return not line.removeprefix(codecs.BOM_UTF8).strip()


def _parse(line: bytes) -> tuple[dict[str, Any], str | None]:
    try:
        text = line.decode("utf-8-sig")  # by json.loads it would let halves of surrogate pairs through
        return _checked(json.loads(text), text)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError; brackets without end
        return {}, f"{type(error).__name__}: {error}"


def _checked(value: Any, text: str) -> tuple[dict[str, Any], str | None]:
    """Fields and fault of a record, from what ``text`` says."""
    if not isinstance(value, dict):
        return {}, f"expected an object, found {type(value).__name__}"
    if "\\ud" in text.lower():
        text = json.dumps(value, ensure_ascii=False)
        whole = text.encode(errors="replace").decode()
        if whole != text:
            return json.loads(whole), "it holds half a surrogate pair, which is no text"
    return value, None


def _values(stream: io.TextIOBase) -> Iterator[Record]:
    """Records of JSON values one behind the other, or of an array, read as far as is needed for the next.

    Raises:
        ValueError: it is broken.
    """
    decoder, text, at, number, size = json.JSONDecoder(), "", 0, 0, _BUFFER
    array: bool | None = None  # not known yet
    after = False  # a value, within an array

    def more() -> bool:
        nonlocal text, at, size
        new = stream.read(size)
        text, at, size = text[at:] + new, 0, 2 * size
        return bool(new)

    while True:
        at = _SPACES.match(text, at).end()
        if at == len(text):
            if more():
                continue
            if array:
                raise ValueError(f"item {number + 1}: the array has no end")
            return
        if array is None and text[at] == "[":
            array, at = True, at + 1
            continue
        if array and text[at] == "]" and (after or not number):
            at = _SPACES.match(text, at + 1).end()
            if at < len(text) or (more() and _SPACES.fullmatch(text, 0) is None):
                raise ValueError("something stands behind the array")
            return
        if array and after:
            if text[at] != ",":
                raise ValueError(f"item {number}: expected , or ] behind it, found {text[at : at + 20]!r}")
            at, after = at + 1, False
            continue
        array = bool(array)
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            cut = isinstance(error, json.JSONDecodeError) and (
                error.msg.startswith("Unterminated string") or error.pos > len(text) - _ESCAPE
            )
            if cut and more():
                continue
            raise ValueError(f"item {number + 1} is no JSON: {getattr(error, 'msg', error)}") from error
        if end == len(text) and more():  # of a number there may be more
            continue
        number, after, size = number + 1, array, _BUFFER
        fields, fault = _checked(value, text[at:end])
        yield Record(number, fields, fault, end - at)
        at = end


def arriving(source: str) -> Iterator[list[Record]]:
    """Records from a pipe, '-' for stdin, all that are there at a time: a full pipe makes batches, and who waits is answered.

    Raises:
        ValueError: what comes first shows that it is something else than JSON lines.
    """
    with nullcontext(sys.stdin.buffer) if source == "-" else open(source, "rb") as stream:
        rest, first = b"", 1
        while block := stream.read1(_BUFFER):
            if first == 1 and not rest:
                _check_lines("stdin" if source == "-" else source, block)
            *lines, rest = (rest + block).split(b"\n")
            if records := list(read_lines(lines, first)):
                yield records
            first += len(lines)
        if records := list(read_lines([rest], first)):
            yield records


def _check_lines(name: str, head: bytes) -> None:
    """Raises ValueError where a pipe begins as JSON lines cannot."""
    what = _starting(_PACKED, head) or _starting(_STRANGE, head) or ("parquet" if head.startswith(_PARQUET) else None)
    if what is None and _encoding(head) != "utf-8-sig":
        what = _encoding(head).upper()
    if what is None and head.removeprefix(codecs.BOM_UTF8).lstrip(_SPACE).partition(b"\n")[0].strip() in (b"[", b"{"):
        what = "JSON of values over several lines"
    if what is not None:
        raise ValueError(f"{name}: expected JSON lines in UTF-8, found {what}; save it into a file, and give that")


def pieces(items: Iterable[T], size: Callable[[T], int], most: int, limit: int) -> Iterator[list[T]]:
    """``items`` in lists of ``most`` at most, their sizes together ``limit`` at most, or of a single one."""
    piece: list[T] = []
    total = 0
    for item in items:
        total += size(item)
        if piece and (len(piece) == most or total > limit):
            yield piece
            piece, total = [], size(item)
        piece.append(item)
    if piece:
        yield piece


class Lines:
    """Records written into ``file``, as lines of JSON or an array, packed or not: as the name ``output`` says, by ``form_of``."""

    def __init__(self, file: BinaryIO, output: str | Path = "") -> None:
        form, packing = form_of(output)
        self._file, self._packed = _packed(file, packing), packing is not None
        self._between, self._end = (b"[\n", b"\n]\n") if form == "array" else (b"", b"")
        self._array, self._any = form == "array", False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._file.write(self._end if self._any or not self._array else b"[]\n")
        if self._packed:
            self._file.close()

    def write(self, record: dict[str, Any]) -> None:
        line = json_text(record, ensure_ascii=False, default=str).encode()
        self._file.write(self._between + line if self._array else line + b"\n")
        if self._array:
            self._between = b",\n"
        self._any = True

    def flush(self) -> None:
        self._file.flush()


def write_json(source: Json | Parquet, file: BinaryIO, output: Path, added: Iterable[dict[str, Any]]) -> None:
    """Every record of ``source`` with what is ``added`` to it, in the form that ``output`` names."""
    with Lines(file, output) as lines:
        for record, more in zip(source.records(), added, strict=True):
            lines.write(record.fields | more)


def write_parquet(
    source: Json | Parquet, file: BinaryIO, added: Iterable[dict[str, Any]], old: "pa.Schema", new: "pa.Schema"
) -> None:
    """The columns ``old`` of ``source``, and of what is ``added`` to each row the columns ``new``."""
    pa = pyarrow()
    import pyarrow.parquet as pq

    added = iter(added)
    with pq.ParquetWriter(file, pa.schema([*old, *new], metadata=old.metadata)) as writer:
        for rows, table in source.tables(old):
            more = pa.RecordBatch.from_pylist(list(itertools.islice(added, rows)), schema=new)
            writer.write_batch(pa.RecordBatch.from_arrays([*table.columns, *more.columns], schema=writer.schema))


def pyarrow(what: str = "parquet") -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise ImportError(f"{what} files need pyarrow: pip install 'reflective-kernels[batch]'") from error
    return pyarrow


def _starting(known: dict[bytes, str], head: bytes) -> str | None:
    """What is known to begin as ``head`` does."""
    return next((name for start, name in known.items() if head.startswith(start)), None)


def _encoding(head: bytes) -> str:
    """Of JSON, which begins with two characters of ASCII, or with a byte order mark."""
    found = json.detect_encoding(head)
    return "utf-8-sig" if found == "utf-8" else found


def _unpacked(file: BinaryIO, packing: str | None) -> Any:
    match packing:
        case None:
            return file
        case "gzip":
            return gzip.GzipFile(fileobj=file)
        case "bz2":
            return bz2.BZ2File(file)
        case "xz":
            return lzma.LZMAFile(file)
    return io.BufferedReader(pyarrow(packing).CompressedInputStream(file, packing), _BUFFER)


def _packed(file: BinaryIO, packing: str | None) -> Any:
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


def _binary(kind: "pa.DataType") -> bool:
    types = pyarrow().types
    if types.is_dictionary(kind):
        return _binary(kind.value_type)
    if isinstance(kind, pyarrow().BaseExtensionType):
        return _binary(kind.storage_type)
    own = types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)
    own = own or types.is_binary_view(kind)
    return own or any(_binary(kind.field(i).type) for i in range(kind.num_fields))


def _stat(path: Path) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns
