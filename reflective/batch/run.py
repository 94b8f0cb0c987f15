"""What all runs over files share: the input and its output, rows of which nothing comes, and what results depend on."""

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ..utils.records import (
    Json,
    Parquet,
    Record,
    check_unchanged,
    content_hash,
    form_of,
    pyarrow,
    write_json,
    write_parquet,
)
from .journal import WHOLE_ROW, Journal, Result
from .progress import Meter, Tally

if TYPE_CHECKING:  # not at run time: with torch it takes seconds, and input that cannot be read should fail before
    import pyarrow as pa

    from ..model import ReflectiveModel

Given, Found = TypeVar("Given"), TypeVar("Found")
Load = Callable[[], "ReflectiveModel"]
Report = Callable[[str], None]

CANDIDATE = (
    "text", "score", "step_scores", "step_spans", "token_ids", "answer", "error", "status", "log_prob", "number", "parent",
    "tokens",
)  # fmt: skip


class Work:
    """An input, and the output that its journal is for.

    Args:
        reads: columns that are asked for; a parquet file has at least one of them. adds: columns that come.
    """

    def __init__(
        self, name: str, source: Json | Parquet, journal: Journal, reads: tuple[str, ...], adds: tuple[str, ...]
    ) -> None:
        from .. import __version__

        self.name, self.source, self.journal = name, source, journal
        if journal.output.exists() and journal.output.samefile(source.path):
            raise ValueError(f"output: {journal.name} is the input; give another file")
        if isinstance(source, Parquet):
            source.check_columns(reads)
        form, _ = form_of(journal.name)
        journal.agree({"command": name, "reflective": __version__, "input hash": content_hash(source)})
        self.schemas: tuple[pa.Schema, pa.Schema] | None = None
        self.lists = False
        if form == "parquet":
            old = source.schema(without=adds)
            self.lists = "responses" in reads and "responses" in old.names
            self.schemas = old, _schema(adds, self.lists)
        elif isinstance(source, Parquet):
            source.check_json()

    def meter(self) -> Meter:
        """Of the rows that are still to do."""
        return Meter(self.name, len(self.source), self.journal.count())

    def finish(self, meter: Meter, report: Report) -> int:
        """Write the output, and tell how many rows are broken."""
        broken = 0

        def added() -> Iterator[dict[str, Any]]:
            nonlocal broken
            for results in self.journal.rows():
                broken += tell(results, self.source.row, report)
                yield joined(results, self.lists)

        check_unchanged(self.source)
        with self.journal.finished() as file:
            if self.schemas is None:
                write_json(self.source, file, self.journal.name, added())
            else:
                write_parquet(self.source, file, added(), *self.schemas)
        meter.say(f"{self.journal.name}: {meter.summary()}")
        return broken


class Job(Protocol):
    """What is done to a file's rows. It is pickled where that is done elsewhere; what is random in it comes from its seed."""

    def windows(self, source: Json | Parquet) -> Iterator[list[Record]]:
        """Rows that are worked on together: the same ones whenever and wherever the same run is started."""
        ...

    def begin(self, model: "ReflectiveModel") -> dict[str, Any]:
        """What results depend on. Raises ValueError for a model, or settings, that no row can be done with."""
        ...

    def results(
        self, model: "ReflectiveModel", window: list[Record], done: Collection[tuple[int, int]], tally: Tally
    ) -> Iterator[list[Result]]:
        """What comes of those of a window that are not ``done``, as row and place; each list is to be kept whole."""
        ...


Run = Callable[[Load, Job, Work, Report], int]  # returns how many rows are broken, see ``here``


def here(load: Load, job: Job, work: Work, report: Report) -> int:
    """Do all of a job in this process, and write its output.

    Returns:
        How many rows are broken, of which ``report`` is told.

    Raises: as ``load``, ``Job.begin``, ``Journal`` and ``Work.finish``.
    """
    model = load()
    work.journal.agree(job.begin(model))
    with work.meter() as meter:
        for window in job.windows(work.source):
            done = work.journal.done(window[0].number, window[-1].number)
            for results in job.results(model, window, done, meter):
                work.journal.keep(results)
        return work.finish(meter, report)


def joined(results: list[Result], lists: bool = False) -> dict[str, Any]:
    """The columns of a row, from what came of it or of its responses."""
    ((_, place, first), *_) = results
    if place == WHOLE_ROW and not lists:
        return first
    return {name: [result[name] for _, _, result in results] for name in first}


def tell(results: list[Result], row: str, report: Report) -> bool:
    """Whether there is anything wrong with a row."""
    broken = [(number, place, result["error"]) for number, place, result in results if result["error"] is not None]
    for number, place, error in broken:
        report(f"{row} {number}{'' if place == WHOLE_ROW else f', response {place + 1}'}: {error}")
    return bool(broken)


def _schema(names: Iterable[str], lists: bool) -> "pa.Schema":
    """Of the columns that come: whatever the rows hold, these are their types."""
    pa = pyarrow()
    whole, real, text = pa.int64(), pa.float64(), pa.string()
    types = {
        "text": text, "score": real, "n_steps": whole, "step_scores": pa.list_(real), "step_spans": pa.list_(pa.list_(whole)),
        "error": text, "token_ids": pa.list_(pa.int32()), "answer": text, "status": text, "log_prob": real, "number": whole,
        "parent": whole, "tokens": whole, "best": whole, "strategy": text, "seed": whole,
    }  # fmt: skip
    types["candidates"] = pa.list_(pa.struct([(name, types[name]) for name in CANDIDATE]))
    return pa.schema([(name, pa.list_(types[name]) if lists else types[name]) for name in names])


def in_halves(do: Callable[[list[Given]], list[Found]], items: list[Given]) -> "list[Found | Exception]":
    """What ``do`` makes of ``items``; where it fails, of one half and of the other, until the one that it fails at is alone."""
    import torch

    if not items:
        return []
    try:
        return do(items)
    except (ValueError, TypeError, IndexError, torch.OutOfMemoryError) as error:  # IndexError: past learned positions
        if len(items) == 1:
            return [error.with_traceback(None)]
    half = len(items) // 2
    return in_halves(do, items[:half]) + in_halves(do, items[half:])


def fault(error: Exception | str, names: Iterable[str]) -> dict[str, Any]:
    """Columns of a row of which nothing came."""
    named = isinstance(error, Exception) and type(error) is not ValueError
    return dict.fromkeys(names) | {"error": f"{type(error).__name__}: {error}" if named else str(error)}
