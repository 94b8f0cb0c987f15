"""The numbers that a result comes to, question by question, and their means with intervals."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from typing import NamedTuple

import numpy as np

from ..search.selection import Array, Metric, any_of, best_of, saturation, select, subsets
from ..search.strategies.votes import answer_numbers
from .results import Result

CHOICES = ("majority", "weighted_vote", "best_of", "any")  # in the order of tables


@dataclass(frozen=True)
class Row:
    """A number of the report: a line of the CSV file.

    Attributes:
        result: the file's name.
        metric: ``pass``, one of ``CHOICES``, ``chosen``, ``compute_metric.py``, or ``CHOICE limit`` and ``CHOICE n95``.
        n: candidates; None for ``chosen`` and for what is fitted to all n.
        aggregation: of the scores that it rests on.
        value, low, high: with its 95 % bootstrap interval over questions; NaN where there is none.
        questions, of: with so many candidates that have a verdict, and in all.
        tokens, tokens_low, tokens_high: decoded a question, NaN where the file does not tell.
        difference, difference_low, difference_high, shared: from the first result, on the questions that both have.
        verdict: what called candidates right: a verifier, a column, or a task ``of compute_metric.py``.
    """

    result: str
    metric: str
    n: int | None
    aggregation: str | None
    value: float
    low: float
    high: float
    questions: int
    of: int
    tokens: float = math.nan
    tokens_low: float = math.nan
    tokens_high: float = math.nan
    difference: float = math.nan
    difference_low: float = math.nan
    difference_high: float = math.nan
    shared: int = 0
    verdict: str = ""

    @property
    def name(self) -> str:
        return self.metric if self.n is None else f"{self.metric}@{self.n}"


class Key(NamedTuple):
    """What of ``Row`` tells its numbers from a result's others."""

    metric: str
    n: int | None
    aggregation: str | None = None


Values = dict[str, tuple[float, float]]  # value and tokens of every question


def measured(result: Result, aggregations: tuple[str, ...], sizes: Sequence[int]) -> dict[Key, Values]:
    """Every number of every question that has it, with its tokens."""
    table: dict[Key, Values] = defaultdict(dict)
    judged = {} if result.steered else result.judged()
    for question, draws in judged.items():
        right, answer = (
            np.array([d.outcome for d in draws]),
            np.array(answer_numbers([question] * len(draws), [d.answer for d in draws])),
        )
        scores = np.nan_to_num([d.scores for d in draws], nan=0.0)  # [M, A]
        tokens = float(np.mean([d.tokens for d in draws]))
        table[Key("pass", 1)][question] = float(right.mean()), tokens
        for n in sizes:
            if n > len(draws):
                break
            groups, values = subsets(len(draws), n), {("any", None): any_of(right, n)}
            for score, aggregation in zip(scores.T, aggregations, strict=True):
                votes = select(*(v[groups].ravel() for v in (score, right, answer)), n)
                values["majority", None] = votes["majority"].mean()
                values["weighted_vote", aggregation] = votes["weighted_vote"].mean()
                values["best_of", aggregation] = best_of(score, right, n)
            for (metric, aggregation), value in values.items():
                table[Key(metric, n, aggregation)][question] = float(value), n * tokens
    for question, runs in result.chosen.items():
        if known := [run for run in runs if not math.isnan(run.outcome)]:
            table[Key("chosen", None)][question] = tuple(np.mean(known, 0).tolist())
    order = ("pass", *CHOICES, "chosen")
    return dict(sorted(table.items(), key=lambda item: (order.index(item[0].metric), item[0].n or 0)))


def compute_metric(result: Result, n: int) -> float:
    """What the published ``compute_metric.py --N n`` prints: best of n of consecutive candidates, of equals the first.

    Of every prompt as many groups count as the one with the fewest candidates has. NaN where that has too few, or where
    the files are of no task or of several.
    """
    groups = min(map(len, result.published.values()), default=0) // n
    if not groups or len(result.tasks) > 1 or None in result.tasks:
        return math.nan
    right = [
        [max(drawn[g * n : (g + 1) * n], key=itemgetter(0))[1] for drawn in result.published.values()]
        for g in range(groups)
    ]
    return float(np.mean([sum(group) / len(group) for group in right]))


def rows_of(
    result: Result, measures: dict[Key, Values], first: dict[Key, Values], resamples: int, seed: int
) -> Iterator[Row]:
    """The rows of a result: means over questions of what ``measured`` found, what ``compute_metric.py`` prints, and fits.

    Args:
        first: what was measured of the result that it is compared with; empty for none.
        resamples, seed: of the questions, for intervals.
    """
    of, verdict = len(result.draws), ", ".join(sorted(result.verdicts))
    for key, values in measures.items():
        value, tokens = (_bootstrap(v, resamples, seed) for v in np.array(list(values.values())).T)
        other = first.get(key, {})
        shared = [values[q][0] - other[q][0] for q in values if q in other]
        difference = vars(_bootstrap(np.array(shared), resamples, seed)).values() if shared else [math.nan] * 3
        yield Row(
            result.name,
            *key,
            *vars(value).values(),
            len(values),
            of,
            *vars(tokens).values(),
            *difference,
            len(shared),
            verdict,
        )
    for n in sorted({1} | {key.n for key in measures if key.n}):
        if not math.isnan(value := compute_metric(result, n)):
            (task,) = result.tasks
            yield Row(
                result.name, "compute_metric.py", n, "geometric_mean", value, math.nan, math.nan, of, of,
                verdict=f"{task} of compute_metric.py",
            )  # fmt: skip
    for metric, aggregation in dict.fromkeys((k.metric, k.aggregation) for k in measures if k.metric in CHOICES):
        everyone = measures[Key("pass", 1)]
        curve = {1: everyone} | {n: v for (name, n, how), v in measures.items() if (name, how) == (metric, aggregation)}
        means = {n: np.mean(list(v.values()), 0)[0] for n, v in curve.items() if len(v) == len(everyone)}
        if len(means) > 3:  # more points than the fit has parameters
            fit = saturation(list(means), list(means.values()))
            for name, value in (("limit", fit.limit), ("n95", fit.n95)):
                yield Row(
                    result.name, f"{metric} {name}", None, aggregation, value, math.nan, math.nan, len(everyone), of,
                    verdict=verdict,
                )  # fmt: skip


@lru_cache(4)
def _weights(questions: int, resamples: int, seed: int) -> Array:
    """[R, Q] share of each question in a resample."""
    drawn = np.random.default_rng(seed).multinomial(questions, np.full(questions, 1 / questions), resamples)
    return drawn / questions


def _bootstrap(values: Array, resamples: int, seed: int) -> Metric:
    """Mean over questions, and the interval of it from as many drawn with replacement."""
    low, high = np.quantile(_weights(len(values), resamples, seed) @ values, (0.025, 0.975))
    return Metric(float(values.mean()), float(low), float(high))
