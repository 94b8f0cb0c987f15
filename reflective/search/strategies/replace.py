"""The worst of the running candidates give way to forks of the best."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from ...utils.arguments import whole
from ..stopped import STOPPED
from . import KEEP, STOP, Live, Step
from .votes import WeightedVote


@dataclass
class Replace(WeightedVote):
    """Every ``interval`` tokens ``bottom_swap(running) <- fork(top_swap(running))`` by the score so far; the answer is the weighted vote.

    A check is due when the longest running candidate has ``warmup`` tokens, and ``interval`` more than at the check before. Then

    1. whoever scores less than ``floor`` is stopped;
    2. where fewer than n candidates run or have finished, the best running ones are forked until n do;
    3. where n do, the worst ``swap`` are stopped and the best ``swap`` forked, at most half of those that run.

    Beside that, and at any step: while the running candidates have more than ``memory`` tokens in all, the worst is stopped. Candidates
    without a step are neither stopped nor forked.

    Source: Gambit (arXiv 2608.08020, and its code), whose capacity C is n here, with its check interval, warm-up, hard floor, swap size (there 16 of
    256) and weighted vote. Deviations: n candidates come to an end in all, where it fills places up until as many have; a check falls on the
    next step that ends. ``memory`` is the rule of STEP (arXiv 2601.09093), which stops the worst trace where the cache is full instead of having one
    wait; ``swap=0, memory=...`` is that alone.

    Attributes:
        swap: candidates exchanged at a check; None: an eighth of n, and one at the least.
        interval, warmup: tokens.
        floor: a score.
        memory: tokens of the running candidates, their prompt's not counted; None: any number.
    """

    name: ClassVar[str] = "replace"
    about: ClassVar[str] = "Every few tokens the worst give way to forks of the best; the answer is a vote by scores."
    stops: ClassVar[str] = STOPPED["replace"]
    _weighs: ClassVar[str] = "score"
    swap: int | None = None
    interval: int = 24
    warmup: int = 24
    floor: float = 0.0
    memory: int | None = None
    _checked: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("swap", 0), ("interval", 1), ("warmup", 0), ("memory", 1)):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name), least)
        if not 0 <= self.floor < 1:
            raise ValueError(f"floor={self.floor}: expected a score, from 0 to less than 1")

    def observe(self, step: Step) -> Sequence[int] | None:
        running = [i for i, c in enumerate(step.candidates) if not c.finished]
        if not running:
            return None
        actions = [KEEP] * len(step.candidates)
        ranked = self._ranked(step.candidates, running)
        longest = max(len(step.candidates[i].token_ids) for i in running)
        if longest >= max(self.warmup, self._checked + self.interval):
            self._checked = longest
            self._check(step.candidates, ranked, actions)
        self._fit(step.candidates, running, ranked, actions)
        return actions

    def _ranked(self, candidates: Sequence[Live], running: list[int]) -> list[int]:
        """Those with a step, the best first, of equals the first."""
        return sorted((i for i in running if candidates[i].step_scores), key=lambda i: -self.value(candidates[i]))

    def _check(self, candidates: Sequence[Live], ranked: list[int], actions: list[int]) -> None:
        there = [i for i in ranked if self.value(candidates[i]) >= self.floor] or ranked[:1]
        for i in ranked[len(there) :]:
            actions[i] = STOP
        free = self.n - (len(candidates) - (len(ranked) - len(there)))
        if not there:
            return
        if free > 0:
            for k in range(free):
                actions[there[k % len(there)]] += 1
            return
        swap = max(1, self.n // 8) if self.swap is None else self.swap
        for k in range(min(swap, len(there) // 2)):
            actions[there[k]], actions[there[-1 - k]] = 2, STOP

    def _fit(self, candidates: Sequence[Live], running: list[int], ranked: list[int], actions: list[int]) -> None:
        """Have the running ones, forks included, have no more than ``memory`` tokens; the best with a step stays."""
        if self.memory is None:
            return
        tokens = sum(max(actions[i], 0) * len(candidates[i].token_ids) for i in running)
        for i in reversed(ranked[1:]):
            if tokens <= self.memory:
                return
            tokens -= actions[i] * len(candidates[i].token_ids)
            actions[i] = STOP
