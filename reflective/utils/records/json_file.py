"""Files of JSON: in lines or not, packed or not, in any encoding of Unicode."""

import codecs
import io
import itertools
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from .forms import HEAD, LINES, PARQUET, STRANGE, encoding_of, starting
from .packing import BROKEN, PACKED, pyarrow, unpacked
from .record import PIECE_BYTES, PIECE_ROWS, Record, pieces, stamp
from .values import is_blank, read_lines, read_values

if TYPE_CHECKING:  # pyarrow is needed for parquet and zstd alone
    import pyarrow as pa


class Json:
    """A file of JSON: a value a line, blank lines left out; or an array, or values one behind the other, over several lines.

    Attributes: ``stamp``: of the file as it was opened; ``whole``: whether values stretch over lines or are of an array; ``row``:
    what a record is called.

    Raises:
        ValueError: it is no JSON from its first line on; packed and broken; broken, where a value is no line.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.stamp = path, stamp(path)
        with open(path, "rb") as file:
            self._packing = starting(PACKED, file.read(HEAD))
        head = self._head()
        if head.startswith(PARQUET):
            raise ValueError(f"{path} is parquet, packed by {self._packing}; unpack it, for parquet packs by itself")
        if self._packing and starting(PACKED, head):
            raise ValueError(f"{path} is packed twice; unpack it once")
        if strange := starting(STRANGE, head):
            raise ValueError(f"{path} is {strange}; give JSON lines, JSON or parquet")
        self._encoding = encoding_of(head)
        self._name = Path(path.stem if self._packing else path).suffix.lower()
        start = codecs.getincrementaldecoder(self._encoding)("replace").decode(head)
        begin = start.lstrip()[:1]
        if "\0" in start[:64] or (begin not in ("", "{", "[") and self._name not in (*LINES, ".json")):
            raise ValueError(
                f"{path} holds no JSON, but begins with {start[:40]!r}; give JSON lines, JSON or parquet, as pandas makes it of a "
                f"table: pandas.read_csv({path.name!r}).to_parquet({path.stem + '.parquet'!r})"
            )
        self.whole = begin in ("{", "[") and self._is_whole(begin)
        self.row = "item" if self.whole else "line"
        plain = not self.whole and not self._packing and self._encoding == "utf-8-sig"
        self._count = None if plain else sum(1 for _ in self.records())  # what is broken is to be told now

    def __len__(self) -> int:
        return sum(not is_blank(line) for line in self._lines()) if self._count is None else self._count

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
            yield from read_values(text)

    def _lines(self, most: int | None = None) -> Iterator[bytes]:
        """Lines in UTF-8; of those that are not blank the first ``most``."""
        with self._opened() as stream:
            lines: Iterable[bytes] = stream
            if self._encoding != "utf-8-sig":
                lines = (line.encode() for line in io.TextIOWrapper(stream, self._encoding, newline="\n"))
            if most is not None:
                lines = itertools.islice((line for line in lines if not is_blank(line)), most)
            yield from lines

    def _head(self) -> bytes:
        with self._opened() as stream:
            return stream.read(HEAD)

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        """What is in the file, unpacked.

        Raises:
            ValueError: in reading, where it is broken.
        """
        try:
            with open(self.path, "rb") as file, unpacked(file, self._packing) as stream:
                yield stream
        except (*BROKEN, OSError) as error:
            if not isinstance(error, BROKEN) and error.errno is not None:
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
