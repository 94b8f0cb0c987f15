"""flush: score the rows waiting in the slot buffer and add them to their sequences' tallies. In Triton; the definition
is ``flush.py``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import layout
from .score_rows_triton import NAN_PROPAGATES, OPTIONS, head_partials, head_scores, head_tiles

COUNT, LOG_SUM, MIN, LAST = map(tl.constexpr, (layout.COUNT, layout.LOG_SUM, layout.MIN, layout.LAST))
TALLY_FIELDS, N_REGIONS = map(tl.constexpr, (layout.TALLY_FIELDS, layout.N_REGIONS))
OWNER_SEQUENCE, OWNER_STEP, OWNER_REGION, OWNER_FIELDS = map(
    tl.constexpr, (layout.OWNER_SEQUENCE, layout.OWNER_STEP, layout.OWNER_REGION, layout.OWNER_FIELDS)
)


@triton.jit
def _flush(
    w1, b1, w2, b2, tally, step_score, slots, slot_owner, n_slots, sums, room, R, N, C, H, K,
    ARRIVAL: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_U: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """If fewer than ``room`` of the ``R`` slots are free: for the slots ``i = 0, 1, .. n_slots - 1`` in this order,
    with ``s = score_rows(slots)[i]``, ``t = tally[sequence_i, region_i]``

        t[MIN] = min(t[MIN], s);  t[COUNT] += 1;  t[LOG_SUM] += s;  t[LAST] = s;  step_score[sequence_i, step_i] = s

    and then ``n_slots = 0``. One program a unit block writes its partial sums; the last one to arrive does the rest.
    Programs arrive by adding ``ARRIVAL``, a power of two above ``R``, to ``n_slots``, whose low bits stay what they are:
    the emptied buffer is the cleared counter.

    tally: [N, N_REGIONS, TALLY_FIELDS] float64; step_score: [N, C] float32; slots: [R, H]; slot_owner: [R, OWNER_FIELDS]
    int32; n_slots: [1] int32; sums: [programs + 2, R] float32 workspace. Head: see ``head_partials``. All contiguous.
    """
    program = tl.program_id(0)
    n_programs = tl.num_programs(0)
    n = tl.load(n_slots) & (ARRIVAL - 1)
    if n + room > R:
        for first in range(0, n, BLOCK_M):
            head_partials(program, n_programs, first, n, slots, w1, b1, w2, sums, R, H, K, BLOCK_U, BLOCK_M, BLOCK_H)
        tl.debug_barrier()  # one thread arrives for all: their sums must have been written before
        if tl.atomic_add(n_slots, ARRIVAL, sem="acq_rel") == n + (n_programs - 1) * ARRIVAL:
            scores = sums + (n_programs + 1) * tl.cast(R, tl.int64)
            for first in range(0, n, BLOCK_M):
                row = first + tl.arange(0, BLOCK_M)
                score = head_scores(row, n, n_programs, b2, sums, R, BLOCK_M)
                owner = slot_owner + row * OWNER_FIELDS
                sequence = tl.load(owner + OWNER_SEQUENCE, mask=row < n, other=0).to(tl.int64)
                step = tl.load(owner + OWNER_STEP, mask=row < n, other=0)
                tl.store(step_score + sequence * C + step, score, mask=(row < n) & (step < C))
                tl.store(scores + row, score, mask=row < n)
            tl.debug_barrier()  # the scores are read below by other threads than wrote them

            for first in range(0, N * N_REGIONS, BLOCK_T):
                key = first + tl.arange(0, BLOCK_T)  # sequence, region
                inside = key < N * N_REGIONS
                entry = tally + key * TALLY_FIELDS
                count = tl.load(entry + COUNT, mask=inside, other=0.0)
                log_sum = tl.load(entry + LOG_SUM, mask=inside, other=0.0)
                least = tl.load(entry + MIN, mask=inside, other=0.0)
                last = tl.load(entry + LAST, mask=inside, other=0.0)
                for i in tl.range(0, n, loop_unroll_factor=8):
                    owner = slot_owner + i * OWNER_FIELDS
                    mine = key == tl.load(owner + OWNER_SEQUENCE) * N_REGIONS + tl.load(owner + OWNER_REGION)
                    score = tl.load(scores + i).to(tl.float64)
                    lower = tl.where(count == 0.0, score, tl.minimum(least, score, propagate_nan=NAN_PROPAGATES))
                    least = tl.where(mine, lower, least)
                    count = tl.where(mine, count + 1.0, count)
                    log_sum = tl.where(mine, log_sum + score, log_sum)
                    last = tl.where(mine, score, last)
                tl.store(entry + COUNT, count, mask=inside)
                tl.store(entry + LOG_SUM, log_sum, mask=inside)
                tl.store(entry + MIN, least, mask=inside)
                tl.store(entry + LAST, last, mask=inside)
            tl.store(n_slots, 0)


def flush_for(
    room: int, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
    tally: Tensor, step_score: Tensor, slots: Tensor, slot_owner: Tensor, n_slots: Tensor,
) -> None:  # fmt: skip
    """``flush`` if fewer than ``room`` slots are free: decided on the device, so one launch, which mostly returns at once."""
    R, H = slots.shape
    K = w1.shape[0]
    n_programs, tile = head_tiles(K, w1.dtype)
    sums = torch.empty(n_programs + 2, R, dtype=torch.float32, device=slots.device)
    with torch.cuda.device_of(slots):
        _flush[(n_programs,)](
            w1.contiguous(), b1, w2, b2, tally, step_score, slots, slot_owner, n_slots, sums,
            room, R, tally.shape[0], step_score.shape[1], H, K,
            ARRIVAL=1 << R.bit_length(), BLOCK_T=256, **tile, **OPTIONS,
        )  # fmt: skip


def flush(
    w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
    tally: Tensor, step_score: Tensor, slots: Tensor, slot_owner: Tensor, n_slots: Tensor,
) -> None:  # fmt: skip
    """``score_rows(slots[:n_slots])``, each score written to its owner's step log and tally in slot order; empties the buffer.

    Mutates ``tally``, ``step_score`` and ``n_slots``. Arguments: see the definition of ``decode_step``.
    """
    flush_for(slots.shape[0], w1, b1, w2, b2, tally, step_score, slots, slot_owner, n_slots)
