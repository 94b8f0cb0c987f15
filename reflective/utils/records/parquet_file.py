"""Files of parquet."""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .packing import pyarrow
from .record import BUFFER, PIECE_BYTES, PIECE_ROWS, Record, stamp

if TYPE_CHECKING:
    import pyarrow as pa


class Parquet:
    """A parquet file."""

    row = "row"

    def __init__(self, path: Path) -> None:
        pyarrow()
        import pyarrow.parquet as pq

        self.path, self.stamp = path, stamp(path)
        try:
            self._file = pq.ParquetFile(path, buffer_size=BUFFER)
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


def _binary(kind: "pa.DataType") -> bool:
    types = pyarrow().types
    if types.is_dictionary(kind):
        return _binary(kind.value_type)
    if isinstance(kind, pyarrow().BaseExtensionType):
        return _binary(kind.storage_type)
    own = types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)
    own = own or types.is_binary_view(kind)
    return own or any(_binary(kind.field(i).type) for i in range(kind.num_fields))
