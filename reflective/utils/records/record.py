"""A record, and how many of them are read and written at a time."""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
PIECE_ROWS, PIECE_BYTES = 4096, 32 << 20  # read and written at a time, at most; one row at the least
BUFFER = 1 << 20  # bytes, or characters, of a file that are read at a time


class Record(NamedTuple):
    """Attributes: ``number``: of its line or row, from 1; ``fields``; ``fault``: why it could not be read; ``size``: bytes."""

    number: int
    fields: dict[str, Any]
    fault: str | None
    size: int


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


def stamp(path: Path) -> tuple[int, int]:
    """Bytes of a file and when it was written, in ns: what was written since has another.

    Raises:
        OSError: there is no such file, or it cannot be looked at.
    """
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns
