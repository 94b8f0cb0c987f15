"""flush: score the rows waiting in the slot buffer and add them to their sequences' tallies. In Triton; the definition
is ``flush.py``.
"""

import torch
from torch import Tensor

from . import layout
from .logit_rows_triton import OPTIONS, partials
from .tally_slots_triton import _tally_slots


def flush_for(
    room: int, activation: int, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
    tally: Tensor, step_score: Tensor, slots: Tensor, slot_owner: Tensor, n_slots: Tensor, workspace: Tensor,
) -> None:  # fmt: skip
    """``flush`` if fewer than ``room`` slots are free: decided on the device, in two launches that otherwise return at once.

    Tiles are those of a full buffer: a flush that few rows wait for is rare, and a row's bits are the same.
    """
    R = len(slots)
    sums = workspace[layout.WORKSPACE_HEADER :]
    with torch.cuda.device_of(slots):
        _, lines = partials(slots, w1, b1, w2, activation, sums, n_slots, room)
        _tally_slots[(1,)](
            sums, b2, tally, step_score, slot_owner, n_slots, sums[lines:], R, room, step_score.shape[1], lines + 2, lines,
            **OPTIONS,
        )  # fmt: skip


def flush(
    w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
    tally: Tensor, step_score: Tensor, slots: Tensor, slot_owner: Tensor, n_slots: Tensor, workspace: Tensor,
    activation: int = layout.RELU,
) -> None:  # fmt: skip
    """``score_rows(slots[:n_slots])``, each score written to its owner's step log and tally in slot order; empties the buffer.

    Mutates ``tally``, ``step_score``, ``n_slots`` and ``workspace``. Arguments: see the definition of ``decode_step``.
    """
    flush_for(len(slots), activation, w1, b1, w2, b2, tally, step_score, slots, slot_owner, n_slots, workspace)
