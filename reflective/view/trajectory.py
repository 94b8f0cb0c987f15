"""What is shown of a scored text, as plain values, and the numbers that are drawn of it."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

_FLOOR = 1e-10  # of a score under a logarithm, as where scores are made
_CLOSE = 1e-4  # relative; files hold float32 scores, and other people's perhaps four digits


@dataclass(frozen=True)
class Trajectory:
    """A text and its scores.

    Attributes:
        name: what it is called.
        text: of the response.
        score: of the whole; NaN for none.
        step_scores: of every step, in order; NaN for none.
        step_spans: ``(begin, end)`` of every step in ``text``, or nothing where that is not known.
        running: the score after every step, see ``running``.
        answer: that the text gives, or None; right: whether it is the right one, or None where that is not known.
        ended: how it ended and why, in words.
        cut: whether it was stopped or interrupted before its own end.
        chosen: what it was chosen by, in words; empty where it was not.
        error: why there is no score, or None.
        tokens: in the text, or None.
        number: by which others name it as ``parent``, the one that it was forked from; None where there are no forks.
        higher_is_better: False for scores of risk.
        further: the same text by other heads.
    """

    name: str
    text: str
    score: float
    step_scores: Sequence[float] = ()
    step_spans: Sequence[tuple[int, int]] = ()
    running: Sequence[float] = ()
    answer: str | None = None
    right: bool | None = None
    ended: str = ""
    cut: bool = False
    chosen: str = ""
    error: str | None = None
    tokens: int | None = None
    number: int | None = None
    parent: int | None = None
    higher_is_better: bool = True
    further: "Sequence[Trajectory]" = field(default=(), repr=False)


@dataclass(frozen=True)
class Scale:
    """Scores to how good they look, from 0, the poorest, to 1: themselves where all lie in [0, 1], else between their least and greatest;
    the other way round for scores of risk."""

    low: float = 0.0
    high: float = 1.0
    higher_is_better: bool = True

    @classmethod
    def of(cls, scores: Iterable[float], higher_is_better: bool = True) -> "Scale":
        found = [s for s in scores if math.isfinite(s)]
        low, high = min(found, default=0.0), max(found, default=1.0)
        return cls(0.0, 1.0, higher_is_better) if 0 <= low and high <= 1 else cls(low, high, higher_is_better)

    def good(self, score: float) -> float:
        """In [0, 1]; 0.5, which has no tint, for NaN."""
        if math.isnan(score):
            return 0.5
        place = min(max((score - self.low) / ((self.high - self.low) or 1.0), 0.0), 1.0)
        return place if self.higher_is_better else 1 - place


def running(step_scores: Sequence[float], how: str = "geometric_mean") -> list[float]:
    """The score of a trajectory after each of its steps, NaN from a step without a score on.

    Args:
        how: a key of ``scoring.scores.AGGREGATIONS``. Of any other, as of a gated head, whose gates are not here: the mean.
    """
    found: list[float] = []
    total, logs, least, greatest = 0.0, 0.0, math.inf, -math.inf
    for n, score in enumerate(step_scores, 1):
        total, least, greatest = total + score, min(least, score), max(greatest, score)
        logs += math.nan if math.isnan(score) else math.log(max(score, _FLOOR))
        match how:
            case "geometric_mean":
                value = math.exp(logs / n)
            case "product":
                value = math.exp(logs)
            case "min":
                value = least
            case "max":
                value = greatest
            case "last":
                value = score
            case _:
                value = total / n
        found.append(math.nan if math.isnan(total) else value)
    return found


def aggregation_of(candidates: Iterable[tuple[float, Sequence[float]]]) -> str | None:
    """By which of the aggregations the ``(score, step_scores)`` of a file came about, the usual ones first; None where none fits all."""
    left = ["geometric_mean", "mean", "last", "min", "product", "max"]
    told = False
    for score, steps in candidates:
        if not steps or not math.isfinite(score) or not all(map(math.isfinite, steps)):
            continue
        told = True
        left = [how for how in left if math.isclose(running(steps, how)[-1], score, rel_tol=_CLOSE, abs_tol=1e-6)]
        if not left:
            return None
    return left[0] if told else None


def words(how: str) -> str:
    """Of an aggregation, for people."""
    return how.replace("_", " ")


def pieces(trajectory: Trajectory) -> tuple[list[tuple[int, int]], int]:
    """Spans that lie in the text one behind the other, and where what belongs to no step begins; nothing and 0 for spans that do not."""
    at, found = 0, []
    for begin, end in trajectory.step_spans:
        if not at <= begin <= end <= len(trajectory.text):
            return [], 0
        found.append((begin, end))
        at = end
    return (found, at) if len(found) == len(trajectory.step_scores) else ([], 0)


def shared(child: str, parent: str, spans: Sequence[tuple[int, int]]) -> int:
    """How many of a fork's steps, of which these are the ``spans``, it has from its parent: those within their common beginning."""
    same = next((i for i, (a, b) in enumerate(zip(child, parent, strict=False)) if a != b), min(len(child), len(parent)))
    return sum(end <= same for _, end in spans)


def in_order(items: Sequence[Trajectory]) -> list[tuple[int, int]]:
    """``(index, depth)`` of a forest's members, each behind its parent, which came before it; whose parent did not is a root."""
    where = {t.number: i for i, t in enumerate(items) if t.number is not None}
    children: dict[int | None, list[int]] = {}
    for i, t in enumerate(items):
        known = t.parent is not None and t.number is not None and t.parent < t.number
        children.setdefault(where.get(t.parent) if known else None, []).append(i)
    found: list[tuple[int, int]] = []
    stack = [(i, 0) for i in reversed(children.get(None, []))]
    while stack:
        i, depth = stack.pop()
        found.append((i, depth))
        stack += [(child, depth + 1) for child in reversed(children.get(i, []))]
    return found
