"""Beam search over reasoning steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..stopped import STOPPED
from . import KEEP, STOP, Step
from .tree import TreeSearch


@dataclass
class StepBeam(TreeSearch):
    """After every step: ``beams <- top_{n/width} by score``, each continued ``width`` times, so that n run again.

    Beams that finish are put aside; the search ends with n of them, or when none runs any more. Where ``width`` does not
    divide n, some of the best are continued once more than the others.

    Source: Beeching, Tunstall and Rush, Scaling test-time compute with open models (2024), huggingface/search-and-learn
    ``beam_search``: width 4, the last step's score, at most 40 rounds, after which the beams decode to their ends.

    Attributes:
        width: M, continuations of a beam that is kept.
        rounds: of selection, at most.
    """

    name: ClassVar[str] = "step_beam"
    about: ClassVar[str] = "After every step the best are kept and forked, in one tree."
    stops: ClassVar[str] = STOPPED["step_beam"]

    def observe(self, step: Step) -> Sequence[int] | None:
        running = [i for i, c in enumerate(step.candidates) if not c.finished]
        actions = [KEEP if c.finished else STOP for c in step.candidates]
        if len(step.candidates) - len(running) >= self.n:
            return actions
        if self.over() or not running:
            return None
        running.sort(key=lambda i: -self.value(step.candidates[i]))
        kept = running[: max(1, self.n // self.width)]
        for rank, i in enumerate(kept):
            actions[i] = self.n // len(kept) + (rank < self.n % len(kept))
        return actions
