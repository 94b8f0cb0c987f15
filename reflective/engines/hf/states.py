"""States that are assigned by hand, for loops that stop, fork or rest sequences or take in more of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...scoring.scores import step_scores
from .prompts import left_padding
from .stream import Stream


class States:
    """Which rows of the stream's state are trajectories, and which of them the next forward belongs to.

    The methods are those of ``StreamScorer``, where they are described.

    Attributes:
        assigned: states [B] int32 of the sequences of a forward; None where they were not assigned.
        prompts: whether the next forwards are of nothing but the prompts of those assigned, by what the caller said.
        n: how many states there are.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.assigned: Tensor | None = None
        self.prompts = False
        self.n = 0
        self._free: list[int] = []  # which of them may be used again

    def begin(self, n: int) -> None:
        """A generation of ``n`` sequences begins, which are states 0 to n-1."""
        self.assigned, self.prompts, self.n, self._free = None, False, n, []

    def unassign(self) -> None:
        """Sequences are those of one batch again."""
        self.assigned, self.prompts = None, False

    def check(self, n: int) -> None:
        """Raise RuntimeError unless a forward of ``n`` sequences is one of the states assigned."""
        if n != len(self.assigned):
            raise RuntimeError(f"this forward has {n} sequences, but {len(self.assigned)} states are assigned")

    def admit(self, input_ids: Tensor, attention_mask: Tensor | None) -> list[int]:
        pad = left_padding(input_ids, attention_mask, self._stream.backbone.device)
        rows = self._new(len(pad))
        self._stream.restart(rows, pad, input_ids.shape[1])
        return rows

    def fork(self, rows: Sequence[int]) -> list[int]:
        new, device = self._new(len(rows)), self._stream.backbone.device
        self._stream.state.put(torch.tensor(new, device=device), torch.tensor(list(rows), device=device))
        return new

    def _new(self, n: int) -> list[int]:
        stream = self._stream
        if stream.state is not None:
            stream.settle()
        reused = self._free[:n]
        del self._free[:n]
        rows = [*reused, *range(self.n, self.n + n - len(reused))]
        self.n = max([self.n, *(row + 1 for row in rows)])
        room = 0 if stream.state is None else len(stream.state.seq)
        if self.n > room:
            stream.allocate(max(self.n, 2 * room))
        return rows

    def assign(self, rows: Sequence[int], prompts: bool) -> None:
        if self._stream.record_features:
            raise ValueError("record_features=True records the sequences of a plain generation; leave assign out")
        if not all(0 <= row < self.n for row in rows) or len(set(rows)) < len(rows):
            raise ValueError(f"rows={list(rows)}: expected different states, each below {self.n}")
        rows = torch.tensor(list(rows), dtype=torch.int32)
        self.assigned = rows.to(self._stream.backbone.device, non_blocking=True)
        self.prompts = prompts

    def assign_as(self, rows: Tensor) -> None:
        self.assigned, self.prompts = rows, False

    def release(self, rows: Sequence[int]) -> None:
        self._free += rows

    def counts(self) -> list[int]:
        if self._stream.schedule == "deferred":
            self._stream.settle()
        return self._stream.state.counts()[: self.n]

    def step_scores(self, row: int) -> list[float]:
        return step_scores(self._stream.state.sequences([row])[0].log_scores, self._stream.placed.head.sigmoid).tolist()
