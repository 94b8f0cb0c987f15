"""As many candidates as a question turns out to need."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ..selection import VoteRule, select
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
        if any(len(q.candidates) < n for q in questions):
            raise ValueError(f"n={n}: a question has fewer candidates; calibrate on as many as are to be drawn at the most")
        score, outcome, answer, owner = map(np.array, judged(questions, right))
        rng, rule = np.random.default_rng(0), VoteRule(chosen.exponent, chosen.growth)
        orders = np.array([rng.permutation(np.flatnonzero(owner == q))[:n] for q in range(len(questions)) for _ in range(_ORDERS)])
        waves = []
        for k in sizes(min(first, n), n):
            rows = orders[:, :k].ravel()
            waves.append((score[rows].reshape(-1, k).max(1), select(score[rows], outcome[rows], answer[rows], k, rule)["select"]))
        table = np.array(waves).transpose(2, 0, 1)  # [questions orders, waves, (best score, outcome)]
        target = table[:, -1, 1].mean() - loss
        for enough in _ENOUGH:
            reached = (table[:, :, 0] >= enough) | (np.arange(table.shape[1]) == table.shape[1] - 1)
            at = reached.argmax(1)
            if table[np.arange(len(table)), at, 1].mean() >= target:
                break
        else:
            enough = 1.0
        return cls(n=n, exponent=chosen.exponent, growth=chosen.growth, enough=enough, first=first, loss=loss, questions=len(questions))


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

