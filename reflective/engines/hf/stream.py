"""The stream of tokens that a scorer consumes: the state on the device, the op that moves it on, and the buffer."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...scoring.sharded import ShardedHead
from ...scoring.state import StreamState
from ...scoring.steps import StepTokens
from ...scoring.taps import At
from .backbone import Backbone

Schedule = Literal["deferred", "immediate"]
Scope = Literal["response", "text"]
Record = list[tuple[Tensor, Tensor]]  # (rows, owners) moved out of a buffer


@dataclass
class Mark:
    """A place to which a stream can be rewound; nothing waited in the buffer there."""

    seen: int
    before: tuple[Tensor, ...]  # the state's snapshot
    recorded: int


class Stream:
    """The state of all sequences, and how far the current generation has come.

    Args:
        placed: the head on the model's device, loaded before the first token.
        backbone, steps, schedule, at, scope, buffer_rows, max_steps, record_features: as for ``StreamScorer``.

    Attributes:
        state: of the sequences; None before the first.
        batch: sequences of the current generation; 0 before the first.
        seen: columns consumed, a host-side twin of the state's SEEN.
        recorded: what ``record_features`` keeps, of what was scored so far.
        flushes_by_hand: whether the buffer must not empty itself: rows are to be kept, or a part of the head cannot score
            them.
    """

    def __init__(
        self, backbone: Backbone, placed: ShardedHead, steps: StepTokens, *, schedule: Schedule, at: At, scope: Scope,
        buffer_rows: int, max_steps: int, record_features: bool,
    ) -> None:  # fmt: skip
        self.backbone, self.placed, self.steps = backbone, placed, steps
        self.schedule, self.at, self.scope = schedule, at, scope
        self.buffer_rows, self.max_steps, self.record_features = buffer_rows, max_steps, record_features
        self.flushes_by_hand = record_features or placed.group is not None
        self.state: StreamState | None = None
        self.batch = self.seen = 0
        self.recorded: Record = []
        self._start = 0  # first column in scope
        self._waiting = 0  # where flushed by hand, no more rows than these wait in the buffer

    # -- sequences ---------------------------------------------------------------------------------------------------

    def begin(self, pad: Tensor, prompt_length: int) -> None:
        """A generation begins: prompts of so many columns, of which ``pad`` [B] are left padding."""
        self.allocate(len(pad))
        self._start = self._first_in_scope(prompt_length)
        self.state.reset(pad, torch.full_like(pad, self._start))
        self.batch, self.seen, self._waiting, self.recorded = len(pad), 0, 0, []

    def restart(self, rows: list[int], pad: Tensor, prompt_length: int) -> None:
        """The same for the sequences ``rows`` alone, nothing of which waits in the buffer."""
        self.batch = self.batch or len(pad)
        self.state.restart(torch.tensor(rows, device=pad.device), pad, self._first_in_scope(prompt_length))

    def allocate(self, n: int) -> None:
        """Room for ``n`` sequences; what those in the state have come to stays."""
        b = self.backbone
        if self.state is not None:
            self.state = self.state.grown(n, self.placed.head.width)
        else:
            self.state = StreamState.allocate(
                n, b.width, self.placed.head.width, buffer_rows=max(self.buffer_rows, n), max_steps=self.max_steps,
                dtype=b.dtype, device=b.device,
            )  # fmt: skip

    def select(self, indices: Tensor) -> None:
        """Sequence i of the generation goes on from what was ``indices[i]``. Nothing may wait in the buffer."""
        self.allocate(len(indices))
        self.state.put(torch.arange(len(indices), device=indices.device), indices, min(self.seen, self.max_steps))
        self.batch = len(indices)

    def _first_in_scope(self, prompt_length: int) -> int:
        return prompt_length if self.scope == "response" else 0

    # -- tokens ------------------------------------------------------------------------------------------------------

    def consume(self, ids: Tensor, hidden: Tensor, rows: Tensor | None = None, prompt: bool = False) -> None:
        """Tokens [n, q] and what is read of them [n, q, K]: of sequences 0 to n-1, or of ``rows`` [n] int32, of whose prompts they all
        are (``prompt``)."""
        n, q = ids.shape
        # Columns before the scope: whatever they hold, no step of it counts. Of assigned states the host knows no column.
        quiet = self._start - self.seen if rows is None else self._first_in_scope(q) if prompt else 0
        quiet = min(max(quiet, 0), q)
        if not self.flushes_by_hand:
            self.run(self.state, ids, hidden, rows, quiet=quiet)
            self.seen += q
            return
        room, begin = len(self.state.slots), 0
        # GPU kernels give the steps of several columns their slots in any order; ranks must agree on it.
        piece = 1 if self.placed.group else max(1, room // n)
        while begin < q:
            end = quiet if begin < quiet else min(begin + piece, q)
            most = 0 if begin < quiet else (end - begin) * n
            if self._waiting + most > room:
                self.settle()
            self.run(self.state, ids[:, begin:end], hidden[:, begin:end], rows, quiet=max(quiet - begin, 0))
            self.seen += end - begin
            self._waiting += most
            begin = end
        if self.schedule == "immediate":
            self.settle()

    def run(
        self, state: StreamState, ids: Tensor, hidden: Tensor, rows: Tensor | None = None, bounds: Tensor | None = None,
        quiet: int = 0,
    ) -> None:  # fmt: skip
        """The op, on ``state``; the host's count is not moved on. No step of the first ``quiet`` columns counts."""
        self.placed.backend.decode_step(
            ids, hidden, self.steps.token_class, self.steps.transition, *self.placed.weights, *state.tensors(),
            self.at == "predict", self.schedule == "immediate" and not self.flushes_by_hand, rows, bounds, quiet,
            self.placed.activation,
        )  # fmt: skip

    def no_hidden(self, n: int, q: int = 1) -> Tensor:
        """Features [n, q, K] for tokens whose own are not known."""
        b = self.backbone
        return torch.zeros(n, 1, b.width, dtype=b.dtype, device=b.device).expand(-1, q, -1)

    def moved_on(self, columns: int | None) -> None:
        """So many columns were consumed unseen, by ``run``; None: the device is asked how many there are by now."""
        if columns is None:
            self.seen = int(self.state.seen()[: self.batch].max())
        else:
            self.seen += columns

    # -- the buffer --------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Score what waits in the buffer."""
        self.flush(self.state, self._waiting, self.recorded)
        self._waiting = 0

    def flush(self, state: StreamState, rows: int, record: Record) -> None:
        """Score the rows in the buffer of ``state``, ``rows`` at the most; those to be kept go to ``record``."""
        if self.record_features and (n := int(state.n_slots)):
            record.append((state.slots[:n].clone(), state.slot_owner[:n].clone()))
        self.placed.flush(state, rows)

    def mark(self) -> Mark:
        """Where the stream is now; scores what waits."""
        self.settle()
        return Mark(self.seen, self.state.snapshot(), len(self.recorded))

    def rewind(self, mark: Mark) -> None:
        """Undo everything since ``mark``."""
        self.state.restore(mark.before)
        self._waiting = 0
        del self.recorded[mark.recorded :]
        self.seen = mark.seen
