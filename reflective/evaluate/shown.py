"""Finished files as a page to read: what ``reflective view`` writes."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress

from .. import view
from ..search.results import chosen_by, ended
from ..search.verify import Verifier
from ..tasks import Question
from ..utils.outputs import destination, write_text
from .forms import is_published, number, read_candidates, read_question
from .reading import Reader

_MOST = 400 << 20  # characters of data in a page: browsers hold no string of more than 512 Mi, and little is to be seen in so much
_CANDIDATES = ("candidates", "output", "response", "responses")


def show(
    source: str | Path,
    output: str | Path,
    *,
    answers: str | Path | None = None,
    verifier: str | Verifier | None = None,
    outcome: str | None = None,
    pattern: str | None = None,
    task: str | None = None,
    risk: bool = False,
    name: str | None = None,
    bars: Progress | None = None,
) -> dict[str, int]:
    """Write a page of all candidates of a file: one HTML file without network, to search, sort, filter and compare them in.

    Args:
        source: what ``reflective generate`` and ``reflective score`` write, and whatever ``evaluate`` reads. Rows of which nothing came are
            shown with their errors.
        output: the page; what is there is replaced.
        answers, verifier, outcome, pattern, task: what is right, as for ``evaluate``; where nothing tells, nothing is called right or wrong.
        risk: the scores are of risk, and low is good.
        name: of the page, in place of the file's.

    Returns:
        How many ``questions`` and ``candidates`` there are, how many are ``right`` and ``wrong``, and the page's ``bytes``.

    Raises:
        ValueError: as ``evaluate``; no row; more than a browser opens. OSError: files that cannot be read or written; ImportError: see ``evaluate``.
    """
    place = destination(output)
    if place.exists() and Path(source).exists() and place.samefile(source):
        raise ValueError(f"output: {output} is the input; give another file")
    reader = Reader(verifier, answers, outcome, pattern, task, ("geometric_mean",), None, bars)
    collected = _Collected(risk)
    for where, fields, judging in reader.told_apart(source):
        collected.add(reader, where, fields, judging)
    if not collected.rows:
        raise ValueError(f"{source}: it has no row; there is nothing to show")
    name = name or Path(source).name
    page = view.browse(name, collected.data(name, reader.name))
    write_text(place, page)
    told = [row.get("r") for row in collected.rows]
    return {
        "questions": len(collected.questions), "candidates": len(told), "right": told.count(1), "wrong": told.count(0), "bytes": place.stat().st_size,
    }  # fmt: skip


class _Collected:
    """The data of a page, in the form that ``view/page.js`` reads."""

    def __init__(self, risk: bool) -> None:
        self.risk, self.size, self.judges = risk, 0, set[str]()
        self.questions: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.scores: list[tuple[float, list[float]]] = []
        self._known: dict[str, int] = {}

    def add(self, reader: Reader, where: str, fields: dict[str, Any], task: str | None) -> None:
        """The candidates of a row.

        Raises:
            ValueError: a row of another form.
        """
        at = where.rpartition(", ")[2]
        question, candidates, failed = self._read(where, fields)
        judging = task if reader.by_task else None
        asked = question if reader.right is None else reader.right.get(question.text)
        shown = question.text or str(fields.get("prompt") or "")
        q = self._question(shown or at, asked.answer if asked else "", bool(shown))
        run, best = fields.get("strategy"), fields.get("best")
        for i, candidate in enumerate(candidates):
            here = f"{where}, candidate {i}"
            text = candidate.get("text")
            draw = None
            if isinstance(text, str):
                draw = reader.draw(here, fields, i, candidate, asked, judging)
            row = _candidate(here, candidate, q, at)
            if draw is not None and not math.isnan(draw.outcome):
                row["r"] = int(draw.outcome)
                self.judges.add(f"{task} of compute_metric.py" if judging else reader.name)
            if draw is not None and draw.answer is not None:
                row["a"] = view.plain(draw.answer)
            row["w"] = ended(str(candidate["status"]), run) if candidate.get("status") else ""
            if best == i and isinstance(best, int):
                how = fields.get("chosen_by")
                row["c"] = chosen_by(how, run or "the strategy") if how else f"by {run}" if run else "by the run"
            self._keep(row)
        if not candidates:
            self._keep({"q": q, "i": at, "t": "", "x": None, "s": [], "er": view.plain(failed or "there are no candidates"), "w": ""})

    def data(self, name: str, judge: str) -> dict[str, Any]:
        steps = [s for score, steps in self.scores for s in (score, *steps) if math.isfinite(s)]
        low, high = min(steps, default=0.0), max(steps, default=1.0)
        inside = low >= 0 and high <= 1
        return {
            "name": view.plain(name), "aggregation": view.aggregation_of(self.scores), "low": 0 if inside else low, "high": 1 if inside else high,
            "risk": self.risk, "judge": view.plain(", ".join(sorted(self.judges))), "questions": self.questions, "rows": self.rows,
        }  # fmt: skip

    def _read(self, where: str, fields: dict[str, Any]) -> tuple[Question, list[dict[str, Any]], str | None]:
        """Question, candidates, and why there are none, of a row: of those that ``evaluate`` reads, of scored texts, and of rows of which nothing came."""
        error = fields.get("error")
        failed = error if isinstance(error, str) else None
        try:
            question = read_question(where, fields)
        except ValueError:
            if not failed and not isinstance(fields.get("text"), str) and not fields.keys() & set(_CANDIDATES):
                raise
            question = Question("", "", fields)
        if fields.keys() & set(_CANDIDATES):
            candidates = [dict(c) for c in read_candidates(where, fields)]
            for i, c in enumerate(candidates):
                if "candidates" not in fields and not is_published(fields):
                    c |= _scored(fields, None if "response" in fields else i)
            return question, candidates, failed
        if isinstance(fields.get("text"), str):
            return question, [{"text": fields["text"], **_scored(fields, None)}], failed
        if failed:
            return question, [], failed
        read_candidates(where, fields)  # raises
        raise AssertionError

    def _question(self, text: str, right: str, real: bool) -> int:
        if text not in self._known:
            self._known[text] = len(self.questions)
            self.questions.append({"t": view.plain(text), "a": view.plain(right)} | ({} if real else {"none": 1}))
        return self._known[text]

    def _keep(self, row: dict[str, Any]) -> None:
        self.size += len(row["t"]) + 8 * len(row["s"]) + 64
        if self.size > _MOST:
            raise ValueError(
                f"source: its first {len(self.rows):,} candidates are as much as a browser can open in a page ({_MOST >> 20} MiB); "
                "give a part of it, such as its first rows"
            )
        self.rows.append(row)
        self.scores.append((math.nan if row["x"] is None else row["x"], [math.nan if s is None else s for s in row["s"]]))


def _scored(fields: dict[str, Any], place: int | None) -> dict[str, Any]:
    """What ``reflective score`` says of a response, of the one of a row or of that at ``place`` of several, by all heads."""

    def of(name: str) -> Any:
        value = fields.get(name)
        if place is None:
            return value
        return value[place] if isinstance(value, list) and place < len(value) else None

    names = [k.removeprefix("step_scores_") for k in fields if k.startswith("step_scores_")]
    found = {name: of(name) for name in ("score", "step_scores", "step_spans", "error")}
    found["further"] = {n: {"score": of(f"score_{n}"), "step_scores": of(f"step_scores_{n}"), "step_spans": of(f"step_spans_{n}")} for n in names}
    return found


def _candidate(where: str, candidate: dict[str, Any], q: int, at: str) -> dict[str, Any]:
    text = candidate.get("text")
    error = candidate.get("error")
    if not isinstance(text, str):
        error, text = error or "there is no text", ""
    row: dict[str, Any] = {"q": q, "i": at, **_numbers(where, text, candidate)}
    row["t"] = "".join(_segments(text, _spans(candidate, len(text))))
    if error:
        row["er"] = view.plain(str(error))
    for key, name in (("k", "tokens"), ("n", "number"), ("p", "parent")):
        if isinstance(candidate.get(name), int):
            row[key] = candidate[name]
    if isinstance(ids := candidate.get("token_ids"), list):  # what it has; ``tokens`` is what was decoded for it, of a fork its own
        row["k"] = len(ids)
    further = {view.plain(str(n)): _numbers(where, text, told) for n, told in (candidate.get("further") or {}).items()}
    if further:
        row["f"] = further
    return row


def _numbers(where: str, text: str, candidate: dict[str, Any]) -> dict[str, Any]:
    """Score, step scores and ends of steps: in the text of the page, counted as JavaScript counts."""
    steps = [_short(number(where, "step_scores", s)) for s in candidate.get("step_scores") or []]
    found: dict[str, Any] = {"x": _short(number(where, "score", candidate.get("score"))), "s": steps}
    spans = _spans(candidate, len(text))
    if spans and len(spans) == len(steps):
        ends, at = [], 0
        for segment in _segments(text, spans):
            at += len(segment.encode("utf-16-le")) // 2
            ends.append(at)
        found["e"] = ends[: len(spans)]
    return found


def _segments(text: str, spans: Sequence[tuple[int, int]]) -> Iterator[str]:
    """A piece of the text for each step, and the rest, as the page shows them."""
    at = 0
    for _, end in spans:
        yield view.plain(text[at:end])
        at = end
    yield view.plain(text[at:])


def _spans(candidate: dict[str, Any], length: int) -> list[tuple[int, int]]:
    """Spans of steps, nothing where they do not follow each other within the text."""
    found: list[tuple[int, int]] = []
    at = 0
    for span in candidate.get("step_spans") or []:
        if not isinstance(span, list | tuple) or len(span) != 2 or not all(isinstance(x, int) for x in span) or not at <= span[0] <= span[1] <= length:
            return []
        at = span[1]
        found.append((span[0], span[1]))
    return found


def _short(value: float) -> float | None:
    """Five digits, as many as a page can show; None for what is no number."""
    return float(f"{value:.5g}") if math.isfinite(value) else None
