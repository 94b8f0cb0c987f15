"""What the ops are measured against: the same written in PyTorch, for eager use and for ``torch.compile``, and the published
pipeline's way. Each does what its op's formula says and no more: no thinking tags, padding, scope, step log or hash.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from reflective.kernels import layout
from reflective.kernels.layout import LOG_FLOOR, NEXT_STATE, STEP
from reflective.kernels.logit_rows import ACTIVATIONS


def in_one_dtype(head: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """``w1, b1, w2, b2`` as PyTorch uses them with features of ``dtype``: all weights of that dtype.

    The definition of a float8 head works in float32 throughout, which tensor cores do not; what it is compared with in 16 bits
    is this. Any power of two can be moved between the layers, here so that float16 has room for all of them.
    """
    w1, b1, w2, b2 = (t.float() for t in head)
    if head[0].dtype == torch.float8_e4m3fn:
        w1, b1, w2 = w1 * 2**-8, b1 * 2**-8, w2 * 2**8
    return [t.to(dtype) for t in (w1, b1, w2, b2)]


def logit_rows(
    features: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: int | None = layout.RELU
) -> Tensor:
    """``w2 . act(W1 f + b1) + b2`` [M] float32; with ``activation`` None, of a linear head, whose second unit is the first one
    negated, ``W1[0] . f + b1[0]``. A float8 ``W1`` is widened to the features' dtype first.
    """
    if activation is None:
        return F.linear(features, w1[:1], b1[:1]).squeeze(-1).float()
    if w1.dtype == features.dtype:
        z = F.linear(features, w1, b1)
    else:
        z = F.linear(features, w1.to(features.dtype)).to(b1.dtype) + b1
    return F.linear(ACTIVATIONS[activation](z), w2, b2).squeeze(-1).float()


def score_rows(
    features: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: int | None = layout.RELU
) -> Tensor:
    """``max(logsigmoid(logit), ln 1e-10)`` [M] float32."""
    return F.logsigmoid(logit_rows(features, w1, b1, w2, b2, activation)).clamp_min(LOG_FLOOR)


def logit_rows_cublas(features: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """``logit_rows`` with bias and ReLU in the first product's epilogue, by cuBLAS on a GPU. All of one dtype."""
    return F.linear(torch._addmm_activation(b1, features, w1.t()), w2, b2).squeeze(-1).float()


def score_rows_cublas(features: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """``score_rows`` by ``logit_rows_cublas``."""
    return F.logsigmoid(logit_rows_cublas(features, w1, b1, w2, b2)).clamp_min(LOG_FLOOR)


def published_score_rows(states: Tensor, is_step: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Step scores in (0, 1), the head's dtype, of the rows picked out of a finished text's states ``[T, H]``.

    The last lines of ``reflective.published.second_pass``: the forward that makes ``states`` comes on top.
    """
    return F.linear(F.relu(F.linear(states[is_step], w1, b1)), w2, b2).squeeze(-1).sigmoid()


def decode_step(
    ids: Tensor, hidden: Tensor, token_class: Tensor, transition: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
    state: Tensor, column: Tensor, last_hidden: Tensor, n_steps: Tensor, log_sum: Tensor,
    activation: int | None = layout.RELU,
) -> None:  # fmt: skip
    """One immediate step at ``at="predict"``: detect by table, pick the rows that end a step, score them.

    ids: [B, 1]; hidden: [B, 1, H]. Mutated: state, n_steps: [B] int64; column: [] int64; last_hidden: [B, H]; log_sum: [B].
    """
    is_step = _detect(ids, token_class, transition, state, column, n_steps)
    if is_step.any():
        scores = score_rows(last_hidden[is_step], w1, b1, w2, b2, activation)
        log_sum.index_add_(0, is_step.nonzero().squeeze(1), scores.double())
    last_hidden.copy_(hidden[:, 0])


def decode_step_masked(
    ids: Tensor, hidden: Tensor, token_class: Tensor, transition: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
    state: Tensor, column: Tensor, last_hidden: Tensor, n_steps: Tensor, log_sum: Tensor,
    activation: int | None = layout.RELU,
) -> None:  # fmt: skip
    """``decode_step`` without data-dependent shapes, so that it is one graph: every row goes through the head each time."""
    is_step = _detect(ids, token_class, transition, state, column, n_steps)
    log_sum += score_rows(last_hidden, w1, b1, w2, b2, activation).double().where(is_step, 0.0)
    last_hidden.copy_(hidden[:, 0])


def decode_step_deferred(
    ids: Tensor, hidden: Tensor, token_class: Tensor, transition: Tensor,
    state: Tensor, column: Tensor, last_hidden: Tensor, n_steps: Tensor, slots: Tensor, owner: Tensor, n_slots: Tensor,
) -> None:  # fmt: skip
    """One deferred step: the rows that end a step go to ``slots`` [R + 1, H], their sequences to ``owner`` [R + 1].

    Every row is written, those of no step to the last line: nothing depends on the data but what lands where.
    """
    is_step = _detect(ids, token_class, transition, state, column, n_steps)
    place = torch.where(is_step, n_slots + is_step.cumsum(0) - 1, len(slots) - 1)
    slots.index_copy_(0, place, last_hidden)
    owner.index_copy_(0, place, torch.arange(len(place), device=place.device))
    n_slots += is_step.sum()
    last_hidden.copy_(hidden[:, 0])


def flush(w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, slots: Tensor, owner: Tensor, log_sum: Tensor) -> None:
    """The waiting rows ``slots`` [n, H] scored and added to ``log_sum`` [N] of their sequences ``owner`` [n]."""
    log_sum.index_add_(0, owner, score_rows(slots, w1, b1, w2, b2).double())


def flush_cublas(w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, slots: Tensor, owner: Tensor, log_sum: Tensor) -> None:
    """``flush`` by ``score_rows_cublas``."""
    log_sum.index_add_(0, owner, score_rows_cublas(slots, w1, b1, w2, b2).double())


def tally_slots(logits: Tensor, b2: Tensor, owner: Tensor, log_sum: Tensor) -> None:
    """``flush`` from the logits on."""
    log_sum.index_add_(0, owner, F.logsigmoid(logits + b2).clamp_min(LOG_FLOOR).double())


def step_mask(ids: Tensor, token_class: Tensor, transition: Tensor) -> Tensor:
    """Step-tokens of one id each, by whole-tensor operations; general automata need a loop over the columns.

    True where a step-token stands, none before it, between think tags that occur once.
    """
    entry = transition[token_class[ids].long(), 0]
    is_step, is_think, is_end = ((entry & flag) != 0 for flag in (STEP, layout.THINK, layout.END))
    T = ids.shape[1]
    column = torch.arange(T, device=ids.device)
    quiet = F.pad(~(is_step | is_think)[:, :-1], (1, 0), value=True)
    first = torch.where(is_think.sum(1) == 1, is_think.int().argmax(1), 0)
    last = torch.where(is_end.sum(1) == 1, is_end.int().argmax(1), T)
    return is_step & quiet & (column >= first[:, None] + 2) & (column <= last[:, None])


def sprm_loss(
    features: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, trajectory: Tensor, outcome: Tensor
) -> Tensor:
    """Dynamically weighted BCE over the rows, averaged within each trajectory and summed over either outcome: [2]."""
    logit = logit_rows(features, w1, b1, w2, b2)
    y = outcome[trajectory]
    keep = ((logit > 0) == (y > 0.5)).float()
    steps = torch.zeros_like(outcome).index_add(0, trajectory, torch.ones_like(y))
    loss = keep / steps[trajectory] * F.binary_cross_entropy_with_logits(logit, y, reduction="none")
    return torch.stack([(loss * (1 - y)).sum(), (loss * y).sum()])


def with_gradients(loss: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """``loss`` and the gradients of ``w1, b1, w2, b2`` by autograd."""

    def run(features: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        head = [w.detach().requires_grad_() for w in rest[:4]]
        with torch.enable_grad():
            sums = loss(features, *head, *rest[4:])
        return sums.detach(), *torch.autograd.grad(sums, head, torch.ones_like(sums))

    return run


def _detect(
    ids: Tensor, token_class: Tensor, transition: Tensor, state: Tensor, column: Tensor, n_steps: Tensor
) -> Tensor:
    entry = transition[token_class[ids[:, 0]], state]
    is_step = ((entry & STEP) != 0) & (column >= 2)
    state.copy_(entry & NEXT_STATE)
    column += 1
    n_steps += is_step
    return is_step
