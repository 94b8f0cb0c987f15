"""``prune`` without a host: a candidate that lags behind its group is told to end, by the device, in the step after.

The rule is that of ``search.strategies.prune``; every rank of a tensor-parallel model has the same states and decides alike.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...scoring.state import StreamState

GROUPS = 4096  # names to remember, newest first


@dataclass(frozen=True)
class PruneRule:
    """A candidate is stopped at its k-th step if ``max_j S_j(k) - S_i(k) > threshold``, S being mean log-scores and ``k >= min_steps``."""

    threshold: float
    min_steps: int = 1


class Pruning:
    """
    Compared are requests of one group that have k steps, or have ended by themselves with fewer; not those that were pruned before. Who was
    stopped by a text counts with the steps that it has, and who was preempted with those from its return on: fewer comparisons stop fewer, so
    the rule's promise stands.

    Attributes:
        stop: [rows], those that are to end.
    """

    def __init__(self, rule: PruneRule, rows: int, max_steps: int, ends: Sequence[int], device: torch.device) -> None:
        self.rule, self._rows, self._ends = rule, rows, torch.tensor(sorted(ends), device=device)
        # One row more, into which goes what belongs to none.
        self._group, self._count = torch.zeros(2, rows + 1, dtype=torch.int64, device=device)
        self._final, self.stop = torch.zeros(2, rows + 1, dtype=torch.bool, device=device)
        self._sums = torch.zeros(
            rows + 1, max_steps + 1, dtype=torch.float64, device=device
        )  # of the first k log-scores
        self._every = torch.arange(rows + 1, device=device)
        self._numbers: OrderedDict[str, int] = OrderedDict()
        self._last = 0

    def admit(self, row: int, group: str | None) -> None:
        """A request has got ``row``; without a group it is not pruned."""
        if group is not None and group not in self._numbers:
            self._last += 1
            self._numbers[group] = self._last
            if len(self._numbers) > GROUPS:
                self._numbers.popitem(last=False)
        self._group[row] = 0 if group is None else self._numbers[group]
        self._count[row] = 0
        self._sums[row] = -torch.inf  # what lay there was another's; of steps that came before, nothing is known step by step
        self._final[row] = self.stop[row] = False

    def stopped(self, rows: Tensor) -> Tensor:
        """[B] bool, of ``rows`` [B] int32, -1 being none."""
        return self.stop[torch.where(rows >= 0, rows, self._rows).long()] & (rows >= 0)

    def observe(self, state: StreamState, sampled: Tensor, rows: Tensor) -> None:
        """After a step in which ``rows`` [B] int32 were scored and got the tokens ``sampled`` [B]."""
        at = torch.where(rows >= 0, rows, self._rows).long()
        count, log_sum = state.totals(rows.clamp_min(0).long())
        count = count.clamp_max(self._sums.shape[1] - 1)
        self._count[at] = count
        self._sums[at, count] = log_sum.nan_to_num(nan=-torch.inf, neginf=-torch.inf)
        self._final[at] |= torch.isin(sampled, self._ends) & ~self.stop[at]
        k, n = count[:, None], self._count[None]
        same = (self._group[at][:, None] == self._group[None]) & (self._group[at] > 0)[:, None]
        others = (n > 0) & ((n >= k) | self._final[None]) & ~self.stop[None] & (self._every < self._rows)[None]
        compared = same & others
        least = torch.minimum(k, n)
        best = torch.where(compared, self._sums[self._every[None], least] / least.clamp_min(1), -torch.inf).amax(1)
        own = self._sums[at, count] / count.clamp_min(1)
        lags = (count >= self.rule.min_steps) & (best - own > self.rule.threshold)
        self.stop[at] |= lags & (rows >= 0) & ~self._final[at]
