"""flush: score the rows waiting in the slot buffer and add them to their sequences' tallies. The definition."""

from torch import Tensor

from .layout import RELU
from .logit_rows import logit_rows
from .tally_slots import tally_slots


def flush(
    w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
    tally: Tensor, step_score: Tensor, slots: Tensor, slot_owner: Tensor, n_slots: Tensor, workspace: Tensor,
    activation: int = RELU,
) -> None:  # fmt: skip
    """``score_rows(slots[:n_slots])``, each score written to its owner's step log and tally in slot order; empties the buffer.

    Mutates ``tally``, ``step_score``, ``n_slots`` and ``workspace``. Arguments: see ``decode_step``.
    """
    no_b2 = b2.new_zeros(1)
    logits = logit_rows(slots[: int(n_slots)], w1, b1, w2, b2, activation)
    tally_slots(logits, no_b2, tally, step_score, slot_owner, n_slots)
