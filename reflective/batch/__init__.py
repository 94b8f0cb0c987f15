"""Batch work: a file of texts or questions in, the same file with scores or answers out.

The input is read a window at a time, so memory does not grow with it: ``WINDOW_ROWS`` rows and ``WINDOW_TEXT`` characters of
text at most (one row at the least), their tokens, and one batch's forward; of a file that is written, ``files.PIECE_BYTES``.

A run that was killed goes on where it was, see ``journal``: results are kept batch by batch, and batches are the same whenever
the same run is started, so that in the end the output is too, to the last bit.
"""

import dataclasses
import itertools
import math
import random
import secrets
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeVar

from ..utils.outputs import finite, replacing
from .files import (
    PIECE_BYTES,
    Json,
    Lines,
    Parquet,
    Record,
    arriving,
    check_unchanged,
    content_hash,
    form_of,
    is_parquet,
    open_file,
    pieces,
    pyarrow,
    read_lines,
    write_json,
    write_parquet,
)
from .journal import WHOLE_ROW, Journal, Result
from .progress import Meter

if TYPE_CHECKING:  # not at run time: with torch it takes seconds, and input that cannot be read should fail before
    import pyarrow as pa

    from ..model import Candidate, Generation, ReflectiveModel
    from ..search.strategies import Strategy

Given, Found = TypeVar("Given"), TypeVar("Found")
Load = Callable[[], "ReflectiveModel"]
Report = Callable[[str], None]

__all__ = [
    "arriving", "form_of", "generate_file", "is_parquet", "open_file", "read_lines", "replacing", "score_file", "score_stream",
    "seed_of", "windows",
]  # fmt: skip

WINDOW_ROWS, WINDOW_TEXT = 4096, 4 << 20  # texts sorted by length at a time: rows, characters
TO_SCORE = ("text", "prompt", "question", "response", "responses")
TO_ANSWER = ("question", "prompt", "problem")
SCORED = ("score", "n_steps", "step_scores", "step_spans", "error")
CANDIDATE = (
    "text", "score", "step_scores", "step_spans", "token_ids", "answer", "error", "status", "log_prob", "number", "parent",
    "tokens",
)  # fmt: skip
ANSWERED = ("text", "score", "best", "candidates", "strategy", "seed", "tokens", "error")


def score_file(
    load: Load,
    source: str | Path,
    output: str | Path,
    *,
    batch_tokens: int = 16_384,
    replace: bool = False,
    report: Report = print,
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

    Returns:
        How many rows have such a response.

    Raises:
        ValueError: files that do not fit, an unfinished run of other settings, a head that does not fit the model.
        OSError: files that cannot be read or written; an output that is there. ImportError: no pyarrow.
    """
    file = open_file(source)
    with Journal(Path(output), replace) as journal:
        work = _Work("score", file, journal, TO_SCORE, SCORED)
        model = load()
        journal.agree(_identity(model))
        with Meter("score", len(file), journal.count()) as meter:
            for window in windows(file.records(TO_SCORE)):
                done = journal.done(window[0].number, window[-1].number)
                for results in _score(model, window, batch_tokens, done, meter):
                    journal.keep(results)
            return work.finish(meter, report)


def score_stream(
    load: Load,
    arrivals: Iterable[list[Record]],
    file: BinaryIO,
    *,
    batch_tokens: int = 16_384,
    row: str = "line",
    report: Report = print,
    output: str | Path = "",
) -> int:
    """``score_file`` of records that come some at a time: each is written into ``file`` when those are scored, as a line of JSON
    or in what other form of it the name ``output`` says."""
    model, broken = load(), 0
    _check_head(model)
    with Lines(file, output) as lines:
        for window in arrivals:
            found = sorted(itertools.chain.from_iterable(_score(model, window, batch_tokens)), key=itemgetter(0, 1))
            for record, (_, results) in zip(window, itertools.groupby(found, itemgetter(0)), strict=True):
                results = list(results)
                broken += _tell(results, row, report)
                lines.write(record.fields | _joined(results))
            lines.flush()
    return broken


def generate_file(
    load: Load,
    source: str | Path,
    output: str | Path,
    *,
    effort: str | None = None,
    strategy: "Strategy | str | None" = None,
    n: int | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.6,
    top_p: float = 0.95,
    thinking_budget: int | None = None,
    seed: int | None = None,
    together: int = 8,
    replace: bool = False,
    report: Report = print,
) -> int:
    """Answer every question of a file of JSON or parquet, and write it with ``ANSWERED`` into another.

    A row has a ``question``, ``prompt`` or ``problem``: a text, or a conversation of one user message. ``candidates`` are all
    that there were, and ``best`` is the index of the chosen one among them.

    Args:
        load, source, output, replace, report: as for ``score_file``.
        effort, strategy, n, max_new_tokens, temperature, top_p, thinking_budget: as for ``ReflectiveModel.generate``.
        seed: row r is answered with ``seed_of(seed, r)``, which its ``seed`` says, as it would be alone. None draws one, with
            which the run goes on when it was killed.
        together: questions decoded in one batch, and kept together. A run that goes on may have another number.

    Returns, raises: as ``score_file``; and KeyboardInterrupt, where ``ReflectiveModel.generate`` gives what there is.
    """
    file = open_file(source)
    settings = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "thinking_budget": thinking_budget,
    }  # fmt: skip
    with Journal(Path(output), replace) as journal:
        work = _Work("generate", file, journal, TO_ANSWER, ANSWERED)
        if seed is None and (seed := journal.setting("seed")) is None:
            seed = secrets.randbits(32)
        journal.agree({"seed": seed, **settings})
        model = load()
        strategy = model.strategy(strategy, effort, n)
        _check_settings(model, strategy, settings)
        journal.agree({**_identity(model), "strategy": repr(strategy)})

        def answer(asked: list[tuple[int, str]]) -> "list[Generation]":
            seeds = [seed_of(seed, number) for number, _ in asked]
            found = model.generate([question for _, question in asked], strategy=strategy, seed=seeds, **settings)
            if any(generation.interrupted for generation in found):
                raise KeyboardInterrupt
            return found

        with Meter("generate", len(file), journal.count()) as meter:
            for window in pieces(file.records(TO_ANSWER), lambda record: record.size, together, PIECE_BYTES):
                done = journal.done(window[0].number, window[-1].number)
                results: list[Result] = []
                asked: list[tuple[int, str]] = []
                for record in window:
                    if (record.number, WHOLE_ROW) not in done:
                        try:
                            question = _question(record)
                            if (length := model.encode(model.format(question)).shape[1]) >= _positions(model):
                                raise ValueError(
                                    f"the prompt has {length:,} tokens, which leaves no room in the model's "
                                    f"{_positions(model):,} positions"
                                )
                            asked.append((record.number, question))
                        except ValueError as error:
                            results.append((record.number, WHOLE_ROW, _fault(error, ANSWERED)))
                for (number, _), found in zip(asked, _in_halves(answer, asked), strict=True):
                    results.append((number, WHOLE_ROW, _answered(found)))
                tokens = sum(result["tokens"] or 0 for _, _, result in results)
                meter.expect(len(results), tokens)
                journal.keep(results)
                meter.advance(len(results), tokens, sum(result["error"] is not None for _, _, result in results))
            return work.finish(meter, report)


def seed_of(seed: int, row: int) -> int:
    """The seed of a row's question, in [0, 2^63)."""
    import numpy as np

    return int(np.random.SeedSequence([seed, row]).generate_state(1, np.uint64)[0]) >> 1


def windows(records: Iterable[Record]) -> Iterator[list[Record]]:
    """As many records as are sorted by length together."""

    def characters(record: Record) -> int:
        values = (v if isinstance(v, list) else [v] for v in record.fields.values())
        return sum(len(text) for text in itertools.chain.from_iterable(values) if isinstance(text, str))

    return pieces(records, characters, WINDOW_ROWS, WINDOW_TEXT)


# -- files -------------------------------------------------------------------------------------------------------------


class _Work:
    """An input, and the output that its journal is for.

    Args:
        reads: columns that are asked for; a parquet file has at least one of them. adds: columns that come.
    """

    def __init__(
        self, name: str, source: Json | Parquet, journal: Journal, reads: tuple[str, ...], adds: tuple[str, ...]
    ) -> None:
        from .. import __version__

        self.source, self.journal = source, journal
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

    def finish(self, meter: Meter, report: Report) -> int:
        """Write the output, and tell how many rows are broken."""
        broken = 0

        def added() -> Iterator[dict[str, Any]]:
            nonlocal broken
            for results in self.journal.rows():
                broken += _tell(results, self.source.row, report)
                yield _joined(results, self.lists)

        check_unchanged(self.source)
        with self.journal.finished() as file:
            if self.schemas is None:
                write_json(self.source, file, self.journal.name, added())
            else:
                write_parquet(self.source, file, added(), *self.schemas)
        meter.say(f"{self.journal.name}: {meter.summary()}")
        return broken


def _joined(results: list[Result], lists: bool = False) -> dict[str, Any]:
    """The columns of a row, from what came of it or of its responses."""
    ((_, place, first), *_) = results
    if place == WHOLE_ROW and not lists:
        return first
    return {name: [result[name] for _, _, result in results] for name in first}


def _tell(results: list[Result], row: str, report: Report) -> bool:
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


# -- rows --------------------------------------------------------------------------------------------------------------


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
    meter: Meter | None = None,
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
            faults.append((record.number, WHOLE_ROW, _fault(error, SCORED)))
    if done and all(key[:2] in done for key in itertools.chain(faults, texts)):
        return
    items: list[_Item] = []
    for found in _tokenized(model, texts):
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

    if faults := [fault for fault in faults if fault[:2] not in done]:
        yield told(faults, 0)
    for batch in filter(None, batches):
        candidates = _in_halves(lambda some: _candidates(model, some, batch_tokens), batch)
        results = [(item.row, item.place, _scored(c)) for item, c in zip(batch, candidates, strict=True)]
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


def _tokenized(model: "ReflectiveModel", texts: list[tuple[int, int, str, str]]) -> Iterator[_Item | Result]:
    """Prompts and responses tokenized apart, as ``ReflectiveModel.score`` does; a fault is what has no tokens, or more than the
    model has positions: of millions one text would take hours, and its score mean nothing."""
    most = _positions(model)
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
        if isinstance(before, list) and ids and len(before) + len(ids) <= most:
            yield _Item(row, place, before, ids)
        elif isinstance(before, list) and ids:
            wrong = f"with its prompt {len(before) + len(ids):,} tokens, more than the model's {most:,} positions"
            yield row, place, _fault(wrong, SCORED)
        else:
            wrong = "the response is empty" if response == "" or ids == [] else f"expected a string, found {response!r}"
            yield row, place, _fault(wrong if isinstance(before, list) else before, SCORED)


def _candidates(model: "ReflectiveModel", items: list[_Item], batch_tokens: int) -> "list[Candidate]":
    from ..scoring.scores import NonFiniteWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NonFiniteWarning)  # it is told as that row's error
        return model.score_tokens([i.prompt for i in items], [i.response for i in items], batch_tokens=batch_tokens)


def _in_halves(do: Callable[[list[Given]], list[Found]], items: list[Given]) -> "list[Found | Exception]":
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
    return _in_halves(do, items[:half]) + _in_halves(do, items[half:])


def _question(record: Record) -> str:
    """What a record asks.

    Raises:
        ValueError: nothing.
    """
    if record.fault:
        raise ValueError(record.fault)
    asked = next((record.fields[name] for name in TO_ANSWER if record.fields.get(name) is not None), None)
    match asked:
        case [{"role": "user", "content": text}]:
            asked = text
    if not isinstance(asked, str) or not asked.strip():
        raise ValueError("expected a question, prompt or problem: a text, or one user message")
    return asked


def _scored(found: "Candidate | Exception") -> dict[str, Any]:
    if isinstance(found, Exception):
        return _fault(found, SCORED)
    return finite(
        {
            "score": found.score, "n_steps": len(found.step_scores), "step_scores": found.step_scores,
            "step_spans": found.step_spans, "error": _reason(found),
        }
    )  # fmt: skip


def _answered(found: "Generation | Exception") -> dict[str, Any]:
    if isinstance(found, Exception):
        return _fault(found, ANSWERED)
    return finite(
        {
            "text": found.text, "score": found.score, "best": found.candidates.index(found.best),
            "candidates": [c.record() | {"error": _reason(c)} for c in found.candidates],
            "strategy": found.strategy, "seed": found.seed, "tokens": found.tokens, "error": _reason(found.best),
        }
    )  # fmt: skip


def _fault(error: Exception | str, names: Iterable[str]) -> dict[str, Any]:
    """Columns of a row of which nothing came."""
    named = isinstance(error, Exception) and type(error) is not ValueError
    return dict.fromkeys(names) | {"error": f"{type(error).__name__}: {error}" if named else str(error)}


def _reason(candidate: "Candidate") -> str | None:
    """Its error, without its number within the batch."""
    return candidate.error and candidate.error.partition(": ")[2]


# -- models ------------------------------------------------------------------------------------------------------------


def _identity(model: "ReflectiveModel") -> dict[str, Any]:
    """What results depend on.

    Raises:
        ValueError: the head does not fit the model.
    """
    from ..train.checkpoint import fingerprint

    _check_head(model)
    return {
        "model": fingerprint([*model.model.parameters(), *model.head.parameters()]),
        "dtype": str(model.model.dtype),
        "use": dataclasses.asdict(model.config),
    }


def _check_head(model: "ReflectiveModel") -> None:
    """Raises ValueError for a head that does not fit the model, which else every row would be told."""
    from ..engines.hf.backbone import Backbone
    from ..engines.hf.parts import check_parts

    check_parts(Backbone.of(model.model), model.head, model.steps)


def _positions(model: "ReflectiveModel") -> float:
    """Tokens of prompt and response together, as far as the model's configuration says."""
    return getattr(model.model.config.get_text_config(decoder=True), "max_position_embeddings", None) or math.inf


def _check_settings(model: "ReflectiveModel", strategy: "Strategy", settings: dict[str, Any]) -> None:
    """Raises ValueError for settings that no question can be answered with."""
    from ..search.loop import Ask

    Ask([0], strategy, **settings)
    if settings["thinking_budget"] is not None:
        model.think_end()
