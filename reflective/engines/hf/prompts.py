"""Prompts, and how much of them is padding."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...scoring.steps import padding


@dataclass
class Prompts:
    """Prompts [B, P], their left padding [B], and whether the user announced them, or ``generate``."""

    ids: Tensor
    pad: Tensor
    by_user: bool = False


def left_padding(
    ids: Tensor,
    attention_mask: Tensor | dict[str, Tensor] | None,
    device: torch.device,
    position_ids: Tensor | None = None,
) -> Tensor:
    """Columns of left padding [B] of the prompts [B, P].

    Raises:
        ValueError: no prompt, an empty one, or padding that is not on the left.
    """
    if ids.dim() != 2 or 0 in ids.shape:
        raise ValueError(f"input_ids: shape {list(ids.shape)}; expected at least one prompt of at least one token")
    ready_made = isinstance(attention_mask, dict) or (attention_mask is not None and attention_mask.dim() != 2)
    if ready_made and position_ids is not None:
        # A static cache gets its 4-d mask, or one a kind of layer; the positions still tell how much is padding.
        # Those of text come first where there are several kinds (Qwen2-VL: [4, B, P]).
        positions = position_ids if position_ids.dim() == 2 else position_ids[0]
        return (ids.shape[1] - 1 - positions[:, -1]).expand(len(ids)).to(device)
    pad, length = padding(attention_mask, ids.shape, device)
    if (length < ids.shape[1]).any():
        raise ValueError("attention_mask: right-padded prompts cannot be decoded; set tokenizer.padding_side='left'")
    return pad
