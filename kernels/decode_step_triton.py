"""decode_step: one forward's worth of the stream: detect, gather, score, accumulate. In Triton; the definition is
``decode_step.py``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import layout
from .flush_triton import OWNER_FIELDS, OWNER_REGION, OWNER_SEQUENCE, OWNER_STEP, flush, flush_for
from .score_rows_triton import OPTIONS

AUTOMATON, SEEN, PAD, START = map(tl.constexpr, (layout.AUTOMATON, layout.SEEN, layout.PAD, layout.START))
N_THINK, N_END, HASH, N_STEPS = map(tl.constexpr, (layout.N_THINK, layout.N_END, layout.HASH, layout.N_STEPS))
SEQ_FIELDS, HASH_FACTOR = map(tl.constexpr, (layout.SEQ_FIELDS, layout.HASH_FACTOR))
NEXT_STATE, STEP, THINK, END = map(tl.constexpr, (layout.NEXT_STATE, layout.STEP, layout.THINK, layout.END))
AFTER_THINK, AFTER_END = map(tl.constexpr, (layout.AFTER_THINK, layout.AFTER_END))


@triton.jit
def _copy_row(target, source, stride, H, BLOCK_H: tl.constexpr):
    """``target[h] = source[h * stride]`` for ``h < H``."""
    for done in range(0, H, BLOCK_H):
        h = done + tl.arange(0, BLOCK_H)
        tl.store(target + h, tl.load(source + h * stride, mask=h < H), mask=h < H)


@triton.jit(do_not_specialize=["begin", "end"])
def _detect(
    ids, hidden, token_class, transition, seq, last_hidden, step_column, step_region, slots, slot_owner, n_slots,
    begin, end, n_states, C, H, ids_b, ids_q, hidden_b, hidden_q, hidden_h,
    AT_PREDICT: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """For one sequence a program and ``j = begin, .. end - 1``: ``entry = transition[token_class[ids[j]], state]``; if it is
    a step in scope, ``slots[n_slots++] = h[j - 1]`` (``AT_PREDICT``; before the call it is ``last_hidden``) or ``h[j]``, with
    its owner and its step log; then ``state = entry & NEXT_STATE``, tags counted, ``hash = hash factor + id + 1``.

    The slots must have room for ``end - begin`` rows of every sequence: see ``flush_for``. Rows of one sequence come in step
    order, sequences in any; no result depends on which.

    ids: [B, q] int64 and hidden: [B, q, H], with their strides; transition: [n_classes, n_states] int32; step_column: [N, C]
    int32; step_region: [N, C] int8. Others as in the definition, contiguous.
    """
    b = tl.program_id(0).to(tl.int64)
    ids_q, hidden_q, hidden_h = tl.cast(ids_q, tl.int64), tl.cast(hidden_q, tl.int64), tl.cast(hidden_h, tl.int64)
    state_ptr = seq + b * SEQ_FIELDS
    # Everything but the hash fits 32 bits, as step_column does; START may also say never. It halves the registers.
    state = tl.load(state_ptr + AUTOMATON).to(tl.int32)
    column = tl.load(state_ptr + SEEN).to(tl.int32)
    pad = tl.load(state_ptr + PAD).to(tl.int32)
    scope = tl.maximum(tl.minimum(tl.load(state_ptr + START), 2**31 - 1).to(tl.int32), pad + 2)
    n_think = tl.load(state_ptr + N_THINK).to(tl.int32)
    n_end = tl.load(state_ptr + N_END).to(tl.int32)
    running_hash = tl.load(state_ptr + HASH)
    step = tl.load(state_ptr + N_STEPS).to(tl.int32)
    last_ptr = last_hidden + b * H
    hidden_ptr = hidden + b * hidden_b
    for j in range(begin, end):
        token = tl.load(ids + b * ids_b + j * ids_q)
        text = column >= pad
        token_row = transition + tl.load(token_class + token).to(tl.int64) * n_states
        entry = tl.load(token_row + state, mask=text, other=0)
        if ((entry & STEP) != 0) & (column >= scope):
            slot = tl.atomic_add(n_slots, 1, sem="relaxed").to(tl.int64)
            slot_ptr = slots + slot * H
            if AT_PREDICT:
                if j == 0:
                    _copy_row(slot_ptr, last_ptr, 1, H, BLOCK_H)
                else:
                    _copy_row(slot_ptr, hidden_ptr + (j - 1) * hidden_q, hidden_h, H, BLOCK_H)
            else:
                _copy_row(slot_ptr, hidden_ptr + j * hidden_q, hidden_h, H, BLOCK_H)
            region = tl.where(n_think > 0, AFTER_THINK, 0) + tl.where(n_end > 0, AFTER_END, 0)
            owner = slot_owner + slot * OWNER_FIELDS
            tl.store(owner + OWNER_SEQUENCE, b.to(tl.int32))
            tl.store(owner + OWNER_STEP, step)
            tl.store(owner + OWNER_REGION, region)
            tl.store(step_column + b * C + step, column, mask=step < C)
            tl.store(step_region + b * C + step, region.to(tl.int8), mask=step < C)
            step += 1
        state = tl.where(text, entry & NEXT_STATE, state)
        n_think += ((entry & THINK) != 0).to(tl.int32)
        n_end += ((entry & END) != 0).to(tl.int32)
        running_hash = running_hash * HASH_FACTOR + token + 1
        column += 1
    tl.debug_barrier()  # every thread has read the state and the row that are overwritten now
    _copy_row(last_ptr, hidden_ptr + (end - 1) * hidden_q, hidden_h, H, BLOCK_H)
    tl.store(state_ptr + AUTOMATON, state.to(tl.int64))
    tl.store(state_ptr + SEEN, column.to(tl.int64))
    tl.store(state_ptr + N_THINK, n_think.to(tl.int64))
    tl.store(state_ptr + N_END, n_end.to(tl.int64))
    tl.store(state_ptr + HASH, running_hash)
    tl.store(state_ptr + N_STEPS, step.to(tl.int64))


def decode_step(
    ids: Tensor, hidden: Tensor,
    token_class: Tensor, transition: Tensor,
    w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
    seq: Tensor, tally: Tensor, last_hidden: Tensor,
    step_column: Tensor, step_region: Tensor, step_score: Tensor,
    slots: Tensor, slot_owner: Tensor, n_slots: Tensor,
    at_predict: bool, immediate: bool,
) -> None:  # fmt: skip
    """Consume ``q`` tokens of each of the first ``B`` sequences; semantics and arguments as in the definition.

    A call of one token is two launches, three if ``immediate``; of them all but one return at once while no step ends.
    Longer calls are cut into pieces whose steps fit the slot buffer even if every token were one. Nothing is read back.

    Raises:
        ValueError: the slot buffer has fewer rows than the call has sequences.
    """
    B, q = ids.shape
    R, H = slots.shape
    if R < B:
        raise ValueError(f"slots has {R} rows; {B} sequences need at least {B}")
    rows = (tally, step_score, slots, slot_owner, n_slots)
    piece = max(1, R // max(1, B))
    with torch.cuda.device_of(ids):
        for begin in range(0, q, piece):
            end = min(begin + piece, q)
            flush_for(B * (end - begin), w1, b1, w2, b2, *rows)
            _detect[(B,)](
                ids, hidden, token_class, transition, seq, last_hidden, step_column, step_region, slots, slot_owner, n_slots,
                begin, end, transition.shape[1], step_column.shape[1], H, *ids.stride(), *hidden.stride(),
                AT_PREDICT=at_predict, BLOCK_H=min(triton.next_power_of_2(H), 2048), **OPTIONS,
            )  # fmt: skip
    if immediate:
        flush(w1, b1, w2, b2, *rows)
