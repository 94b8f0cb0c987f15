"""decode_step: one forward's worth of the stream: detect, gather, score, accumulate. The definition."""

from itertools import pairwise

import torch
from torch import Tensor

from .flush import flush
from .layout import (
    AUTOMATON,
    END,
    HASH,
    HASH_FACTOR,
    N_END,
    N_STEPS,
    N_THINK,
    NEXT_STATE,
    OWNER_REGION,
    OWNER_SEQUENCE,
    OWNER_STEP,
    PAD,
    RELU,
    SEEN,
    START,
    STEP,
    THINK,
)
from .logit_rows import check_activation


def decode_step(
    ids: Tensor, hidden: Tensor,
    token_class: Tensor, transition: Tensor,
    w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
    seq: Tensor, tally: Tensor, last_hidden: Tensor,
    step_column: Tensor, step_region: Tensor, step_score: Tensor,
    slots: Tensor, slot_owner: Tensor, n_slots: Tensor, workspace: Tensor,
    at_predict: bool, immediate: bool, rows: Tensor | None = None, cu_seqlens: Tensor | None = None,
    quiet: int = 0, activation: int = RELU,
) -> None:  # fmt: skip
    """Consume ``q`` tokens of each of ``B`` sequences, or of each as many as ``cu_seqlens`` says.

    A token is a step if the automaton says so, its text index is at least 2 and its column is in scope. The step's
    feature is ``h[t-1]`` (``at_predict``; across calls it is in ``last_hidden``) or ``h[t]``. The feature goes to the next
    free slot; a full buffer is flushed first. ``immediate`` flushes before returning. Slots fill in any order that has the
    steps of each sequence in theirs.

    Args:
        ids: [B, q] int64; hidden: [B, q, H], the states that these tokens produced, strided as they come. Packed: [1, T]
            and [1, T, H]. A packed buffer of int32 is converted by the caller.
        token_class, transition: the automaton, see ``step_mask``.
        w1, b1, w2, b2: the head, see ``score_rows``.
        seq: [N, SEQ_FIELDS] int64, N >= B unless packed with ``rows``. Mutated, as is everything below up to ``workspace``.
        tally: [N, N_REGIONS, TALLY_FIELDS] float64.
        last_hidden: [N, 2, H]; half ``SEEN & 1`` is the state at the last column consumed. Two halves, because within one
            launch some blocks still read the old state while others write the new one; which is which needs no flag.
        step_column: [N, C] int32, step_region: [N, C] int8, step_score: [N, C] float32 (log domain): the step log. Steps
            past its capacity C still count in ``tally``.
        slots: [R, H], slot_owner: [R, OWNER_FIELDS] int32, n_slots: [1] int32: rows gathered and not yet scored.
        workspace: [layout.workspace_size(R + N, K)] float32, zeroed when it is allocated; the kernels' own.
        at_predict: whether the feature is ``h[t-1]``.
        immediate: whether every score exists when the call ends.
        rows: [B] int32, the state row of each sequence, all different, in [0, N); -1: the sequence is skipped. None: row b
            is sequence b's. States of which no row is named rest as they are.
        cu_seqlens: [B + 1] int32, the packed form: sequence b is columns ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``, which
            may be none. Columns outside are padding. None: the dense form.
        quiet: so many columns of ``ids`` at the beginning hold no step that counts, of any sequence: kernels need no slots for
            them and consume them in one piece. A step there does not count, even if it is in scope. 0, more than there are,
            and all between are allowed.
        activation: of the head, see ``logit_rows``.

    Raises:
        ValueError: ``quiet`` is negative, or see ``logit_rows``; RuntimeError, where compiled.
    """
    if quiet < 0:
        raise ValueError(f"quiet={quiet}: expected columns, 0 or more")
    check_activation(activation, w1)
    head_and_slots = w1, b1, w2, b2, tally, step_score, slots, slot_owner, n_slots, workspace, activation
    log_capacity = step_column.shape[1]
    B = len(ids) if cu_seqlens is None else len(cu_seqlens) - 1
    row = torch.arange(B, device=ids.device) if rows is None else rows.long()
    if cu_seqlens is not None:  # one sequence after the other
        bounds = pairwise(cu_seqlens.tolist())
        parts = [(ids[:, i:k], hidden[:, i:k], row[b : b + 1], i) for b, (i, k) in enumerate(bounds)]
    else:
        parts = [(ids, hidden, row, 0)]
    if rows is not None:
        parts = [(*(t[row >= 0] for t in (ids, hidden, row)), i) for ids, hidden, row, i in parts]

    for x, h, row, first in parts:
        s = seq[row]
        for j in range(x.shape[1]):
            column = s[:, SEEN].clone()
            text = column >= s[:, PAD]  # not left padding
            entry = transition[token_class[x[:, j]].long(), s[:, AUTOMATON]].long() * text
            is_step = ((entry & STEP) != 0) & (column - s[:, PAD] >= 2) & (column >= s[:, START]) & (first + j >= quiet)
            region = (s[:, N_THINK] > 0).long() + 2 * (s[:, N_END] > 0).long()  # AFTER_THINK | AFTER_END
            previous = last_hidden[row, column & 1] if j == 0 else h[:, j - 1]
            feature = previous if at_predict else h[:, j]

            for b in is_step.nonzero().flatten().tolist():
                if int(n_slots) == slots.shape[0]:
                    flush(*head_and_slots)
                slot, step = int(n_slots), int(s[b, N_STEPS])
                slots[slot] = feature[b]
                slot_owner[slot, OWNER_SEQUENCE] = row[b]
                slot_owner[slot, OWNER_STEP] = step
                slot_owner[slot, OWNER_REGION] = region[b]
                if step < log_capacity:
                    step_column[row[b], step] = column[b]
                    step_region[row[b], step] = region[b]
                s[b, N_STEPS] += 1
                n_slots += 1

            s[:, AUTOMATON] = torch.where(text, entry & NEXT_STATE, s[:, AUTOMATON])
            s[:, N_THINK] += (entry & THINK) != 0
            s[:, N_END] += (entry & END) != 0
            s[:, HASH] = s[:, HASH] * HASH_FACTOR + x[:, j] + 1
            s[:, SEEN] += 1
        if x.shape[1]:
            seq[row] = s
            last_hidden[row, s[:, SEEN] & 1] = h[:, -1]
    if immediate:
        flush(*head_and_slots)
