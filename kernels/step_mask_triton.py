"""step_mask: which tokens of finished ids are step-tokens that count. In Triton; the definition is ``step_mask.py``."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import layout
from .score_rows_triton import OPTIONS

NEXT_STATE, STEP, THINK, END = map(tl.constexpr, (layout.NEXT_STATE, layout.STEP, layout.THINK, layout.END))


@triton.jit(do_not_specialize=["T", "V", "n_states", "ids_b", "ids_t"])
def _step_mask(
    ids, token_class, transition, pad, length, start, mask, T, V, n_states, ids_b, ids_t, BLOCK_T: tl.constexpr
):  # fmt: skip
    """``mask[t] = step(t) and t in scope and a + 2 <= t <= e`` for one sequence a program: a pass of the automaton that notes
    ``step(t)`` and the tags, then a pass over the mask once ``a`` and ``e`` are known. An id outside the vocabulary is no step.

    ids: [B, T] int64 with its strides; token_class: [V], transition: [n_classes, n_states] int32; pad, length, start: [B]
    int64; mask: [B, T] int8.
    """
    b = tl.program_id(0).to(tl.int64)
    # Columns fit 32 bits, which halves the registers; start may also say never.
    begin = tl.load(pad + b).to(tl.int32)
    end = tl.minimum(tl.load(length + b).to(tl.int32), T)
    out = mask + b * T
    ids_t = tl.cast(ids_t, tl.int64)
    state, n_think, n_end = tl.zeros((), tl.int32), tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    think_at, end_at = begin, end
    for t in range(begin, end):
        token = tl.load(ids + b * ids_b + t * ids_t)
        known = (token >= 0) & (token < V)
        token_row = transition + tl.load(token_class + token, mask=known, other=0).to(tl.int64) * n_states
        entry = tl.load(token_row + state, mask=known, other=0)
        tl.store(out + t, ((entry & STEP) != 0).to(tl.int8))
        think_at = tl.where((entry & THINK) != 0, t, think_at)
        end_at = tl.where((entry & END) != 0, t, end_at)
        n_think += ((entry & THINK) != 0).to(tl.int32)
        n_end += ((entry & END) != 0).to(tl.int32)
        state = entry & NEXT_STATE
    tl.debug_barrier()  # the marks are read below by other threads than wrote them

    scope = tl.minimum(tl.load(start + b), 2**31 - 1).to(tl.int32)
    low = tl.maximum(tl.where(n_think == 1, think_at, begin) + 2, scope)
    high = tl.minimum(tl.where(n_end == 1, end_at, end), end - 1)
    for first in range(0, T, BLOCK_T):
        column = first + tl.arange(0, BLOCK_T)
        is_step = tl.load(out + column, mask=(column >= low) & (column <= high), other=0)
        tl.store(out + column, is_step, mask=column < T)


def step_mask(
    ids: Tensor, token_class: Tensor, transition: Tensor, pad: Tensor, length: Tensor, start: Tensor
) -> Tensor:
    """True at ``t`` where a step ends, ``a + 2 <= t <= e`` and ``t`` is in scope. Arguments as in the definition."""
    B, T = ids.shape
    mask = torch.empty(B, T, dtype=torch.bool, device=ids.device)
    with torch.cuda.device_of(ids):
        _step_mask[(B,)](
            ids, token_class, transition, pad, length, start, mask.view(torch.int8), T, len(token_class), transition.shape[1],
            *ids.stride(), BLOCK_T=1024, **OPTIONS,
        )  # fmt: skip
    return mask
