"""Texts and responses to score, of a file or as they come."""

import dataclasses
import itertools
import random
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from ..utils.outputs import finite
from ..utils.records import Json, Lines, Parquet, Record, open_file, pieces
from .journal import WHOLE_ROW, Journal, Result
from .progress import Tally
from .run import Load, Report, Run, Work, fault, here, in_halves, joined, tell

if TYPE_CHECKING:
    from ..model import Candidate, ReflectiveModel

WINDOW_ROWS, WINDOW_TEXT = 4096, 4 << 20  # texts sorted by length at a time: rows, characters
TO_SCORE = ("text", "prompt", "question", "response", "responses")
SCORED = ("score", "n_steps", "step_scores", "step_spans", "error")


def columns(further: Collection[str] = ()) -> tuple[str, ...]:
    """What a scored row has: ``SCORED``, and of each further head the same but for the error, ``score_NAME`` and so on."""
    return (*SCORED, *(f"{column}_{name}" for name in further for column in SCORED[:-1]))




def score_file(
    load: Load,
    source: str | Path,
    output: str | Path,
    *,
    batch_tokens: int = 16_384,
    replace: bool = False,
    report: Report = print,
    run: Run = here,
    further: Collection[str] = (),
) -> int:
    """Score every row of a file of JSON or parquet, and write it with ``SCORED`` into another.

    A row has ``text``; or ``response`` and ``prompt`` or ``question`` (put into the model's prompt); or in place of
    ``response`` a list, ``responses``, and then gets lists. Null is the same as missing. ``error`` is the reason where
    there is no score, else null.

    Args:
        load: gives the model; called when input and output are known to be good.
        source: in any form that ``files`` reads.
        output: in the form that its name says, see ``files.form_of``. All columns stay; those named as in ``SCORED`` are
            replaced. It has the input's order, appears when it is complete, and is written through where it is a link. Where a
            parquet file has ``responses``, all its rows get lists. JSON has null in place of NaN and infinity.
        batch_tokens: padded tokens a forward. A run that goes on may have another number.
        replace: an output that is there, and what a run of other settings has left unfinished.
        report: told of every response that could not be scored, by the number of its row.
        run: where the work is done: in this process, or by a ``cluster.Cluster``.
        further: names of the further heads that the model has (``ReflectiveModel.add_head``), with ``columns`` each.

    Returns:
        How many rows have such a response.

    Raises:
        ValueError: files that do not fit, an unfinished run of other settings, a head that does not fit the model.
        OSError: files that cannot be read or written; an output that is there. ImportError: no pyarrow.
    """
    file = open_file(source)
    with Journal(Path(output), replace) as journal:
        return run(
            load, _Scoring(batch_tokens, further=tuple(further)), Work("score", file, journal, TO_SCORE, columns(further)), report
        )


def score_stream(
    load: Load,
    arrivals: Iterable[list[Record]],
    file: BinaryIO,
    *,
    batch_tokens: int = 16_384,
    row: str = "line",
    report: Report = print,
    output: str | Path = "",
    further: Collection[str] = (),
) -> int:
    """``score_file`` of records that come some at a time: each is written into ``file`` when those are scored, as a line of JSON
    or in what other form of it the name ``output`` says."""
    model, broken = load(), 0
    model.check_head()  # or every row would be told
    with Lines(file, output) as lines:
        for window in arrivals:
            found = sorted(itertools.chain.from_iterable(_score(model, window, batch_tokens, further=further)), key=itemgetter(0, 1))
            for record, (_, results) in zip(window, itertools.groupby(found, itemgetter(0)), strict=True):
                results = list(results)
                broken += tell(results, row, report)
                lines.write(record.fields | joined(results))
            lines.flush()
    return broken


def windows(records: Iterable[Record], rows: int | None = None, text: int | None = None) -> Iterator[list[Record]]:
    """As many records as are sorted by length together: ``WINDOW_ROWS``, and ``WINDOW_TEXT`` characters, or as given."""

    def characters(record: Record) -> int:
        values = (v if isinstance(v, list) else [v] for v in record.fields.values())
        return sum(len(text) for text in itertools.chain.from_iterable(values) if isinstance(text, str))

    return pieces(records, characters, rows or WINDOW_ROWS, text or WINDOW_TEXT)


@dataclasses.dataclass
class _Scoring:
    """A ``run.Job``."""

    batch_tokens: int
    further: tuple[str, ...] = ()
    rows: int = dataclasses.field(default_factory=lambda: WINDOW_ROWS)
    text: int = dataclasses.field(default_factory=lambda: WINDOW_TEXT)

    def windows(self, source: Json | Parquet) -> Iterator[list[Record]]:
        return windows(source.records(TO_SCORE), self.rows, self.text)

    def begin(self, model: "ReflectiveModel") -> dict[str, Any]:
        return model.identity()

    def results(
        self, model: "ReflectiveModel", window: list[Record], done: Collection[tuple[int, int]], tally: Tally
    ) -> Iterator[list[Result]]:
        return _score(model, window, self.batch_tokens, done, tally, self.further)


class _Item(NamedTuple):
    """A response to score: its row, its place there, and its tokens."""

    row: int
    place: int
    prompt: list[int]
    response: list[int]


def _score(
    model: "ReflectiveModel",
    window: list[Record],
    batch_tokens: int,
    done: Collection[tuple[int, int]] = (),
    meter: Tally | None = None,
    further: Collection[str] = (),
) -> Iterator[list[Result]]:
    """Results of what is not yet ``done`` of a window, batch by batch.

    The batches do not depend on what is done. They come in a random order, so that the time left can be told.
    """
    from ..utils.lengths import batches_by_length

    faults: list[Result] = []
    texts: list[tuple[int, int, str, str]] = []
    for record in window:
        try:
            texts += _texts(model, record)
        except ValueError as error:
            faults.append((record.number, WHOLE_ROW, fault(error, columns(further))))
    if done and all(key[:2] in done for key in itertools.chain(faults, texts)):
        return
    items: list[_Item] = []
    for found in _tokenized(model, texts, columns(further)):
        items.append(found) if isinstance(found, _Item) else faults.append(found)
    left = Counter(row for row, place, *_ in itertools.chain(items, faults) if (row, place) not in done)
    batches = batches_by_length([len(item.prompt) + len(item.response) for item in items], batch_tokens)
    random.Random(window[0].number).shuffle(batches)
    batches = [[items[i] for i in batch if items[i][:2] not in done] for batch in batches]
    if meter:
        meter.expect(len(left), sum(len(i.prompt) + len(i.response) for batch in batches for i in batch))

    def told(results: list[Result], tokens: int) -> list[Result]:
        left.subtract(row for row, _, _ in results)
        if meter:
            ended = sum(not left[row] for row in {row for row, _, _ in results})
            meter.advance(ended, tokens, sum(result["error"] is not None for _, _, result in results))
        return results

    if faults := [f for f in faults if f[:2] not in done]:
        yield told(faults, 0)
    for batch in filter(None, batches):
        candidates = in_halves(lambda some: _candidates(model, some, batch_tokens), batch)
        results = [(item.row, item.place, _scored(c, further)) for item, c in zip(batch, candidates, strict=True)]
        yield told(results, sum(len(item.prompt) + len(item.response) for item in batch))


def _texts(model: "ReflectiveModel", record: Record) -> list[tuple[int, int, str, str]]:
    """Row, place, prompt and text of the responses of a record.

    Raises:
        ValueError: it has none.
    """
    if record.fault:
        raise ValueError(record.fault)
    given = {name: value for name in TO_SCORE if (value := record.fields.get(name)) is not None}
    wrong = [name for name, value in given.items() if not isinstance(value, list if name == "responses" else str)]
    if wrong:
        wanted = "list" if wrong[0] == "responses" else "string"
        raise ValueError(f"{wrong[0]}: expected a {wanted}, found {type(given[wrong[0]]).__name__}")
    if "text" in given:
        return [(record.number, WHOLE_ROW, "", given["text"])]
    if len({"response", "responses"} & given.keys()) != 1 or not {"prompt", "question"} & given.keys():
        raise ValueError("expected text, or response or responses, and with these prompt or question")
    prompt = given["prompt"] if "prompt" in given else model.format(given["question"])
    if "response" in given:
        return [(record.number, WHOLE_ROW, prompt, given["response"])]
    if not given["responses"]:
        raise ValueError("responses: the list is empty")
    return [(record.number, place, prompt, response) for place, response in enumerate(given["responses"])]


def _tokenized(
    model: "ReflectiveModel", texts: list[tuple[int, int, str, str]], names: Sequence[str]
) -> Iterator[_Item | Result]:
    """Prompts and responses tokenized apart, as ``ReflectiveModel.score`` does; a fault is what has no tokens, or more than the
    model has positions: of millions one text would take hours, and its score mean nothing."""
    prompts: dict[str, list[int] | ValueError] = {"": []}
    for prompt in {prompt for _, _, prompt, _ in texts} - {""}:
        try:
            prompts[prompt] = model.encode(prompt)[0].tolist()
        except ValueError as error:
            prompts[prompt] = error
    responses: dict[tuple[int, int], list[int]] = {}
    for special in (False, True):  # at once, for the tokenizer has threads of its own
        some = [(row, place, r) for row, place, p, r in texts if special == (not p) and isinstance(r, str) and r]
        if some:
            ids = model.tokenizer([r for _, _, r in some], add_special_tokens=special).input_ids
            responses |= zip([key[:2] for key in some], ids, strict=True)
    for row, place, prompt, response in texts:
        before, ids = prompts[prompt], responses.get((row, place))
        if isinstance(before, list) and ids:
            size = len(before) + len(ids)
            if wrong := model.too_long(size):
                yield row, place, fault(f"with its prompt {size:,} tokens, {wrong}", names)
            else:
                yield _Item(row, place, before, ids)
        else:
            wrong = "the response is empty" if response == "" or ids == [] else f"expected a string, found {response!r}"
            yield row, place, fault(wrong if isinstance(before, list) else before, names)


def _candidates(model: "ReflectiveModel", items: list[_Item], batch_tokens: int) -> "list[Candidate]":
    from ..scoring.scores import NonFiniteWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NonFiniteWarning)  # it is told as that row's error
        return model.score_tokens([i.prompt for i in items], [i.response for i in items], batch_tokens=batch_tokens)


def _scored(found: "Candidate | Exception", further: Collection[str]) -> dict[str, Any]:
    if isinstance(found, Exception):
        return fault(found, columns(further))
    values = {f"{column}_{name}": value for name in further for column, value in _columns(found.further[name]).items()}
    return finite(_columns(found) | values | {"error": found.error})


def _columns(found: "Candidate") -> dict[str, Any]:
    return {
        "score": found.score, "n_steps": len(found.step_scores), "step_scores": found.step_scores, "step_spans": found.step_spans,
    }  # fmt: skip
