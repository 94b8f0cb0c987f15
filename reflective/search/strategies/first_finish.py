"""First finish: the shortest response wins."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..stopped import STOPPED
from . import KEEP, STOP, Step, Strategy, eligible

if TYPE_CHECKING:
    from ..results import Candidate


@dataclass
class FirstFinish(Strategy):
    """Answer: ``argmin_i length_i`` over n independent candidates, all stopped as soon as one has ended by itself.

    Source: Agarwal et al., First Finish Search, arXiv 2505.18149, the synchronous variant. Where several end with the same
    token, which it leaves open, the higher score wins, and of those without a step the likelier; a candidate cut at ``max_new_tokens`` has not finished.
    """

    name: ClassVar[str] = "first_finish"
    about: ClassVar[str] = "All are stopped as soon as one has finished, and that is the answer."
    stops: ClassVar[str] = STOPPED["first_finish"]

    def observe(self, step: Step) -> Sequence[int] | None:
        if any(c.finished == "stop" for c in step.candidates):
            return [KEEP if c.finished else STOP for c in step.candidates]
        return None

    def choose(self, candidates: "Sequence[Candidate]") -> int:
        def order(i: int) -> tuple[bool, int, tuple[int, float], int]:
            c = candidates[i]
            return c.status == "stop", -len(c.token_ids), self.standing(c), -i

        return max(eligible(candidates), key=order)
