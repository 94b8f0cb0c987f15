"""What a stream has come to: the tallies of its sequences, after it is checked that they are the texts asked about."""

from typing import Any

import torch
from torch import Tensor

from ...kernels import layout
from ...scoring.state import SequenceTally, StreamState, hash_ids, hash_prefixes
from . import internals
from .lineage import Lineage
from .stream import Record, Stream


class Results:
    """Reads the stream, and never moves it on: what a sequence's last token adds is found on a copy."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._returned: Tensor | None = None  # hashes [B] of what `generate` returned last
        self._read: StreamState | None = None  # the state that the last result was read from
        self._recorded_last: Record = []  # of the token that was never fed back

    def begin(self) -> None:
        """A result is asked for, or there is a new generation to ask about."""
        self._recorded_last = []

    def returned(self, ids: Tensor | None) -> None:
        """``generate`` returned these sequences [B, T]; None: it has just begun."""
        self._returned = None if ids is None else hash_ids(ids)

    # -- tallies -----------------------------------------------------------------------------------------------------

    def of_all(self) -> list[SequenceTally]:
        """Of what the model has consumed so far."""
        self._read = self._stream.state
        return self._stream.state.sequences(range(self._stream.batch))

    def of_batch(self, ids: Tensor) -> list[SequenceTally]:
        """Of the sequences [B, T], of which all but one token at the most was consumed.

        Raises:
            ValueError: they are others.
        """
        T, batch = self._stream.seen, self._stream.batch
        if ids.dim() != 2 or ids.shape[0] != batch or not T <= ids.shape[1] <= T + 1:
            raise self._other(
                ids, f"shape {list(ids.shape)} does not continue the {batch} x {T} tokens decoded while attached"
            )
        self._check_hashes(ids[:, :T], self._stream.state.hashes()[:batch], ids)
        return self._after(list(range(batch)), ids[:, T:])

    def of_states(self, rows: list[int], sequences: Any) -> list[SequenceTally]:
        """Of the states ``rows``, whose texts are ``sequences``, [T_i] each; None: as they are.

        Raises:
            ValueError: they have other texts.
        """
        state = self._stream.state
        if sequences is None:
            return state.sequences(rows)
        device = self._stream.backbone.device
        texts = [ids.to(device) for ids in sequences]
        seen = state.seen()[rows].tolist()
        for row, ids, n in zip(rows, texts, seen, strict=True):
            if not n <= len(ids) <= n + 1:
                raise ValueError(f"sequences: {len(ids)} tokens do not continue the {n} that state {row} has consumed")
        consumed = torch.stack([hash_ids(ids[None, :n])[0] for ids, n in zip(texts, seen, strict=True)])
        self._check_hashes(consumed, state.hashes()[rows])
        found: dict[int, SequenceTally] = {}
        for extra in (0, 1):
            group = [i for i, (ids, n) in enumerate(zip(texts, seen, strict=True)) if len(ids) - n == extra]
            if group:
                unfed = torch.stack([texts[i][seen[i] :] for i in group])
                found |= dict(zip(group, self._after([rows[i] for i in group], unfed), strict=True))
        return [found[i] for i in range(len(rows))]

    def of_hypotheses(self, ids: Tensor, lineage: Lineage) -> list[SequenceTally]:
        """Of what beam search returned: hypotheses [M, T] that ended at any time, padded to one length.

        Raises:
            ValueError: they are others, or one ends in a step whose state is lost.
        """
        stream, T, found = self._stream, self._stream.seen, {}
        # The rows as they were before beam search reordered them for a step that it did not take.
        state = lineage.latest if lineage.seen[-1] == T else stream.state
        prefix = hash_prefixes(ids)[:, T - 1] if ids.shape[1] >= T else ids.new_zeros(len(ids)) - 1
        alive = prefix[:, None] == state.hashes()[None, : stream.batch]  # [M, B]
        living = {i: int(match.nonzero()[0]) for i, match in enumerate(alive.cpu()) if match.any()}
        if living:
            states = self._after(list(living.values()), ids[list(living), T : T + 1], state)
            found |= dict(zip(living, states, strict=True))
        ended = [i for i in range(len(ids)) if i not in living]
        for i, place in zip(ended, lineage.find(ids[ended]) if ended else [], strict=True):
            rest = ids[i, lineage.seen[place[0]] :] if place else ids[i]
            last, padding = rest[:1], rest[1:]
            if place is None or (padding != padding[:1]).any():
                raise self._other(ids, f"row {i} is none that beam search decoded")
            if stream.at == "predict" and self._end_steps(last):
                raise ValueError(
                    f"sequences: row {i} ends in token {int(last)}, a step-token whose state was given up with its beam; "
                    "sample instead, or use an end-of-sequence token that ends no step"
                )
            found[i] = lineage.tally(*place)
        return [found[i] for i in range(len(ids))]

    def features(self) -> tuple[Tensor, Tensor]:
        """``(features [M, H], sequence [M] int64)`` of the steps that the last result scored; see ``StreamScorer``."""
        records = self._stream.recorded + self._recorded_last
        if not records:
            b = self._stream.backbone
            return torch.empty(0, b.width, dtype=b.dtype), torch.empty(0, dtype=torch.int64)
        rows, owners = (torch.cat(parts) for parts in zip(*records, strict=True))
        order = self._read.counted_order(owners)
        return rows[order], owners[order, 0].long()

    def _after(self, rows: list[int], unfed: Tensor, state: StreamState | None = None) -> list[SequenceTally]:
        """Of the states ``rows`` once they have consumed ``unfed`` [len(rows), 0 or 1]; by a copy, as decoding may go on."""
        stream = self._stream
        state = state or stream.state
        if not unfed.shape[1]:
            self._read = state
            return state.sequences(rows)
        copy = self._read = state.take(rows)
        if stream.at != "predict":
            copy.silence()
        stream.run(copy, unfed, stream.no_hidden(len(rows)))
        stream.flush(copy, len(rows), self._recorded_last)
        return copy.sequences(range(len(rows)))

    def _end_steps(self, ids: Tensor) -> bool:
        """Whether any of ``ids`` [n] ends a step."""
        steps = self._stream.steps
        return bool((steps.transition[steps.token_class[ids].long()] & layout.STEP).any())

    # -- checks ------------------------------------------------------------------------------------------------------

    def _check_hashes(self, ids: Tensor, expected: Tensor, sequences: Tensor | None = None) -> None:
        """``ids`` [B, T], or their hashes [B], of ``sequences``."""
        differ = (hash_ids(ids) if ids.dim() == 2 else ids) != expected
        if differ.any():
            rows = differ.nonzero().flatten().tolist()
            raise self._other(sequences, f"rows {rows} are not the tokens that the model decoded")

    def _other(self, ids: Tensor | None, what: str) -> Exception:
        """The error for sequences of which ``what`` is wrong: they are others than those of ``generate``, or what ``generate``
        did was not heard as it was done."""
        if ids is not None and self._returned is not None and ids.dim() == 2:
            own = hash_ids(ids)
            if own.shape == self._returned.shape and torch.equal(own, self._returned.to(own.device)):
                return internals.unknown(
                    f"sequences: they are what generate returned, but {what}, so it decoded in a way that cannot be followed: "
                    "forwards on several caches, or ids that were changed after the model had seen them, as by custom_generate",
                    self._stream.backbone.model,
                )
        return ValueError(f"sequences: {what}; pass what generate returned, unchanged")
