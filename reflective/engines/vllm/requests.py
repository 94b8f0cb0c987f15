"""The scores of all requests of one worker: their states by row, from admission to the end, preemptions between included.

A row is fed ``(x[t], h[t-1])``, the token that was sampled with the state that predicted it, in the engine step that sampled it. So
``at="predict"`` is the op's ``at_predict=False``: the score exists in that very step, the last token is nothing special, a prompt has no
rows to be scored, and nothing is rolled back. With ``at="token"`` and ``"every"`` a row is one token behind: ``(x[t], h[t])``.

Nothing here knows vLLM. What is done every step makes no host read; admissions, ends and results may.
"""

import re
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...kernels import layout
from ...scoring.sharded import ShardedHead, aligned
from ...scoring.state import StreamState
from ...scoring.steps import StepTokens
from ...scoring.taps import At
from .options import NAME
from .pruning import PruneRule, Pruning

KEPT = 4096  # results of requests that ended and that nobody has asked for; older ones are dropped


@dataclass(frozen=True)
class Wanted:
    """What a request asks of its scoring, by ``SamplingParams(extra_args={"reflective": {...}})``; nothing need be said.

    Attributes:
        key: by which its scores are asked for; None: the id that was given to vLLM.
        score_from: of a finished text, given as a prompt: the column from which its steps are scored, by the prefill.
        steps: what is known of the given tokens: the log of the request that it goes on from.
        group: of requests among which ``prune`` compares.
        output_from: from which column on the given tokens are what was drawn before, for the presence and frequency penalty; None: none is.
        seeded_by_place: a seed draws the same at a place whether or not the request began before it. Model Runner V2 always does.
    """

    key: str | None = None
    score_from: int | None = None
    steps: Sequence[Sequence[float]] = ()
    group: str | None = None
    output_from: int | None = None
    seeded_by_place: bool = False

    @classmethod
    def of(cls, extra_args: dict[str, Any] | None) -> "Wanted":
        """
        Raises:
            ValueError: what is said is nothing that is known.
        """
        said = (extra_args or {}).get(NAME) or {}
        said = {"key": said} if isinstance(said, str) else said  # all that a vllm_xargs of HTTP can hold
        try:
            return cls(**said)
        except TypeError as error:
            raise ValueError(f"extra_args[{NAME!r}]={said!r}: {error}") from None


def given_id(request: str) -> str:
    """The id of which vLLM made ``request``, its own: ``"{index}_"`` before it for children of n > 1, a random suffix behind it."""
    return re.sub(r"-[0-9a-f]{8}$", "", re.sub(r"^\d+_", "", request))


@dataclass
class Log:
    """What a request has come to.

    Attributes:
        key: see ``Wanted``; request: vLLM's own id.
        seen: tokens consumed, prompt included; hash: of these, see ``scoring.state.hash_ids``. With asynchronous scheduling or speculation
            some were sampled past the end.
        newest: the last tokens consumed, oldest first, where more than one may have been sampled past an end.
        steps: every step that was scored, ``(column, region, log_score)``, whether or not it counts; a column may come twice.
        n_found: how many there were, those beyond the capacity of the log included.
        pruned: whether it was told to end by ``prune``.
    """

    key: str
    request: str
    seen: int
    hash: int
    newest: list[int]
    steps: list[tuple[int, int, float]]
    n_found: int
    pruned: bool = False


@dataclass(eq=False)
class _Seat:
    row: int
    request: str
    wanted: Wanted
    prompt_length: int
    ids: Sequence[int] = ()  # of the text, while its prefill is scored
    fed: int = 0  # of these
    left: bool = False  # finished, aborted or preempted
    forget: bool = False  # when it leaves: the worker hears of an end with the next step

    @property
    def key(self) -> str:
        return self.wanted.key or given_id(self.request)


@dataclass(eq=False)
class _Staged:
    """An admission that is yet to be run."""

    row: int
    ids: Sequence[int]
    start: int  # column of the first step that is in scope
    steps: list[tuple[int, int, float]] = field(default_factory=list)
    pending: int = -1


class Requests:
    """
    Args:
        steps: with as many classes as the model has ids, on its device.
        placed: the head there, loaded.
        seats: requests that decode together at most.
        past: tokens that can be sampled past an end; with more than one the newest are remembered.
        max_steps: that are logged of a request.
        rule: of ``prune``; None: nothing is pruned.
        ends: tokens that end a response.
    """

    def __init__(
        self, steps: StepTokens, placed: ShardedHead, *, at: At, seats: int, past: int = 1, max_steps: int = 4096,
        rule: PruneRule | None = None, ends: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self.steps, self.placed, self.at, self.ends = steps, placed, at, sorted(ends)
        head, device = placed.head, placed.device
        rows = 2 * seats + 64  # those that left stay until as many places are needed
        self.dtype, width = head.dtype, aligned(head.hidden_size)
        self.state = StreamState.allocate(
            rows,
            width,
            head.width,
            buffer_rows=max(256, 2 * seats),
            max_steps=max_steps,
            dtype=self.dtype,
            device=device,
        )
        # One row more, into which goes what belongs to none.
        self._newest = torch.zeros(rows + 1, past if past > 1 else 0, dtype=torch.int64, device=device)
        self._pending = torch.zeros(
            rows + 1, dtype=torch.int64, device=device
        )  # all but at="predict": sampled, its own state unknown
        self._no_hidden = torch.zeros(1, 1, width, dtype=self.dtype, device=device)
        self.pruning = None if rule is None else Pruning(rule, rows, max_steps, self.ends, device)
        self._seats: dict[str, _Seat] = {}  # by vLLM's ids
        self._by_key: dict[str, dict[str, None]] = {}  # vLLM's ids
        self._free = list(range(rows - 1, -1, -1))
        self._left: OrderedDict[str, None] = OrderedDict()  # whose seats may be taken, oldest first
        self._kept: OrderedDict[str, Log] = OrderedDict()  # those that lost theirs
        self._staged: list[_Staged] = []
        self.by_prefill: set[str] = set()  # requests whose prefill is scored
        self.seconds, self.calls, self.resumed = 0.0, 0, 0

    # -- requests ----------------------------------------------------------------------------------------------------

    def __contains__(self, request: str) -> bool:
        return request in self._seats

    def row(self, request: str) -> int:
        """Of one that was admitted, and of which ``leave`` was not said."""
        return self._seats[request].row

    def admit(self, request: str, ids: Sequence[int], prompt_length: int, wanted: Wanted) -> int:
        """A request enters with its prompt, or again after a preemption with what it had generated; its row. ``settle`` has to follow.

        What it had sampled beyond ``ids`` is dropped: it will be sampled again.
        """
        self.leave(request)
        known = [tuple(s) for s in wanted.steps]
        if (before := self.log([request], forget=True)) and before[0].seen:
            self.resumed += 1
            known = before[0].steps
        seat = self._seats[request] = _Seat(self._new_row(), request, wanted, prompt_length)
        self._by_key.setdefault(seat.key, {})[request] = None
        start = prompt_length
        if wanted.score_from is not None and len(ids) == prompt_length:
            start = seat.fed = min(wanted.score_from, len(ids))
            seat.ids = ids
            self.by_prefill.add(request)
        elif wanted.score_from is not None:
            start = wanted.score_from
        fed = seat.fed if seat.ids else len(ids)
        pending = -1
        if self.at != "predict" and fed == len(ids):
            fed, pending = fed - 1, ids[-1]
            seat.fed = min(seat.fed, fed)
        kept = [s for s in known if s[0] < (len(ids) if seat.ids else fed)]
        self._staged.append(_Staged(seat.row, ids[:fed], max(start, fed), kept, pending))
        if self.pruning:
            self.pruning.admit(seat.row, wanted.group)
        return seat.row

    def leave(self, request: str) -> None:
        """A request has finished, was aborted or preempted. What it has come to stays."""
        seat = self._seats.get(request)
        if seat is not None and not seat.left:
            seat.left, seat.ids = True, ()
            self.by_prefill.discard(request)
            self._left[request] = None
            if seat.forget:
                self._forget(request)

    def _new_row(self) -> int:
        if not self._free:
            gone = list(self._left)
            if not gone:
                raise RuntimeError("more requests decode than there are seats for; raise max_num_seqs")
            for log in self._read([self._seats[r] for r in gone]):
                self._kept[log.request] = log
                self._vacate(log.request)
            while len(self._kept) > KEPT:
                self._forget(next(iter(self._kept)))
        return self._free.pop()

    def _vacate(self, request: str) -> None:
        self._free.append(self._seats.pop(request).row)
        self._left.pop(request, None)

    def _forget(self, request: str) -> None:
        """One that has left."""
        key = self._seats[request].key if request in self._seats else self._kept[request].key
        self._kept.pop(request, None)
        if request in self._seats:
            self._vacate(request)
        self._by_key[key].pop(request)
        if not self._by_key[key]:
            del self._by_key[key]

    def settle(self) -> None:
        """Run the admissions: the automaton over all given tokens, in one call, and what is known of their steps."""
        if not self._staged:
            return
        began = time.perf_counter()
        staged, self._staged = self._staged, []
        state = self.state
        self._flush()  # nothing of a row's former request may wait
        lengths = torch.tensor([len(s.ids) for s in staged])
        rows, starts, pending = self._sent([[s.row, s.start, s.pending] for s in staged]).unbind(1)
        state.restart(rows, torch.zeros_like(rows), starts)
        self._pending[rows] = pending
        if total := int(lengths.sum()):
            ids = self._sent([t for s in staged for t in s.ids])
            bounds = self._sent([0, *lengths.cumsum(0).tolist()], torch.int32)
            self._run(ids[None], self._no_hidden.expand(1, total, -1), rows.int(), bounds, quiet=total)
        for s in staged:
            if s.steps:
                self._put(s.row, s.steps)
        self.seconds += time.perf_counter() - began

    def _put(self, row: int, steps: Sequence[tuple[int, int, float]]) -> None:
        state, capacity = self.state, self.state.step_column.shape[1]
        columns, regions = self._sent([s[:2] for s in steps]).unbind(1)
        scores = self._sent([s[2] for s in steps], torch.float32)
        k = min(len(steps), capacity)
        state.step_column[row, :k], state.step_region[row, :k], state.step_score[row, :k] = (
            columns[:k].int(), regions[:k].to(torch.int8), scores[:k],
        )  # fmt: skip
        state.seq[row, layout.N_STEPS] = len(steps)
        tally = state.tally[row]
        tally[:, layout.COUNT].index_add_(0, regions, torch.ones_like(regions, dtype=tally.dtype))
        tally[:, layout.LOG_SUM].index_add_(0, regions, scores.to(tally.dtype))

    def _sent(self, values: Sequence[Any], dtype: torch.dtype = torch.int64) -> Tensor:
        """On the device, which is not waited for."""
        return torch.tensor(values, dtype=dtype).to(self.placed.device, non_blocking=True)

    # -- steps -------------------------------------------------------------------------------------------------------

    def prefilled(self, request: str, begin: int, hidden: Tensor) -> None:
        """The columns ``begin`` to ``begin + len(hidden)`` of one of ``by_prefill`` were run, with these states [q, H] after them, and what they
        say is taken. Columns that were cached, and so have no states, are fed silently."""
        seat = self._seats[request]
        behind = int(self.at == "predict")  # the state at column t is for the token at t + 1, or for its own
        first = max(begin + behind, seat.fed)
        last = min(begin + len(hidden) + behind, len(seat.ids) - (1 - behind))
        row = self._sent([seat.row], torch.int32)
        if seat.fed < first:  # not in scope, as their steps have no state: the log says what is missing
            self._feed(seat.ids[seat.fed : first], None, row)
            seat.fed = first
        if first < last:
            self._feed(seat.ids[first:last], hidden[first - behind - begin : last - behind - begin], row)
            seat.fed = last
        if seat.fed >= len(seat.ids) - (1 - behind):
            if not behind:
                self._pending[seat.row] = seat.ids[-1]
            seat.ids = ()
            self.by_prefill.discard(request)

    def _feed(self, ids: Sequence[int], hidden: Tensor | None, row: Tensor) -> None:
        tokens = self._sent([list(ids)])
        if hidden is not None:
            self._run(tokens, hidden[None], row)
            return
        self._run(tokens, self._no_hidden.expand(1, len(ids), -1), row, quiet=len(ids))

    def force(self, sampled: Tensor, rows: Tensor) -> None:
        """Overwrite ``sampled`` [B] of those of ``rows`` [B] that are to end, by a token that ends a response."""
        if self.pruning:
            sampled.masked_fill_(self.pruning.stopped(rows), self.ends[0])

    def consume(self, ids: Tensor, hidden: Tensor, rows: Tensor) -> None:
        """A token was sampled of each request: ``ids`` [B] int64, the states [B, H] that predicted them, ``rows`` [B] int32; -1: of this one
        none was."""
        began = time.perf_counter()
        fed = ids
        if self.at != "predict":
            at = self._at(rows)
            fed = self._pending[at]
            self._pending[at] = ids
        self._run(fed[:, None], hidden[:, None], rows)
        if self.pruning:
            self.pruning.observe(self.state, ids, rows)
        self.calls += 1
        self.seconds += time.perf_counter() - began

    def consume_some(self, ids: Tensor, accepted: Tensor, hidden: Tensor, first: Tensor, rows: Tensor) -> None:
        """Of each request several tokens were sampled, or drafted and accepted; which the host does not know.

        Args:
            ids: [B, K] int64, of which the first ``accepted`` [B] count; anything behind them.
            hidden: [L, H]: row ``first[b] + j`` predicted ``ids[b, j]``.
            rows: [B] int32; -1: none.
        """
        began = time.perf_counter()
        B, K = ids.shape
        j = torch.arange(K, device=ids.device)
        accepted = torch.where(rows >= 0, accepted, 0).long()
        taken = j < accepted[:, None]  # [B, K]
        ends = accepted.cumsum(0)
        place = torch.where(
            taken, (ends - accepted)[:, None] + j, B * K
        ).flatten()  # those behind: to a place nobody reads
        fed = ids.clamp_min(0)
        at = self._at(rows)
        if self.at != "predict":
            fed = torch.cat([self._pending[at][:, None], fed], 1)
            self._pending[at] = fed.gather(1, accepted[:, None])[:, 0]
            fed = fed[:, :-1]
        newest = torch.cat([self._newest[at], fed], 1)
        window = accepted[:, None] + torch.arange(self._newest.shape[1], device=ids.device)
        self._newest[at] = newest.gather(1, window)
        packed = ids.new_zeros(B * K + 1).scatter_(0, place, fed.flatten())
        source = torch.where(taken, first.long()[:, None] + j, 0).flatten()
        states = hidden.new_zeros(B * K + 1, hidden.shape[1]).index_copy_(0, place, hidden[source])
        bounds = torch.cat([ends.new_zeros(1), ends]).int()
        self._run(packed[None, : B * K], states[None, : B * K], rows, bounds)
        self.calls += 1
        self.seconds += time.perf_counter() - began

    def _at(self, rows: Tensor) -> Tensor:
        """Places [B] int64 of ``rows`` [B] in what has a row more than the state, for none."""
        return torch.where(rows >= 0, rows, len(self._pending) - 1).long()

    def _run(self, ids: Tensor, hidden: Tensor, rows: Tensor, bounds: Tensor | None = None, quiet: int = 0) -> None:
        self.placed.backend.decode_step(
            ids, hidden, self.steps.token_class, self.steps.transition, *self.placed.weights, *self.state.tensors(),
            False, self.pruning is not None, rows, bounds, quiet, self.placed.activation,
        )  # fmt: skip

    def _flush(self) -> None:
        self.placed.flush(self.state, len(self.state.slots))

    # -- results -----------------------------------------------------------------------------------------------------

    def find(self, keys: Iterable[str]) -> list[str]:
        """vLLM's ids of the requests that have these keys, or these very ids."""
        found: dict[str, None] = {}
        for key in keys:
            found |= self._by_key.get(key, {})
            if key in self._seats or key in self._kept:
                found[key] = None
        return list(found)

    def log(self, requests: Sequence[str], *, forget: bool) -> list[Log]:
        """What ``requests``, vLLM's ids, have come to; of unknown ones nothing. ``forget``: that was the last that is asked of them."""
        self.settle()
        found = {log.request: log for log in self._read([self._seats[r] for r in requests if r in self._seats])}
        found |= {r: self._kept[r] for r in requests if r in self._kept and r not in found}
        if forget:
            for r in found:
                if r in self._seats and not self._seats[r].left:
                    self._seats[r].forget = True
                else:
                    self._forget(r)
        return [found[r] for r in requests if r in found]

    def _read(self, seats: Sequence[_Seat]) -> list[Log]:
        """A handful of device reads for all of them."""
        if not seats:
            return []
        self._flush()
        rows = torch.tensor([s.row for s in seats], device=self.placed.device)
        seq = self.state.seq[rows].cpu()
        capacity = self.state.step_column.shape[1]
        found = seq[:, layout.N_STEPS]
        most = min(capacity, max(found.tolist()))
        columns, regions, scores = (
            t[rows, :most].tolist() for t in (self.state.step_column, self.state.step_region, self.state.step_score)
        )
        newest = self._newest[rows].tolist()
        pruned = self.pruning.stop[rows].tolist() if self.pruning else [False] * len(seats)
        logs = []
        for i, s in enumerate(seats):
            k = min(int(found[i]), capacity)
            steps = list(zip(columns[i][:k], regions[i][:k], scores[i][:k], strict=True))
            logs.append(
                Log(
                    s.key, s.request, int(seq[i, layout.SEEN]), int(seq[i, layout.HASH]), newest[i],
                    steps, int(found[i]), pruned[i],
                )
            )  # fmt: skip
        return logs

    def stats(self) -> dict[str, float]:
        """``seconds`` of host time in the scorer and the ``calls`` that it took; requests ``resumed`` after a preemption; ``rows`` in use, ``free``
        ones, results ``kept`` aside."""
        return {
            "seconds": self.seconds, "calls": self.calls, "resumed": self.resumed, "rows": len(self._seats),
            "free": len(self._free), "kept": len(self._kept),
        }  # fmt: skip
