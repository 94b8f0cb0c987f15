"""As many candidates as a question turns out to need."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..selection import Array, VoteRule, select
from . import Step
from .select import Select, judged

if TYPE_CHECKING:
    from ..results import Generation

_ORDERS = 8  # of a question's candidates, in calibration
_ENOUGH = tuple(k / 20 for k in range(2, 20))  # thresholds that are tried


@dataclass
class Auto(Select):
    """Begins with ``first`` candidates, and starts half as many again whenever all have ended and none scores ``enough``, up to n in all; the
    answer is that of ``select``.

    So an easy question costs two responses and a hard one n. Calibration finds the least ``enough`` with which no more than ``loss`` of the
    accuracy of n candidates is given up.

    Source: after Snell et al., Scaling LLM Test-Time Compute Optimally, arXiv 2408.03314, who choose what a question is worth by its difficulty, read
    from a verifier's scores of its first samples, and Aggarwal et al., Let's Sample Step by Step, arXiv 2305.11860, who sample until the answers agree.
    The rule, one score high enough, is this package's.

    Attributes:
        n: candidates at the most.
        enough: a score.
        first: candidates to begin with.
        loss: of accuracy, stated when it was calibrated.
    """

    name: ClassVar[str] = "auto"
    about: ClassVar[str] = "Begins with two, and starts more until one scores high enough."
    file: ClassVar[str] = "auto.json"
    rule: ClassVar[tuple[str, ...]] = ("exponent", "growth", "n", "enough", "first", "loss", "questions")
    n: int = 32
    enough: float = 1.0
    first: int = 2
    loss: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first < 1:
            raise ValueError(f"first={self.first}: at least one candidate is needed")

    @property
    def begins_with(self) -> int:
        return min(self.first, self.n)

    def observe(self, step: Step) -> Sequence[int] | None:
        if all(c.finished for c in step.candidates) and max(map(self.value, step.candidates)) < self.enough:
            there = len(step.candidates)
            step.fresh = min(grown(there), self.n) - there
        return None

    @classmethod
    def calibrate(
        cls, questions: Iterable["Generation"], right: Sequence[str], n: int = 32, loss: float = 0.01, first: int = 2
    ) -> "Auto":
        """The rule that spends least of those that lose no more than ``loss`` of the accuracy of ``select`` with n candidates.

        Args:
            questions, right: as for ``Select.calibrate``, with n candidates each at least.

        Raises:
            ValueError: see ``Select.calibrate``; a question with fewer than n candidates.
        """
        questions = list(questions)
        chosen = Select.calibrate(questions, right, n)
        return cls.fit(*judged(questions, right), VoteRule(chosen.exponent, chosen.growth), n=n, loss=loss, first=first)

    @classmethod
    def fit(
        cls, score: ArrayLike, right: ArrayLike, answer: ArrayLike, question: ArrayLike, rule: VoteRule, *, n: int = 32, loss: float = 0.01,
        first: int = 2,
    ) -> "Auto":  # fmt: skip
        """``calibrate`` on what ``selection.fit_vote_rule`` takes, with the ``rule`` that votes.

        Raises:
            ValueError: a question with fewer than n candidates.
        """
        best, outcome, questions = waves(score, right, answer, question, rule, n, first)
        target = outcome[:, -1].mean() - loss
        enough = next((e for e in _ENOUGH if outcome[ended(best, e)].mean() >= target), 1.0)
        return cls(n=n, exponent=rule.exponent, growth=rule.growth, enough=enough, first=first, loss=loss, questions=questions)

    def spends(self, score: ArrayLike, right: ArrayLike, answer: ArrayLike, question: ArrayLike) -> tuple[Array, Array]:
        """``(accuracy, candidates)`` [Q]: the mean outcome of every question and how many candidates it takes; arguments as for ``fit``."""
        best, outcome, questions = waves(score, right, answer, question, VoteRule(self.exponent, self.growth), self.n, self.first)
        at = ended(best, self.enough)
        drawn = np.array(list(sizes(min(self.first, self.n), self.n)))[at[1]]
        return outcome[at].reshape(questions, -1).mean(1), drawn.reshape(questions, -1).mean(1)


def waves(
    score: ArrayLike, right: ArrayLike, answer: ArrayLike, question: ArrayLike, rule: VoteRule, n: int, first: int
) -> tuple[Array, Array, int]:
    """``(best score, outcome of select)`` [Q orders, waves] after each wave, in some orders of every question's candidates, and Q."""
    score, right, answer, question = map(np.asarray, (score, right, answer, question))
    rng, own = np.random.default_rng(0), [np.flatnonzero(question == q) for q in np.unique(question)]
    if any(len(rows) < n for rows in own):
        raise ValueError(f"n={n}: a question has fewer candidates; calibrate on as many as are to be drawn at the most")
    orders = np.array([rng.permutation(rows)[:n] for rows in own for _ in range(_ORDERS)])
    best, outcome = [], []
    for k in sizes(min(first, n), n):
        rows = orders[:, :k].ravel()
        best.append(score[rows].reshape(-1, k).max(1))
        outcome.append(select(score[rows], right[rows], answer[rows], k, rule)["select"])
    return np.array(best).T, np.array(outcome).T, len(own)


def ended(best: Array, enough: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Index of the wave that is the last one, of every order."""
    reached = best >= enough
    reached[:, -1] = True
    return np.arange(len(best)), reached.argmax(1)


def grown(n: int) -> int:
    """Half as many again."""
    return math.ceil(1.5 * n)


def sizes(first: int, n: int) -> Iterator[int]:
    """How many candidates there are after each wave, up to n."""
    while True:
        yield first
        if first >= n:
            return
        first = min(grown(first), n)

