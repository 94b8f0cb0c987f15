"""step_mask: which tokens of finished ids are step-tokens that count. The definition."""

import torch
from torch import Tensor

from .layout import END, NEXT_STATE, STEP, THINK


def step_mask(
    ids: Tensor, token_class: Tensor, transition: Tensor, pad: Tensor, length: Tensor, start: Tensor
) -> Tensor:
    """True at ``t`` where a step ends, ``a + 2 <= t <= e`` and ``t`` is in scope (text indices, without padding).

    ``a`` is the index of the think-start tag if it occurs exactly once, else 0; ``e`` that of the think-end tag if it
    occurs exactly once, else the text's length. Consecutive and leading step-tokens are the automaton's business.

    Args:
        ids: [B, T] int64, of the vocabulary: a compiled kernel raises on another id on a CPU, and on a GPU takes it for no step.
        token_class: [V] int32, the class of every token id.
        transition: [n_classes, n_states] int32, see ``layout.py``.
        pad: [B] int64, columns of left padding.
        length: [B] int64, the column after the last token.
        start: [B] int64, the first column in scope.

    Returns:
        bool [B, T].
    """
    B, T = ids.shape
    column = torch.arange(T, device=ids.device)
    inside = (column >= pad[:, None]) & (column < length[:, None])  # [B, T]
    entry = torch.zeros(B, T, dtype=torch.int64, device=ids.device)
    state = torch.zeros(B, dtype=torch.int64, device=ids.device)
    classes = token_class[ids].long()
    for t in range(T):
        entry[:, t] = transition[classes[:, t], state].long() * inside[:, t]
        state = torch.where(inside[:, t], entry[:, t] & NEXT_STATE, state)

    is_think, is_end = (entry & THINK) != 0, (entry & END) != 0
    first = torch.where(is_think.sum(1) == 1, is_think.int().argmax(1), pad)  # a, as a column
    last = torch.where(is_end.sum(1) == 1, is_end.int().argmax(1), length)  # e, as a column
    return (
        ((entry & STEP) != 0) & (column >= first[:, None] + 2) & (column <= last[:, None]) & (column >= start[:, None])
    )
