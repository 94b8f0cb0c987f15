"""The head on the model's device: all of it, or, where the model is tensor parallel, a part of its units on every rank."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from typing_extensions import Self

from ..kernels import layout
from ..kernels.score_rows import log_score
from .backend import NAMES, Backend, choose_backend
from .heads import Head
from .state import StreamState

# What the ops call the activations of heads, by their names there.
ACTIVATIONS = {"relu": layout.RELU, "gelu": layout.GELU, "gelu_tanh": layout.GELU_TANH, "silu": layout.SILU}
Weights = tuple[Tensor, Tensor, Tensor, Tensor]


ALIGN = 8  # rows of features have a multiple of so many values: on a GPU, of 16 bytes


def aligned(width: int) -> int:
    """The width of features [M, width] as the ops take them, with zeros at the end."""
    return -(-width // ALIGN) * ALIGN


def units(width: int, rank: int, world: int) -> slice:
    """Which of ``width`` units are those of ``rank``: ``[width rank // world, width (rank + 1) // world)``.

    Raises:
        ValueError: fewer units than ranks, or a process that is no rank of the group.
    """
    if rank < 0:
        raise ValueError("process_group: this process does not belong to it")
    if width < world:
        raise ValueError(f"process_group: {world} ranks for a head of {width} units; each rank needs at least one")
    return slice(width * rank // world, width * (rank + 1) // world)


def shard(weights: Weights, rank: int, world: int) -> Weights:
    """The units of ``rank``: rows of ``w1`` with their ``b1`` and ``w2``. ``b2`` is nobody's part: all ranks have it.

    ``logit_rows`` of the shards, without ``b2``, add up to that of the whole head.
    """
    w1, b1, w2, b2 = weights
    part = units(len(w1), rank, world)
    return w1[part], b1[part], w2[:, part], b2


class ShardedHead:
    """``head`` as the ops take it. With a process group every rank keeps the ``shard`` that is its own, and

        logit(f) = sum over ranks (w2 . act(W1 f + b1)) + b2

    is one all-reduce of a float a row. All ranks must make the same calls with as many rows, and get the same bits.

    Args:
        head: read by ``load``.
        device, dtype: of the hidden states.
        backend: its name, or None for the first that runs. Ranks that do not choose alike take the most portable of their choices.
        w1_dtype: see ``Head.weights``.
        group: the ranks that the model's work is split over; each must hold the whole hidden states.

    Attributes:
        weights: on that device; empty before ``load``.
        activation: the head's, as the ops take it.

    Raises:
        ValueError: see ``choose_backend``, ``units`` and ``SPRM.w1_dtype``.
    """

    def __init__(
        self, head: Head, device: torch.device, dtype: torch.dtype, backend: str | None, w1_dtype: torch.dtype | None,
        group: ProcessGroup | None,
    ) -> None:  # fmt: skip
        self.head, self.device, self.w1_dtype, self.group = head, device, w1_dtype, group
        self.activation: int = ACTIVATIONS[head.activation]
        self.rank, self.world = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        units(head.width, self.rank, self.world)  # raises, where it cannot be split
        w1_dtype = head.w1_dtype(w1_dtype)  # the choice depends on it alone; the weights are read when they are needed
        self.backend: Backend = choose_backend(backend, self.device, dtype, w1_dtype)
        if group is not None:
            choice = torch.tensor(NAMES.index(self.backend.name), device=self.device)
            dist.all_reduce(choice, dist.ReduceOp.MAX, group)
            self.backend = choose_backend(NAMES[int(choice)], self.device, dtype, w1_dtype)
        self.weights: tuple[Tensor, ...] = ()
        self._own: list[bool] = []  # which of them are copies, and not the head's parameters themselves

    def load(self) -> Self:
        """Read the head's weights. They stay where they are: a CUDA graph may have captured them."""
        w1, *rest = self.head.weights(self.w1_dtype)
        if missing := aligned(w1.shape[1]) - w1.shape[1]:  # what is read has zeros there
            w1 = F.pad(w1.float(), (0, missing)).to(w1.dtype)
        mine = shard((w1, *rest), self.rank, self.world)
        # A copy, or what belongs to other ranks would stay on the device as long as a view of it.
        read = tuple(w.to(self.device, copy=self.world > 1).contiguous() for w in mine)
        if len(self.weights) == len(read) and all(map(self._takes, self.weights, self._own, read)):
            return self
        parameters = {p.data_ptr() for p in self.head.parameters()}
        self.weights, self._own = read, [w.data_ptr() not in parameters for w in read]
        return self

    @staticmethod
    def _takes(old: Tensor, own: bool, new: Tensor) -> bool:
        """Whether ``old`` is, or by now has, what ``new`` has."""
        if old.data_ptr() == new.data_ptr() and old.shape == new.shape and old.dtype == new.dtype:
            return True
        alike = (old.shape, old.dtype, old.device) == (new.shape, new.dtype, new.device)
        if own and alike:
            old.copy_(new)
        return own and alike

    def score_rows(self, features: Tensor) -> Tensor:
        """The op of this name: log-scores [M] of ``features`` [M, H]."""
        if self.group is None:
            return self.backend.score_rows(features, *self.weights, self.activation)
        logits = self._logits(features)
        return log_score(logits + self.weights[3].to(logits.dtype))

    def flush(self, state: StreamState, rows: int) -> None:
        """The op of this name. ``rows``: no more than these wait in the buffer, on any rank.

        A part of the head does not know how many really wait, because the host does not: it takes the first ``rows`` slots,
        whatever is in the unused ones.
        """
        if self.group is None:
            self.backend.flush(*self.weights, *state.buffer(), self.activation)
        elif rows:
            tally, step_score, slots, slot_owner, n_slots, _ = state.buffer()
            logits = self._logits(slots[:rows])
            self.backend.tally_slots(logits, self.weights[3], tally, step_score, slot_owner[:rows], n_slots)

    def _logits(self, features: Tensor) -> Tensor:
        """[M], without ``b2``."""
        logits = self.backend.logit_rows(features, *self.weights[:3], None, self.activation)
        dist.all_reduce(logits, group=self.group)
        return logits
