"""tally_slots: the logits of the waiting rows into their sequences' tallies. In Triton; the definition is
``tally_slots.py``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import layout
from .logit_rows_triton import BLOCK_R, NAN_PROPAGATES, OPTIONS, head_logits
from .score_rows_triton import log_score

COUNT, LOG_SUM, MIN, LAST = map(tl.constexpr, (layout.COUNT, layout.LOG_SUM, layout.MIN, layout.LAST))
TALLY_FIELDS, N_REGIONS = map(tl.constexpr, (layout.TALLY_FIELDS, layout.N_REGIONS))
OWNER_SEQUENCE, OWNER_STEP, OWNER_REGION, OWNER_FIELDS = map(
    tl.constexpr, (layout.OWNER_SEQUENCE, layout.OWNER_STEP, layout.OWNER_REGION, layout.OWNER_FIELDS)
)
BLOCK_T = tl.constexpr(128)  # rows that are tallied at once, one a thread


@triton.jit
def int32_at(pointer):
    """A pointer to float32 as one to int32."""
    return pointer.to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def slot_key(row, n, slot_owner):
    """``sequence N_REGIONS + region`` and step of the slots ``row``, those from ``n`` on undefined."""
    owner = slot_owner + row * OWNER_FIELDS
    sequence = tl.load(owner + OWNER_SEQUENCE, mask=row < n, other=0)
    step = tl.load(owner + OWNER_STEP, mask=row < n, other=0)
    return sequence * N_REGIONS + tl.load(owner + OWNER_REGION, mask=row < n, other=0), step


@triton.jit
def note_scores(row, n, score, key, step, scored, STRIDE: tl.constexpr, step_score, C):
    """The scores of the rows ``row < n`` to the step log, and with their keys to ``scored`` for ``tally_rows``."""
    line = scored + row.to(tl.int64) * STRIDE
    tl.store(line, score, mask=row < n)
    tl.store(int32_at(line) + 1, key, mask=row < n)
    tl.store(step_score + (key // N_REGIONS).to(tl.int64) * C + step, score, mask=(row < n) & (step < C))


@triton.jit
def tally_rows(n, scored, STRIDE: tl.constexpr, tally):
    """For the rows ``i = 0, 1, .. n - 1`` in this order, with ``s, key_i = scored[i]``, ``t = tally[key_i]``

        t[MIN] = min(t[MIN], s);  t[COUNT] += 1;  t[LOG_SUM] += s;  t[LAST] = s

    Every thread has a row, walks over all rows of its tile and adds up those of its row's key: rows of one key end up with
    equal sums. scored: rows of STRIDE 32-bit words that begin with a float32 and an int32; tally: [keys, TALLY_FIELDS].
    """
    for first in range(0, n, BLOCK_T):
        row = first + tl.arange(0, BLOCK_T)
        inside = row < n
        key = tl.load(int32_at(scored) + row.to(tl.int64) * STRIDE + 1, mask=inside, other=0)
        entry = tally + key * TALLY_FIELDS
        count = tl.load(entry + COUNT, mask=inside, other=0.0)
        log_sum = tl.load(entry + LOG_SUM, mask=inside, other=0.0)
        least = tl.load(entry + MIN, mask=inside, other=0.0)
        last = tl.load(entry + LAST, mask=inside, other=0.0)
        tl.debug_barrier()  # other threads store to the same entries below
        for i in tl.range(first, tl.minimum(first + BLOCK_T, n), loop_unroll_factor=8):
            other = scored + tl.cast(i, tl.int64) * STRIDE
            mine = key == tl.load(int32_at(other) + 1)
            score = tl.load(other).to(tl.float64)
            lower = tl.where(count == 0.0, score, tl.minimum(least, score, propagate_nan=NAN_PROPAGATES))
            least = tl.where(mine, lower, least)
            count = tl.where(mine, count + 1.0, count)
            log_sum = tl.where(mine, log_sum + score, log_sum)
            last = tl.where(mine, score, last)
        tl.store(entry + COUNT, count, mask=inside)
        tl.store(entry + LOG_SUM, log_sum, mask=inside)
        tl.store(entry + MIN, least, mask=inside)
        tl.store(entry + LAST, last, mask=inside)
        tl.debug_barrier()  # and the next tile loads them


@triton.jit(do_not_specialize=["R", "room", "C"])
def _tally_slots(
    sums, b2, tally, step_score, slot_owner, n_slots, scratch, R, room, C, STRIDE: tl.constexpr, N_LINES: tl.constexpr
):
    """If fewer than ``room`` of the ``R`` slots are free: ``log_score`` of the waiting rows to their owners' step log and
    tally; empties the buffer. One program.

    sums: [R, N_LINES + 2] float32, see ``head_partials``, or with N_LINES = 0 the logits [R]; scratch: [R, STRIDE] float32,
    may lie behind the lines of ``sums``. Others as in the definition.
    """
    n = tl.load(n_slots)
    if n + room > R:
        for first in range(0, n, BLOCK_R):
            row = first + tl.arange(0, BLOCK_R)
            key, step = slot_key(row, n, slot_owner)
            if N_LINES:
                logit = head_logits(row, n, b2, sums, N_LINES)
            else:
                logit = tl.load(sums + row, mask=row < n, other=0.0) + tl.load(b2).to(tl.float32)
            note_scores(row, n, log_score(logit), key, step, scratch, STRIDE, step_score, C)
        tl.debug_barrier()  # scores are read by other threads than wrote them
        tally_rows(n, scratch, STRIDE, tally)
        tl.store(n_slots, 0)


def tally_slots(
    logits: Tensor, b2: Tensor, tally: Tensor, step_score: Tensor, slot_owner: Tensor, n_slots: Tensor
) -> None:
    """``log_score(logits[i] + b2)`` of the slots ``i < n_slots`` to their owners' step log and tally, in slot order; empties
    the buffer. Arguments as in the definition.
    """
    R = len(slot_owner)
    with torch.cuda.device_of(logits):
        scratch = torch.empty(R, 2, dtype=torch.float32, device=logits.device)
        _tally_slots[(1,)](
            logits, b2, tally, step_score, slot_owner, n_slots, scratch, R, R, step_score.shape[1], 2, 0, **OPTIONS
        )  # fmt: skip
