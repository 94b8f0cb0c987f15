"""tally_slots: the logits of the waiting rows into their sequences' tallies. The definition."""

from torch import Tensor

from .layout import COUNT, LAST, LOG_SUM, MIN
from .score_rows import log_score


def tally_slots(
    logits: Tensor, b2: Tensor, tally: Tensor, step_score: Tensor, slot_owner: Tensor, n_slots: Tensor
) -> None:
    """``log_score(logits[i] + b2)`` of the slots ``i < n_slots`` to their owners' step log and tally, in slot order; empties
    the buffer. The second half of ``flush``, by itself where the logits are summed over ranks in between.

    Args:
        logits: [R] float32, those from ``n_slots`` on undefined.
        b2: [1].
        Others as in ``decode_step``. Mutates ``tally``, ``step_score`` and ``n_slots``.
    """
    n = int(n_slots)
    scores = log_score(logits[:n] + b2.to(logits.dtype))
    for (sequence, step, region), score in zip(slot_owner[:n].tolist(), scores, strict=True):
        sums = tally[sequence, region]
        sums[MIN] = score if sums[COUNT] == 0 else sums[MIN].minimum(score)
        sums[COUNT] += 1
        sums[LOG_SUM] += score
        sums[LAST] = score
        if step < step_score.shape[1]:
            step_score[sequence, step] = score
    n_slots.zero_()
