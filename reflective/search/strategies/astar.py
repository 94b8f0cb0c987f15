"""A*-decoding."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from ...scoring.scores import aggregate
from ..stopped import STOPPED
from . import HOLD, KEEP, SCORED, STOP, Live, Step, Strategy, eligible

if TYPE_CHECKING:
    from ..results import Candidate


@dataclass
class AStar(Strategy):
    """Expand first the prefix with the least ``f = g + h``: ``h = 1 - r``, ``g = sum_i max(0, r_{i-1} - r_i)``.

    ``r_i`` is the score after step i, ``g`` the sum of all its falls. The frontier is every prefix that ends with a step
    and waits. The best is continued ``branch`` times; when the best has finished it is the answer.

    Source: Chatziveroglou, A*-Decoding: Token-Efficient Inference Scaling, arXiv 2505.13672, with ``h`` as there and ``g``
    as a later survey describes it (increases of h only). The paper's own values of the settings below were not at hand;
    these are this package's, and so are the bound on the frontier, whose prefixes all keep their caches, and what follows
    the last expansion: the best finished candidate is taken, or else the best prefix decoded to its end.

    Attributes:
        branch: continuations of an expanded prefix.
        expand: prefixes expanded at once, the best first; more than one fills a batch.
        expansions: in all.
        frontier: prefixes kept, at most.
    """

    name: ClassVar[str] = "astar"
    about: ClassVar[str] = "Always forks the most promising beginning; the others wait."
    stops: ClassVar[str] = STOPPED["astar"]
    by_step: bool = True
    aggregation: str = "last"
    branch: int = 4
    expand: int = 1
    expansions: int = 32
    frontier: int = 64
    _expanded: int = field(default=0, init=False, repr=False)

    def observe(self, step: Step) -> Sequence[int] | None:
        candidates = step.candidates
        order = sorted(range(len(candidates)), key=lambda i: (*self._order(candidates[i]), i))
        spent = self._expanded >= self.expansions
        actions = [KEEP if c.finished else STOP for c in candidates]
        if candidates[order[0]].finished or (
            spent and any(c.finished and self._order(c)[0] == -SCORED for c in candidates)
        ):
            return actions
        if spent:
            actions[order[0]] = KEEP
            return actions
        for rank, i in enumerate(order[: self.frontier]):
            if not candidates[i].finished:
                actions[i] = self.branch if rank < self.expand else HOLD
                self._expanded += rank < self.expand
        return actions

    def choose(self, candidates: "Sequence[Candidate]") -> int:
        """The finished candidate with the least f; one without a step only where none has any."""
        first: dict[tuple[int, ...], tuple[int, float]] = {}  # as in ``standings``
        orders = [first.setdefault(tuple(c.token_ids), self._order(c)) for c in candidates]
        best = min(eligible(candidates), key=orders.__getitem__)
        if self.standing(candidates[best])[0] != SCORED:
            return super().choose(candidates)
        self.chosen_by = "score"
        return best

    def _order(self, candidate: "Candidate | Live") -> tuple[int, float]:
        """One without a step stands behind all that have some."""
        return -self.standing(candidate)[0], self.cost(candidate)

    def cost(self, candidate: "Candidate | Live") -> float:
        """f; 1 without a step, infinite where a step has no score."""
        scores = candidate.step_scores
        if self.value(candidate) < 0:
            return float("inf")
        reward = [aggregate(scores[: k + 1], self.aggregation) for k in range(len(scores))] or [0.0]
        return sum(max(0.0, a - b) for a, b in itertools.pairwise(reward)) + 1 - reward[-1]
