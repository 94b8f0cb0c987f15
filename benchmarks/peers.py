"""What ``decode_step`` is measured against: the same step written in PyTorch, eager and under ``torch.compile``."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from reflective.kernels.layout import LOG_FLOOR, NEXT_STATE, STEP


class Expression:
    """One decode step, immediate schedule, ``at="predict"``, as one writes it without kernels.

    Vectorised over the batch: detect by table, gather the rows that end a step, ``log_sum += logsigmoid(head(rows))``.
    It does less than the op: no thinking tags, padding, scope, step log, minimum or hash.

    Attributes: ``log_sum`` [B] float64 and ``n_steps`` [B] int64 are its results.
    """

    def __init__(
        self, batch: int, token_class: Tensor, transition: Tensor, head: tuple[Tensor, ...], *, compiled: bool = False
    ) -> None:
        self.token_class, self.transition, self.head = token_class, transition, head
        self.state = torch.zeros(batch, dtype=torch.int64)
        self.column = torch.zeros((), dtype=torch.int64)
        self.last_hidden = torch.zeros(batch, head[0].shape[1], dtype=head[0].dtype)
        self.log_sum = torch.zeros(batch, dtype=torch.float64)
        self.n_steps = torch.zeros(batch, dtype=torch.int64)
        self._step: Callable[[Tensor, Tensor], None] = (
            torch.compile(self._masked, fullgraph=True) if compiled else self._gathered
        )

    @torch.no_grad()
    def __call__(self, ids: Tensor, hidden: Tensor) -> None:
        """``ids`` [B, 1] and the states [B, 1, H] that they produced."""
        self._step(ids, hidden)

    def _detect(self, ids: Tensor) -> Tensor:
        entry = self.transition[self.token_class[ids[:, 0]], self.state]
        is_step = ((entry & STEP) != 0) & (self.column >= 2)
        self.state.copy_(entry & NEXT_STATE)
        self.column += 1
        self.n_steps += is_step
        return is_step

    def _score(self, features: Tensor) -> Tensor:
        w1, b1, w2, b2 = self.head
        logit = F.linear(F.relu(F.linear(features, w1, b1)), w2, b2).squeeze(1)
        return F.logsigmoid(logit.float()).clamp_min(LOG_FLOOR).double()

    def _gathered(self, ids: Tensor, hidden: Tensor) -> None:
        is_step = self._detect(ids)
        if is_step.any():
            self.log_sum.index_add_(0, is_step.nonzero().squeeze(1), self._score(self.last_hidden[is_step]))
        self.last_hidden.copy_(hidden[:, 0])

    def _masked(self, ids: Tensor, hidden: Tensor) -> None:
        """Without data-dependent shapes, so that it is one graph: every row goes through the head at every step."""
        is_step = self._detect(ids)
        self.log_sum += self._score(self.last_hidden).where(is_step, 0.0)
        self.last_hidden.copy_(hidden[:, 0])
