"""flush: score the rows waiting in the slot buffer and add them to their sequences' tallies. The definition."""

from torch import Tensor

from .layout import COUNT, LAST, LOG_SUM, MIN
from .score_rows import score_rows


def flush(
    w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
    tally: Tensor, step_score: Tensor, slots: Tensor, slot_owner: Tensor, n_slots: Tensor,
) -> None:  # fmt: skip
    """``score_rows(slots[:n_slots])``, each score written to its owner's step log and tally in slot order; empties the buffer.

    Mutates ``tally``, ``step_score`` and ``n_slots``. Arguments: see ``decode_step``.
    """
    n = int(n_slots)
    scores = score_rows(slots[:n], w1, b1, w2, b2)
    for (sequence, step, region), score in zip(slot_owner[:n].tolist(), scores, strict=True):
        sums = tally[sequence, region]
        sums[MIN] = score if sums[COUNT] == 0 else sums[MIN].minimum(score)
        sums[COUNT] += 1
        sums[LOG_SUM] += score
        sums[LAST] = score
        if step < step_score.shape[1]:
            step_score[sequence, step] = score
    n_slots.zero_()
