"""What a file is, told from its first bytes; and what it is to be, told from its name."""

import json
from pathlib import Path

from .packing import PACKING, pyarrow

HEAD = 4096  # bytes that tell what a file is
PARQUET = b"PAR1", b"PARE"
STRANGE = {
    b"PK\x03\x04": "a zip archive, or a workbook", b"7z\xbc\xaf": "a 7z archive", b"\x04\x22\x4d\x18": "packed by lz4",
    b"ARROW1": "an Arrow file", b"ORC": "an ORC file", b"Obj\x01": "an Avro file", b"SQLite": "a database",
}  # fmt: skip
LINES = (".jsonl", ".ndjson", ".jsonlines")
_OTHERS = (
    ".csv", ".tsv", ".xlsx", ".xls", ".ods", ".arrow", ".feather", ".orc", ".avro", ".zip", ".tar", ".tgz", ".7z", ".lz4", ".br",
    ".pkl", ".db", ".sqlite", ".xml", ".yaml", ".yml",
)  # fmt: skip


def starting(known: dict[bytes, str], head: bytes) -> str | None:
    """What is known to begin as ``head`` does."""
    return next((name for start, name in known.items() if head.startswith(start)), None)


def encoding_of(head: bytes) -> str:
    """Of JSON, which begins with two characters of ASCII, or with a byte order mark."""
    found = json.detect_encoding(head)
    return "utf-8-sig" if found == "utf-8" else found


def is_parquet(output: str | Path) -> bool:
    """Whether its name says so."""
    return Path(output).suffix.lower() == ".parquet"


def form_of(output: str | Path) -> tuple[str, str | None]:
    """What ``output`` is to hold by its name, ``parquet``, ``array`` (``.json``) or ``lines`` (all others), and how it is packed.

    Raises:
        ValueError: a name that promises something else. ImportError: zstd, and no pyarrow.
    """
    name = Path(output)
    packing = PACKING.get(name.suffix.lower())
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
