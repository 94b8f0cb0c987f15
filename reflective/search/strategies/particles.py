"""Particle filtering."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ...scoring.scores import FLOOR
from ..stopped import STOPPED
from . import Step, Strategy


@dataclass
class Particles(Strategy):
    """After every step: ``weights = softmax_i(logit(score_i) / temperature)``, then n particles are drawn by them.

    Particles that have finished are drawn along with the others. The answer is the particle with the highest score.

    Source: Puri et al., A Probabilistic Inference Approach to Inference-Time Scaling of LLMs using Particle-Based Monte
    Carlo Methods, arXiv 2502.01618, and its code: temperature 1; the reward of a prefix is one number that its model gives
    for the whole prefix, which here is the last step's score, as that is read from a state that has seen all before it.
    Deviation: systematic in place of multinomial resampling, so a particle's count is within 1 of ``n * weight``.

    Attributes:
        temperature: of the softmax; higher keeps more of the unlikely.
    """

    name: ClassVar[str] = "particles"
    about: ClassVar[str] = "After every step candidates are drawn anew, by their scores."
    stops: ClassVar[str] = STOPPED["particles"]
    by_step: bool = True
    aggregation: str = "last"
    temperature: float = 1.0

    def observe(self, step: Step) -> Sequence[int] | None:
        if all(c.finished for c in step.candidates):
            return None
        scores = [min(max(self.value(c), FLOOR), 1 - FLOOR) for c in step.candidates]
        logits = np.array([math.log(s / (1 - s)) / self.temperature for s in scores])
        return systematic(np.exp(logits - logits.max()), len(scores), step.rng.random())


def systematic(weights: np.ndarray, n: int, offset: float) -> list[int]:
    """How often each of ``weights`` [N] >= 0 is hit by the n points ``(offset + k) / n`` of the unit interval.

    ``offset``: uniform in [0, 1). Count i is ``floor`` or ``ceil`` of ``n * weights_i / sum(weights)``, and that on average.
    """
    ends = np.cumsum(weights)
    hit = np.searchsorted(ends / ends[-1], (offset + np.arange(n)) / n, side="right")
    return np.bincount(hit, minlength=len(weights)).tolist()
