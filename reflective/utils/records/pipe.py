"""JSON lines as they arrive."""

import codecs
import sys
from collections.abc import Iterator
from contextlib import nullcontext

from .forms import PARQUET, STRANGE, encoding_of, starting
from .packing import PACKED
from .record import BUFFER, Record
from .values import read_lines

_SPACE = b" \t\r\n"


def arriving(source: str) -> Iterator[list[Record]]:
    """Records from a pipe, '-' for stdin, all that are there at a time: a full pipe makes batches, and who waits is answered.

    Raises:
        ValueError: what comes first shows that it is something else than JSON lines.
    """
    with nullcontext(sys.stdin.buffer) if source == "-" else open(source, "rb") as stream:
        rest, first = b"", 1
        while block := stream.read1(BUFFER):
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
    what = starting(PACKED, head) or starting(STRANGE, head) or ("parquet" if head.startswith(PARQUET) else None)
    if what is None and encoding_of(head) != "utf-8-sig":
        what = encoding_of(head).upper()
    if what is None and head.removeprefix(codecs.BOM_UTF8).lstrip(_SPACE).partition(b"\n")[0].strip() in (b"[", b"{"):
        what = "JSON of values over several lines"
    if what is not None:
        raise ValueError(f"{name}: expected JSON lines in UTF-8, found {what}; save it into a file, and give that")
