"""Records written, alone or with further columns to those of a file."""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from typing_extensions import Self

from ..outputs import json_text
from .forms import form_of
from .json_file import Json
from .packing import packed, pyarrow
from .parquet_file import Parquet

if TYPE_CHECKING:
    import pyarrow as pa


class Lines:
    """Records written into ``file``, as lines of JSON or an array, packed or not: as the name ``output`` says, by ``form_of``."""

    def __init__(self, file: BinaryIO, output: str | Path = "") -> None:
        form, packing = form_of(output)
        self._file, self._packed = packed(file, packing), packing is not None
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
