"""decode_step: one forward's worth of the stream: detect, gather, score, accumulate. In Triton; the definition is
``decode_step.py``.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import layout
from .flush_triton import flush, flush_for
from .logit_rows import check_activation
from .logit_rows_triton import (
    BLOCK_R,
    OPTIONS,
    head_line,
    head_logits,
    head_partials,
    head_tile,
    weight_bits,
)
from .score_rows_triton import log_score
from .tally_slots_triton import (
    N_REGIONS,
    OWNER_FIELDS,
    OWNER_REGION,
    OWNER_SEQUENCE,
    OWNER_STEP,
    int32_at,
    note_scores,
    slot_key,
    tally_rows,
)

AUTOMATON, SEEN, PAD, START = map(tl.constexpr, (layout.AUTOMATON, layout.SEEN, layout.PAD, layout.START))
N_THINK, N_END, HASH, N_STEPS = map(tl.constexpr, (layout.N_THINK, layout.N_END, layout.HASH, layout.N_STEPS))
SEQ_FIELDS, HASH_FACTOR = map(tl.constexpr, (layout.SEQ_FIELDS, layout.HASH_FACTOR))
NEXT_STATE, STEP, THINK, END = map(tl.constexpr, (layout.NEXT_STATE, layout.STEP, layout.THINK, layout.END))
AFTER_THINK, AFTER_END = map(tl.constexpr, (layout.AFTER_THINK, layout.AFTER_END))
HEADER = tl.constexpr(layout.WORKSPACE_HEADER)
BLOCK_C = tl.constexpr(1024)  # columns of a row that a program copies at once


@triton.jit
def _copy_tile(target, source, tile, H: tl.constexpr):
    """``target[h] = source[h]`` for the columns ``h < H`` of one tile of ``BLOCK_C``."""
    h = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    tl.store(target + h, tl.load(source + h, mask=h < H), mask=h < H)


@triton.jit
def _field(s, at: tl.constexpr, inside):
    """A field of ``seq`` in 32 bits, as step_column has them; START may also say never. It halves the registers."""
    return tl.minimum(tl.load(s + at, mask=inside, other=0), 2**31 - 1).to(tl.int32)


@triton.jit
def _state_row(rows, N, b, inside):
    """The state row of sequence ``b``; less than 0 where it is skipped, or is none of the ``N``."""
    row = b
    if rows is not None:
        row = tl.load(rows + b, mask=inside, other=-1).to(tl.int64)
        row = tl.where(row < N, row, -1)
    return row


@triton.jit
def _region(n_think, n_end):
    return tl.where(n_think > 0, AFTER_THINK, 0) + tl.where(n_end > 0, AFTER_END, 0)


@triton.jit
def _detect(s, inside, token, token_class, transition, V, n_states):
    """``transition[token_class[token], state]``, 0 for padding and ids outside the vocabulary; and whether a step ends here.
    s: pointers to rows of ``seq``.
    """
    known = inside & (token >= 0) & (token < V)
    token_row = transition + tl.load(token_class + token, mask=known, other=0).to(tl.int64) * n_states
    column, pad, start = _field(s, SEEN, inside), _field(s, PAD, inside), _field(s, START, inside)
    entry = tl.load(token_row + _field(s, AUTOMATON, inside), mask=known & (column >= pad), other=0)
    return entry, ((entry & STEP) != 0) & (column >= tl.maximum(start, pad + 2))


@triton.jit
def _feature(
    m, n, waiting, scored, STRIDE: tl.constexpr, source, source_b, seq, slots,
    H: tl.constexpr, HALVES: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Pointers to the rows ``m`` that are to be scored: first the slots that wait, then, in order, the rows of ``source``
    whose keys ``scored`` has. ``source`` is ``hidden``, or ``last_hidden`` (``HALVES``) of which the old half is meant; each
    row begins at a multiple of ``ALIGN`` bytes.
    """
    m = tl.cast(m, tl.int64)
    key = tl.load(int32_at(scored) + m * STRIDE + 1, mask=(m >= waiting) & (m < n), other=0)
    b = (key // N_REGIONS).to(tl.int64)
    row = source + b * source_b
    if HALVES:
        row += (tl.load(seq + b * SEQ_FIELDS + SEEN) & 1) * H
    # Said, because the compiler does not see through the choice; it copies 16 bytes at a time only if it knows.
    return tl.multiple_of(tl.where(m < waiting, slots + m * H, row), ALIGN)


# A slice of all ids so far has another pitch and alignment in every step, which must not wait for a compiler then.
@triton.jit(do_not_specialize=["B", "N", "R", "C", "V", "n_states", "ids_b"], do_not_specialize_on_alignment=["ids"])
def _step(
    ids, hidden, token_class, transition, w1, b1, w2, b2, seq, tally, last_hidden, step_column, step_region, step_score,
    slots, slot_owner, n_slots, workspace, rows,
    B, N, R, C, V, n_states, ids_b, hidden_b,
    H: tl.constexpr, K: tl.constexpr, ACTIVATION: tl.constexpr, LINE: tl.constexpr,
    AT_PREDICT: tl.constexpr, IMMEDIATE: tl.constexpr, ALIGN: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_U: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The definition for ``q = 1``, all of it. One program a block of units.

    Every program detects for all ``B`` sequences, from state that nobody changes meanwhile, and so knows without being told
    which rows there are. If they are to be scored (at once if ``IMMEDIATE``, otherwise when they fit the slots no more) it
    writes its units' partial sums of the waiting slots and of the new rows, which need no slot then; otherwise it copies its
    share of the new rows to slots. It copies its share of ``hidden`` and arrives. The last program to arrive finds every
    sum there and nobody reading the old state any more: it adds up, tallies, and updates the state of all sequences.

    workspace: a counter of arrivals, and from ``HEADER`` on a line for each row: partial sums of ``head_partials``, then its
    score, then its key, which all programs write alike: of its row in ``source``, and later of its row in the state (see
    ``tally_rows``). rows: [B] int32 or None, as in the definition.
    """
    N_LINES: tl.constexpr = (K + LINE - 1) // LINE
    STRIDE: tl.constexpr = N_LINES + 2
    TILES: tl.constexpr = (H + BLOCK_C - 1) // BLOCK_C
    program, n_programs = tl.program_id(0), tl.num_programs(0)
    sums = workspace + HEADER
    scored = sums + N_LINES
    source = last_hidden if AT_PREDICT else hidden
    source_b = 2 * H if AT_PREDICT else hidden_b
    waiting = tl.load(n_slots)

    n = waiting
    for first in range(0, B, BLOCK_B):
        b = first + tl.arange(0, BLOCK_B).to(tl.int64)
        state_row = _state_row(rows, N, b, b < B)
        inside = (b < B) & (state_row >= 0)
        s = seq + state_row * SEQ_FIELDS
        token = tl.load(ids + b * ids_b, mask=inside, other=0)
        _, is_step = _detect(s, inside, token, token_class, transition, V, n_states)
        region = _region(_field(s, N_THINK, inside), _field(s, N_END, inside))
        one = is_step.to(tl.int32)
        row = (n + tl.cumsum(one, 0) - one).to(tl.int64)
        source_row = state_row if AT_PREDICT else b
        tl.store(int32_at(scored) + row * STRIDE + 1, source_row.to(tl.int32) * N_REGIONS + region, mask=is_step)
        n += tl.sum(one, 0)
    tl.debug_barrier()  # the keys are read by other threads than wrote them

    due = n > (0 if IMMEDIATE else R)
    if due:
        for first in range(0, n, BLOCK_M):
            m = first + tl.arange(0, BLOCK_M)
            f_row = _feature(m, n, waiting, scored, STRIDE, source, source_b, seq, slots, H, AT_PREDICT, ALIGN)
            head_partials(
                program, first, n, f_row, w1, b1, w2, sums, H, K, ACTIVATION, LINE, BLOCK_U, BLOCK_M, BLOCK_H, STAGES
            )  # fmt: skip
    else:
        for t in range(program, (n - waiting) * TILES, n_programs):
            t = tl.cast(t, tl.int64)
            m = waiting + t // TILES
            f_ptr = _feature(m, n, waiting, scored, STRIDE, source, source_b, seq, slots, H, AT_PREDICT, ALIGN)
            _copy_tile(slots + m * H, f_ptr, t % TILES, H)
    for t in range(program, B * TILES, n_programs):
        t = tl.cast(t, tl.int64)
        b = t // TILES
        state_row = _state_row(rows, N, b, True)
        if state_row >= 0:
            half = (tl.load(seq + state_row * SEQ_FIELDS + SEEN) + 1) & 1
            _copy_tile(last_hidden + (state_row * 2 + half) * H, hidden + b * hidden_b, t % TILES, H)

    tl.debug_barrier()  # one thread arrives for all
    if tl.atomic_add(int32_at(workspace), 1, sem="acq_rel") == n_programs - 1:
        tl.store(int32_at(workspace), 0)
        if due:
            for first in range(0, n, BLOCK_R):
                row = first + tl.arange(0, BLOCK_R)
                new = (row >= waiting) & (row < n)
                key, step = slot_key(row, waiting, slot_owner)
                new_key = tl.load(int32_at(scored) + row.to(tl.int64) * STRIDE + 1, mask=new, other=0)
                if not AT_PREDICT:
                    state_row = _state_row(rows, N, new_key // N_REGIONS, new)
                    new_key = tl.where(new, state_row.to(tl.int32) * N_REGIONS + new_key % N_REGIONS, 0)
                key += new_key
                step += _field(seq + (key // N_REGIONS).to(tl.int64) * SEQ_FIELDS, N_STEPS, new)
                score = log_score(head_logits(row, n, b2, sums, N_LINES))
                tl.debug_barrier()  # every thread has read the keys, whose places the new ones take
                note_scores(row, n, score, key, step, scored, STRIDE, step_score, C)
            tl.debug_barrier()  # scores are read by other threads than wrote them
            tally_rows(n, scored, STRIDE, tally)

        taken = waiting
        for first in range(0, B, BLOCK_B):
            b = first + tl.arange(0, BLOCK_B).to(tl.int64)
            state_row = _state_row(rows, N, b, b < B)
            inside = (b < B) & (state_row >= 0)
            s = seq + state_row * SEQ_FIELDS
            token = tl.load(ids + b * ids_b, mask=inside, other=0)
            entry, is_step = _detect(s, inside, token, token_class, transition, V, n_states)
            state, column, step = _field(s, AUTOMATON, inside), _field(s, SEEN, inside), _field(s, N_STEPS, inside)
            n_think, n_end = _field(s, N_THINK, inside), _field(s, N_END, inside)
            state = tl.where(column >= _field(s, PAD, inside), entry & NEXT_STATE, state)
            hashed = tl.load(s + HASH, mask=inside, other=0) * HASH_FACTOR + token + 1
            region = _region(n_think, n_end)
            one = is_step.to(tl.int32)
            logged = is_step & (step < C)
            tl.store(step_column + state_row * C + step, column, mask=logged)
            tl.store(step_region + state_row * C + step, region.to(tl.int8), mask=logged)
            if not due:
                owner = slot_owner + (taken + tl.cumsum(one, 0) - one) * OWNER_FIELDS
                tl.store(owner + OWNER_SEQUENCE, state_row.to(tl.int32), mask=is_step)
                tl.store(owner + OWNER_STEP, step, mask=is_step)
                tl.store(owner + OWNER_REGION, region, mask=is_step)
                taken += tl.sum(one, 0)
            tl.debug_barrier()  # every thread has read what is overwritten now
            tl.store(s + AUTOMATON, state.to(tl.int64), mask=inside)
            tl.store(s + SEEN, (column + 1).to(tl.int64), mask=inside)
            tl.store(s + N_THINK, (n_think + ((entry & THINK) != 0).to(tl.int32)).to(tl.int64), mask=inside)
            tl.store(s + N_END, (n_end + ((entry & END) != 0).to(tl.int32)).to(tl.int64), mask=inside)
            tl.store(s + HASH, hashed, mask=inside)
            tl.store(s + N_STEPS, (step + one).to(tl.int64), mask=inside)
        tl.store(n_slots, tl.where(due, 0, n))


@triton.jit(
    do_not_specialize=["begin", "end", "quiet", "N", "V", "n_states", "C", "ids_b", "ids_q"],
    do_not_specialize_on_alignment=["ids"],
)
def _walk(
    ids, hidden, token_class, transition, seq, last_hidden, step_column, step_region, slots, slot_owner, n_slots,
    rows, cu_seqlens, begin, end, quiet, N, V, n_states, C, ids_b, ids_q, hidden_b, hidden_q, H: tl.constexpr,
    AT_PREDICT: tl.constexpr,
):  # fmt: skip
    """For one sequence a program and those of ``j = begin, .. end - 1`` that are its own: ``entry = transition[token_class[ids[j]], state]``; if it is
    a step in scope, ``slots[n_slots++] = h[j - 1]`` (``AT_PREDICT``; before the call it is ``last_hidden``) or ``h[j]``, with
    its owner and its step log; then ``state = entry & NEXT_STATE``, tags counted, ``hash = hash factor + id + 1``.

    No step of a column before ``quiet`` counts. The slots must have room for as many rows as there may be steps from there on:
    see ``flush_for``. Rows of one sequence come in step order, sequences in any; no result depends on which.

    ids: [B, q] int64 and hidden: [B, q, H], with their strides, packed of 0 from sequence to sequence; transition:
    [n_classes, n_states] int32; step_column: [N, C] int32; step_region: [N, C] int8; rows: [B], cu_seqlens: [B + 1] int32,
    each or None. Others as in the definition, contiguous.
    """
    TILES: tl.constexpr = (H + BLOCK_C - 1) // BLOCK_C
    b = tl.program_id(0).to(tl.int64)
    state_row = _state_row(rows, N, b, True)
    first = 0
    if cu_seqlens is not None:
        first = tl.load(cu_seqlens + b)
        begin, end = tl.maximum(begin, first), tl.minimum(end, tl.load(cu_seqlens + b + 1))
    if (state_row < 0) | (begin >= end):
        return
    ids_q, hidden_q = tl.cast(ids_q, tl.int64), tl.cast(hidden_q, tl.int64)
    s = seq + state_row * SEQ_FIELDS
    state, column, pad = _field(s, AUTOMATON, True), _field(s, SEEN, True), _field(s, PAD, True)
    scope = tl.maximum(_field(s, START, True), pad + 2)
    n_think, n_end, step = _field(s, N_THINK, True), _field(s, N_END, True), _field(s, N_STEPS, True)
    running_hash = tl.load(s + HASH)
    last_ptr = last_hidden + state_row * 2 * H
    hidden_ptr = hidden + b * hidden_b
    for j in range(begin, end):
        token = tl.load(ids + b * ids_b + j * ids_q)
        text = column >= pad
        known = (token >= 0) & (token < V)
        token_row = transition + tl.load(token_class + token, mask=known, other=0).to(tl.int64) * n_states
        entry = tl.load(token_row + state, mask=text & known, other=0)
        if ((entry & STEP) != 0) & (column >= scope) & (j >= quiet):
            slot = tl.atomic_add(n_slots, 1, sem="relaxed").to(tl.int64)
            source = hidden_ptr + j * hidden_q
            if AT_PREDICT:
                source = tl.where(j > first, source - hidden_q, last_ptr + (column & 1) * H)
            for tile in range(TILES):
                _copy_tile(slots + slot * H, source, tile, H)
            region = _region(n_think, n_end)
            owner = slot_owner + slot * OWNER_FIELDS
            tl.store(owner + OWNER_SEQUENCE, state_row.to(tl.int32))
            tl.store(owner + OWNER_STEP, step)
            tl.store(owner + OWNER_REGION, region)
            tl.store(step_column + state_row * C + step, column, mask=step < C)
            tl.store(step_region + state_row * C + step, region.to(tl.int8), mask=step < C)
            step += 1
        state = tl.where(text, entry & NEXT_STATE, state)
        n_think += ((entry & THINK) != 0).to(tl.int32)
        n_end += ((entry & END) != 0).to(tl.int32)
        running_hash = running_hash * HASH_FACTOR + token + 1
        column += 1
    tl.debug_barrier()  # every thread has read the state and the row that are overwritten now
    for tile in range(TILES):
        _copy_tile(last_ptr + (column & 1) * H, hidden_ptr + (end - 1) * hidden_q, tile, H)
    tl.store(s + AUTOMATON, state.to(tl.int64))
    tl.store(s + SEEN, column.to(tl.int64))
    tl.store(s + N_THINK, n_think.to(tl.int64))
    tl.store(s + N_END, n_end.to(tl.int64))
    tl.store(s + HASH, running_hash)
    tl.store(s + N_STEPS, step.to(tl.int64))


def decode_step(
    ids: Tensor, hidden: Tensor,
    token_class: Tensor, transition: Tensor,
    w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
    seq: Tensor, tally: Tensor, last_hidden: Tensor,
    step_column: Tensor, step_region: Tensor, step_score: Tensor,
    slots: Tensor, slot_owner: Tensor, n_slots: Tensor, workspace: Tensor,
    at_predict: bool, immediate: bool, rows: Tensor | None = None, cu_seqlens: Tensor | None = None,
    quiet: int = 0, activation: int = layout.RELU,
) -> None:  # fmt: skip
    """Consume ``q`` tokens of each of ``B`` sequences, or those that ``cu_seqlens`` gives it; semantics and arguments as in
    the definition.

    A dense call of one token is one launch. Other calls are cut into pieces whose steps fit the slot buffer even if every
    token were one, of three launches each, of which two mostly return at once; ``quiet`` columns come with the first piece, and
    are one launch where there are no others. Nothing is allocated or read back, unless
    ``hidden`` is not contiguous in its last dimension: then it is copied.

    Raises:
        ValueError: the slot buffer has fewer rows than a dense call has sequences; ``quiet`` is negative; see
            ``check_activation``.
    """
    if quiet < 0:
        raise ValueError(f"quiet={quiet}: expected columns, 0 or more")
    check_activation(activation, w1)
    B, q = ids.shape
    R, H = slots.shape
    N, C, V, n_states = *step_column.shape, len(token_class), transition.shape[1]
    if R < B:
        raise ValueError(f"slots has {R} rows; {B} sequences need at least {B}")
    if hidden.stride(2) != 1:
        hidden = hidden.contiguous()
    with torch.cuda.device_of(ids):
        if q == 1 and cu_seqlens is None and not quiet:
            tile = head_tile(w1, 16 if immediate else R)
            # Left to itself the assembler spills some scalars in order to fit more programs on a multiprocessor; in _walk too.
            tile["maxnreg"] = 168 if tile["num_warps"] == 4 else 248
            pitches = (
                *(t.data_ptr() for t in (hidden, slots, last_hidden)),
                *(n * hidden.element_size() for n in (H, hidden.stride(0))),
            )
            _step[(triton.cdiv(len(w1), tile["BLOCK_U"]),)](
                ids, hidden, token_class, transition, weight_bits(w1), b1, w2, b2, seq, tally, last_hidden,
                step_column, step_region, step_score, slots, slot_owner, n_slots, workspace, rows,
                B, N, R, C, V, n_states, ids.stride(0), hidden.stride(0), H, len(w1), activation, head_line(w1),
                at_predict, immediate, math.gcd(16, *pitches), min(512, max(128, triton.next_power_of_2(B))), **tile, **OPTIONS,
            )  # fmt: skip
            return
        head_and_slots = w1, b1, w2, b2, tally, step_score, slots, slot_owner, n_slots, workspace
        piece = max(1, R // max(1, B))  # columns
        sequences, (ids_b, ids_q), (hidden_b, hidden_q) = B, ids.stride(), hidden.stride()[:2]
        if cu_seqlens is not None:
            sequences, ids_b, hidden_b = len(cu_seqlens) - 1, 0, 0
        begin, quiet = 0, min(quiet, q)
        while begin < q and sequences:
            counting = max(begin, quiet)  # from here on a column may want slots
            end = min(counting + piece, q)
            if counting < end:
                flush_for(B * (end - counting), activation, *head_and_slots)
            _walk[(sequences,)](
                ids, hidden, token_class, transition, seq, last_hidden, step_column, step_region, slots, slot_owner, n_slots,
                rows, cu_seqlens, begin, end, quiet, N, V, n_states, C, ids_b, ids_q, hidden_b, hidden_q, H, at_predict,
                maxnreg=96, **OPTIONS,
            )  # fmt: skip
            begin = end
        if immediate:
            flush(*head_and_slots, activation)
