"""Sequences that decode together by a step of fixed shape.

Each sequence has a seat: a row of a cache whose tensors stay where they are, however sequences come, grow and go. So a step can be
recorded as a CUDA graph, for a number of seats and a number of columns (powers of two), and replayed: the model's forward, the scorer's
op, the draw of the next token and the test whether a sequence goes on are all in it, and the host asks for the next step before it has
read the one before.

A seat halts by itself, on the device, where its sequence ends (an end-of-sequence token, its last token) and where the steps that count
change while somebody awaits them; whoever reads the step learns of it afterwards. So no token is fed that would have to be taken back.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...scoring.scores import step_scores
from ...scoring.state import StreamState
from ..base import Chance, Sampling
from .attention import NAME, Shared, Unseatable, calls, takes_shared
from .batch import Drawn, Forward
from .internals import SeatCache, SeatLayer, can_exchange_attention, exchange_attention, vary
from .kv import Row, Rows
from .sampling import Rules, Uses, log_probs_of, pick
from .scorer import StreamScorer
from .sequences import Continuation, Prefix

LEAST_COLUMNS = 256  # of a captured step: with fewer a short answer would be captured several times
SLICE = 64  # columns by which what attention reads widens where nothing is captured
# Of tokens: prompts are read by all of their sequences where copies would take so many more. A step has to be captured anew for them.
SHARED = 32_768


def why_unseatable(model: PreTrainedModel, scorer: StreamScorer) -> str | None:
    """What stands in the way, as far as it is known without a forward; None: nothing."""
    name, config = type(model).__name__, model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if not can_exchange_attention(model):
        return f"the attention of {name} cannot be exchanged"
    if kinds:
        return f"{name} has layers of {', '.join(sorted(kinds))}"
    if len({weight.device for weight in model.parameters()}) > 1:
        return f"the weights of {name} are on several devices"
    if scorer.flushes_by_hand:
        return "its scorer keeps features, has a part of the head alone, or several heads"
    return None


def _logits(
    call: Forward, cache: SeatCache, ids: Tensor, lengths: Tensor, begins: Tensor, shared: Shared | None
) -> Tensor:
    """[S, V] after ``ids`` [S, 1], each behind ``lengths`` tokens of its seat and ``begins`` of a prompt. No method: what is compiled
    for one object would be compiled for the next."""
    there = torch.arange(cache.columns, device=lengths.device) <= lengths
    # As attention adds it: of booleans each layer would make it anew, by five kernels.
    mask = torch.zeros(there.shape, dtype=cache.dtype, device=there.device).masked_fill(~there, -torch.inf)
    others = {} if shared is None else {"shared_prompts": shared}
    return call(cache, ids, begins + lengths, mask[:, None, None], **others)


def worth_sharing(prefix: Prefix) -> bool:
    """Whether a copy of the prompt for each of its sequences would take too much."""
    return (len(prefix.sequences) - 1) * len(prefix.prompt.ids) >= SHARED


def _power(n: int) -> int:
    """The least power of two that is not less."""
    return 1 << max(0, n - 1).bit_length()


@dataclass
class _Places:
    """What the device knows of S seats.

    Attributes:
        token: [S] int64, drawn last; length: [S] int64, tokens of the seat in the cache; left: [S] int64, how many it may still draw.
        begin: [S] int64, tokens of a shared prompt before these; reads: [S] int64, which of the shared prompts it is, or -1.
        live: [S] bool, whether it goes on; awaited: [S] bool, whether it halts when steps that count change.
        number: [S] int64, which seat it is; row: [S] int32, its state in the scorer; heard: [S] int32, the same where it is being fed, else -1.
        sent: [3, S] float64, of each step: a uniform, the token that it is forced to or -1, whether it may be fed.
    """

    token: Tensor
    length: Tensor
    begin: Tensor
    reads: Tensor
    left: Tensor
    live: Tensor
    awaited: Tensor
    number: Tensor
    row: Tensor
    heard: Tensor
    sent: Tensor

    @classmethod
    def empty(cls, seats: int, device: torch.device) -> "_Places":
        whole = lambda: torch.zeros(seats, dtype=torch.int64, device=device)
        flag = lambda: torch.zeros(seats, dtype=torch.bool, device=device)
        row = lambda: torch.full((seats,), -1, dtype=torch.int32, device=device)
        sent = torch.zeros(3, seats, dtype=torch.float64, device=device)
        number = torch.arange(seats, device=device)
        return cls(whole(), whole(), whole(), whole() - 1, whole(), flag(), flag(), number, row(), row(), sent)

    def first(self, n: int) -> "_Places":
        """Of the first ``n`` seats, not copied."""
        return _Places(*(getattr(self, f.name)[..., :n] for f in fields(self)))

    def move(self, source: int, target: int) -> None:
        for f in fields(self):
            if f.name != "number":
                t = getattr(self, f.name)
                t[..., target] = t[..., source]

    def take(self, other: "_Places") -> None:
        """What the seats of ``other``, no more than these, have."""
        for f in fields(self):
            old = getattr(other, f.name)
            getattr(self, f.name)[..., : old.shape[-1]] = old


@dataclass
class _Step:
    """What runs a step, and the scorer's state and weights, of which it has the tensors."""

    run: Callable[[], Tensor]
    state: StreamState
    weights: tuple[Tensor, ...]


@dataclass
class _Launched:
    """A step that was asked for: who is fed on which seat, and what will have come of it.

    Attributes:
        found: [S, 6 + 2 likely] float64 on the host: token, log-probability, whether it was fed, steps, score of the newest of them, tags;
            the likeliest tokens, and their log-probabilities.
        done: a CUDA event behind it, or None.
    """

    fed: list[tuple[int, Continuation]]
    likely: int
    steps: bool
    found: Tensor
    done: Any


class Seats:
    """Args:
        model: on one device; scorer: of it, attached.
        ends: tokens that end a sequence.
        compiled: whether the forward is compiled, which takes a minute for a model of some billions of weights.

    Attributes:
        how: ``"seats"``, ``"captured"`` or ``"compiled"``.
        seated: the sequences that have one, and None for an empty seat.
        ahead: whether a step may be launched before the one before it is read; keeps_idle: whether a sequence may sit without
            being fed.
        unread: how many were launched and not read.
        why_not_compiled: the error, where compiling was tried in vain.

    Raises:
        Unseatable: by ``learn`` and ``launch``.
    """

    keeps_idle = True

    def __init__(
        self, model: PreTrainedModel, scorer: StreamScorer, ends: frozenset[int], *, compiled: bool = False
    ) -> None:
        if (why := why_unseatable(model, scorer)) is not None:
            raise Unseatable(why)
        self.device, self.scorer, self.ends, self.compiled = model.device, scorer, ends, compiled
        self.ahead = self.captures = self.device.type == "cuda"
        self.seated: list[Continuation | None] = []
        self._call = Forward.of(model)
        self._ends = torch.tensor(sorted(ends) or [-1], device=self.device)
        self._shapes: list[tuple[int, int, int, torch.dtype]] = []  # of a layer: heads, widths of keys and of values
        self._layers: list[tuple[Tensor, Tensor]] = []  # keys and values [S, heads, C, width] of each
        self._columns = 0  # C
        self._places: _Places | None = None
        self._rules: Rules | None = None
        self._ruled: list[Sampling | None] = []  # whom the rules are of
        self._logits: Tensor | None = None  # [S, V] after what each was fed last
        self._compiled: Callable[..., Tensor] | None = None  # the forward
        self._can_share = takes_shared(model)  # as far as it is known before ``learn``
        self._prompts: list[Prefix] = []  # that are shared
        self._steps: dict[tuple, _Step] = {}
        self.why_not_compiled: str | None = None
        self._launched: list[_Launched] = []
        self._pool: Any = None  # of the graphs' memory

    @property
    def how(self) -> str:
        return "compiled" if self._compiled else "captured" if self.captures else "seats"

    @property
    def unread(self) -> int:
        return len(self._launched)

    # -- who sits where ----------------------------------------------------------------------------------------------

    def learn(self, rows: Rows, logits: Tensor) -> None:
        """What keys, values and logits are like, from rows of nobody and logits [0, V]; and how the model attends, from a token of nobody.

        Raises:
            Unseatable: a layer has no keys of its own, or does not attend by ``attention.attend``.
        """
        layers, name = rows.cache.layers, type(self._call.model).__name__
        if any(layer.keys is None for layer in layers):
            raise Unseatable(f"layers of {name} share their keys")
        self._shapes = [(x.keys.shape[1], x.keys.shape[3], x.values.shape[3], x.keys.dtype) for x in layers]
        self._logits = logits.new_zeros(0, logits.shape[1])
        there, tokens = calls(), torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        before = sum(there), there[True]
        places = _Places.empty(1, self.device)
        cache = SeatCache([
            SeatLayer(
                torch.zeros(1, heads, 1, k, dtype=dtype, device=self.device),
                torch.zeros(1, heads, 1, v, dtype=dtype, device=self.device), places.number, places.length,
            )
            for heads, k, v, dtype in self._shapes
        ])  # fmt: skip
        with self._attending(places.heard):
            _logits(self._call, cache, tokens, tokens, tokens, self._shared(places))
        if (n := sum(there) - before[0]) != len(layers):
            raise Unseatable(f"{n} of the {len(layers)} layers of {name} attend by transformers' interface")
        self._can_share &= there[True] - before[1] == len(layers)

    def arrange(self, leave: Sequence[Continuation], join: Sequence[Continuation]) -> None:
        """Empty the seats of ``leave``, and seat ``join``, whose rows are there."""
        for s in leave:
            self._empty(self.seated.index(s))
        if join:
            n = len(join) + sum(s is not None for s in self.seated)
            for s in join:
                s.shares = self._would_share(s.prefix)
            self._make_room(n, max(map(self.own, join)) + 1)
            together: dict[int, list[Continuation]] = {}  # by their row, which is a fresh prompt's for all of its sequences
            for s in join:
                self.seated[self.seated.index(None)], s.halted = s, True
                together.setdefault(id(s.row), []).append(s)
            for some in together.values():  # one copy a layer, not one a seat and layer: 32 seats of 28 layers took 32 ms
                row, prefix, shares = some[0].row, some[0].prefix, some[0].shares
                own = row.behind(prefix.row) if shares else row.whole()
                index = torch.tensor([self.seated.index(s) for s in some]).to(self.device, non_blocking=True)
                for (keys, values), (k, v) in zip(self._layers, own.layers, strict=True):
                    keys[index, :, : k.shape[1]], values[index, :, : k.shape[1]] = k.to(keys), v.to(values)
        self._close_up()
        self._share()

    def own(self, s: Continuation) -> int:
        """How many of the tokens of ``s`` have, or will have, a place of their own."""
        shares = s.shares if s.seated or s in self.seated else self._would_share(s.prefix)
        return s.fed - s.prefix.row.length if shares else s.fed

    def _would_share(self, prefix: Prefix) -> bool:
        """Whether who sits down behind ``prefix`` now reads it where the others do."""
        return self._can_share and (prefix in self._prompts or worth_sharing(prefix))

    def _share(self) -> None:
        """The prompts that are read, and by whom."""
        sharing = [(i, s) for i, s in enumerate(self.seated) if s is not None and s.shares]
        prompts = list(dict.fromkeys(s.prefix for _, s in sharing))
        if prompts != self._prompts:
            self._prompts = prompts
            self._drop_steps()  # what was captured reads others
            for i, s in sharing:
                self._places.reads[i] = prompts.index(s.prefix)

    def _shared(self, places: _Places) -> Shared | None:
        """What the model is given of the prompts that ``places`` share; None: it takes nothing of the kind."""
        if not self._can_share:
            return None
        return Shared([[p.row.layers[i] for p in self._prompts] for i in range(len(self._shapes))], places.reads)

    def assign(self) -> None:
        """Each step says itself whose the forward is."""

    def _empty(self, i: int) -> None:
        self.seated[i] = None
        self._places.live[i], self._places.length[i] = False, 0

    def _close_up(self) -> None:
        """Where half of the seats suffice, move sequences to the lower half: the step gets narrower."""
        n = sum(s is not None for s in self.seated)
        for i in range(_power(n), len(self.seated)):
            if (s := self.seated[i]) is None:
                continue
            to, own = self.seated.index(None), self.own(s)
            for keys, values in self._layers:
                keys[to, :, :own], values[to, :, :own] = keys[i, :, :own], values[i, :, :own]
            self._places.move(i, to)
            self._logits[to] = self._logits[i]
            self.seated[to] = s
            self._empty(i)

    @staticmethod
    def tokens(sequences: int, longest: int) -> int:
        """For how many tokens there are places where so many sequences sit, the longest of so many tokens."""
        return _power(sequences) * max(_power(longest), LEAST_COLUMNS)

    def _make_room(self, sequences: int, columns: int) -> None:
        """For so many sequences, of so many tokens each. Where seats get longer, those that nobody needs go."""
        have = len(self.seated)
        if sequences <= have and columns <= self._columns:
            return
        if columns > self._columns:
            self._close_up()
        seats = _power(sequences) if columns > self._columns else max(have, _power(sequences))
        columns = max(self._columns, _power(columns), LEAST_COLUMNS)
        layers, self._layers = self._layers or [(None, None)] * len(self._shapes), []
        for i, (heads, k_width, v_width, dtype) in enumerate(self._shapes):
            (keys, values), layers[i] = layers[i], None  # the old ones go layer by layer
            self._layers.append((
                self._grown(keys, (seats, heads, columns, k_width), dtype),
                self._grown(values, (seats, heads, columns, v_width), dtype),
            ))  # fmt: skip
        if seats != have:
            self.scorer.hold(seats)  # a forward has as many sequences
            old, self._places = self._places, _Places.empty(seats, self.device)
            if old is not None:
                self._places.take(old.first(seats))
            self.seated = (self.seated + [None] * seats)[:seats]
            self._logits = self._grown(self._logits, (seats, self._logits.shape[1]), self._logits.dtype)
        self._columns, self._rules = columns, None
        self._drop_steps()  # what was captured is of other tensors

    def _grown(self, old: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        new = torch.zeros(shape, dtype=dtype, device=self.device)
        if old is not None:
            both = tuple(slice(0, min(pair)) for pair in zip(old.shape, shape, strict=True))
            new[both] = old[both]
        return new

    # -- what a sequence has -----------------------------------------------------------------------------------------

    def take(self, s: Continuation) -> Row:
        """A copy of the keys and values of what it was fed, or is being fed."""
        i, own = self.seated.index(s), self.own(s)
        layers = [(k[i, :, :own].clone(), v[i, :, :own].clone()) for k, v in self._layers]
        return Row(layers, s.fed, s.prefix.row if s.shares else None)

    def logits_of(self, s: Continuation) -> Tensor:
        """[V] after what it was, or is being, fed last; a copy."""
        return self._logits[self.seated.index(s)].clone()

    def halted(self, s: Continuation) -> None:
        """``s`` has halted by itself in the step that was read last: in none behind it was it fed."""
        for launched in self._launched:
            if any(other is s for _, other in launched.fed):
                launched.fed = [(i, other) for i, other in launched.fed if other is not s]
                self._not_fed(s)
        s.halted = True

    @staticmethod
    def _not_fed(s: Continuation) -> None:
        s.flying -= 1
        s.fed -= 1
        s.unused()

    def halt(self, s: Continuation) -> None:
        """``s`` stands still until it is told of the token to feed. None of its tokens is being drawn."""
        self._places.live[self.seated.index(s)] = False
        s.halted = True

    # -- steps -------------------------------------------------------------------------------------------------------

    def launch(self, steps: bool) -> None:
        """Feed all that go on, and draw the next token of each. ``steps``: whether somebody is told of them."""
        columns = max(self.own(s) for s in self.seated if s is not None) + 1
        self._make_room(sum(s is not None for s in self.seated), columns)
        fed = [(i, s) for i, s in enumerate(self.seated) if s is not None and s.goes]
        n = _power(1 + max(i for i, s in enumerate(self.seated) if s is not None))
        columns = max(LEAST_COLUMNS, _power(columns)) if self.captures else -(-columns // SLICE) * SLICE
        samplings = [None if s is None else s.sampling for s in self.seated]
        given = [s for s in samplings if s is not None]
        likely = max(s.logprobs or 0 for s in given)
        self._release([(i, s) for i, s in fed if s.halted])
        if self._rules is None or self._ruled != samplings or any(s.looks_back for s in given):
            self._rule(samplings, given[0])
        step = self._step(n, min(columns, self._columns), Uses.of(given), likely, steps)
        sent = [(0.0, -1.0, 0.0)] * n
        for i, s in fed:
            sent[i] = s.uniform(), float(s.next()), 1.0
        sent = torch.tensor([*zip(*sent, strict=True)], dtype=torch.float64, pin_memory=self.captures)
        self._places.sent[:, :n].copy_(sent, non_blocking=True)
        found, done = step(), None
        if self.captures:
            found = torch.empty_like(found, device="cpu", pin_memory=True).copy_(found, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        self._launched.append(_Launched(fed, likely, steps, found, done))
        for _, s in fed:
            s.fed += 1
            s.flying += 1

    def forget(self) -> None:
        """Nobody asks any more for what was launched."""
        self._launched.clear()

    def read(self) -> list[Drawn]:
        """What came of the step that was launched first, of those that were not read."""
        launched = self._launched.pop(0)
        if launched.done is not None:
            launched.done.synchronize()
        rows, drawn = launched.found.tolist(), []
        for i, s in launched.fed:
            token, log_prob, fed, steps, score, tags, *likely = rows[i]
            if not fed:
                self._not_fed(s)
                continue
            s.flying -= 1
            k, wanted = launched.likely, s.sampling.logprobs or 0
            top = list(zip(map(int, likely[:wanted]), likely[k : k + wanted], strict=True))
            known = (int(steps), (score, int(tags))) if launched.steps else (None,)
            drawn.append(Drawn(s, Chance(int(token), log_prob, top), *known))
        return drawn

    def _release(self, halted: list[tuple[int, Continuation]]) -> None:
        """Have them go on, from the token that they were told last."""
        if not halted:
            return
        told = torch.tensor(
            [
                (
                    i, s.tokens[-1], own := self.own(s), s.fed - own, self._prompts.index(s.prefix) if s.shares else -1,
                    s.sampling.max_tokens - len(s.tokens), s.state, s.prefix.prompt.steps == "awaited",
                )
                for i, s in halted
            ]
        ).to(self.device, non_blocking=True)  # fmt: skip
        at, token, own, begin, reads, left, state, awaited = told.unbind(1)
        p = self._places
        p.token[at], p.length[at], p.begin[at], p.reads[at], p.left[at] = token, own, begin, reads, left
        p.row[at], p.awaited[at] = state.int(), awaited.bool()
        p.live[at] = True
        for _, s in halted:
            s.halted = False

    def _rule(self, samplings: list[Sampling | None], filling: Sampling) -> None:
        """The rules of all seats. An empty one has those of ``filling``, and needs nothing that nobody else does."""
        rules = Rules.of(
            [s or filling for s in samplings], [((), ()) if s is None else s.text for s in self.seated], self.ends,
            self._logits.shape[1], self.device,
        )  # fmt: skip
        old, self._ruled = self._rules, samplings
        if old is None or [_shape(t) for t in vars(old).values()] != [_shape(t) for t in vars(rules).values()]:
            self._rules = rules
            self._drop_steps()
            return
        for name, new in vars(rules).items():
            if new is not None:
                getattr(old, name).copy_(new)

    def _step(self, n: int, columns: int, uses: Uses, likely: int, steps: bool) -> Callable[[], Tensor]:
        """What runs a step of this shape."""
        state, weights = self.scorer.stream.state, self.scorer.stream.placed.weights
        if any(step.state is not state or step.weights is not weights for step in self._steps.values()):
            self._drop_steps()  # the state grew, or the head was read anew: what was captured is of their old tensors
        key = n, columns, uses, likely, steps
        if key not in self._steps:
            run = self._of_shape(n, columns, uses, likely, steps)
            self._steps[key] = _Step(run, state, weights)
        return self._steps[key].run

    def _drop_steps(self) -> None:
        if self.captures and self._launched:
            torch.cuda.synchronize(self.device)  # one may be running
        self._steps.clear()
        self._pool = None  # goes with the last of its graphs, though not at once: whoever takes it meanwhile is refused

    def _of_shape(self, n: int, columns: int, uses: Uses, likely: int, steps: bool) -> Callable[[], Tensor]:
        places = self._places.first(n)
        layers = [
            SeatLayer(k[:n, :, :columns], v[:n, :, :columns], places.number, places.length) for k, v in self._layers
        ]
        inputs = SeatCache(layers), places.token[:, None], places.length[:, None], places.begin[:, None], self._shared(places)
        run = functools.partial(self._run, places, inputs, uses, likely, steps)
        places.sent.zero_()  # what is run here feeds nobody
        if self.compiled:
            vary(*inputs[:-1], places.heard, places.reads)
            self._compiled = self._compiled or torch.compile(_logits, fullgraph=True)
            try:
                run()
            except Exception as error:  # noqa: BLE001 - whatever the compiler raises, decoding goes on without it
                self._compiled, self.compiled = None, False
                self.why_not_compiled = f"{type(error).__name__}: {error}"
        if not self.captures:
            return run
        try:
            return self._captured(run)
        except RuntimeError as error:  # experts, for instance, that are chosen on the host
            torch.cuda.synchronize(self.device)
            raise Unseatable(f"a step of {type(self._call.model).__name__} cannot be captured: {error}") from error

    def _captured(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """``run`` as a CUDA graph."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # has cuBLAS and the allocator settle
                run()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            found = run()
        self._pool = graph.pool()

        def replay(recorded: Callable[[], Tensor] = run) -> Tensor:  # whose tensors must not go before the graph does
            graph.replay()
            return found

        return replay

    def _run(self, p: _Places, inputs: tuple[Any, ...], uses: Uses, likely: int, steps: bool) -> Tensor:
        """One step of the seats ``p``, on tensors that stay where they are. Returns ``_Launched.found``, on the device."""
        stream = self.scorer.stream
        fed = p.live & (p.sent[2] > 0)
        p.heard.copy_(torch.where(fed, p.row, -1))
        before = stream.state.counted(p.row) if steps else 0
        with self._attending(p.heard):
            logits = (self._compiled or _logits)(self._call, *inputs)
        kept = self._logits[: len(logits)]
        kept.copy_(torch.where(fed[:, None], logits, kept))
        on_host = self.device.type == "cpu" and not self.captures  # where to look at what comes costs nothing
        token = pick(logits, p.sent[0], p.sent[1].long(), self._rules.first(len(logits)), uses, head_first=on_host)
        chance = log_probs_of(logits, token, likely)
        p.length.add_(fed)
        p.left.sub_(fed.long())
        goes = (token[:, None] != self._ends).all(1) & (p.left > 0)
        known = [torch.zeros_like(token)] * 3
        if steps:
            if self.scorer.schedule == "deferred":
                stream.settle()
            counts = stream.state.counted(p.row)
            goes &= ~(p.awaited & (counts != before))
            # The host appends it to what it has: to read the whole log it would wait for the step that is launched behind this one.
            newest, tags = stream.state.newest(p.row)
            known = [counts, step_scores(newest, stream.placed.head.sigmoid), tags]
        p.token.copy_(torch.where(fed, token, p.token))
        p.live.logical_and_(goes | ~fed)
        told = torch.stack([t.double() for t in (token, chance.log_prob, fed, *known)], 1)
        return torch.cat([told, chance.top.double(), chance.log_probs.double()], 1)

    @contextlib.contextmanager
    def _attending(self, heard: Tensor) -> Iterator[None]:
        """Within, the model attends from seats, and the scorer hears the states ``heard``."""
        decoder = self.scorer.backbone.decoder
        self.scorer.assign_as(heard)
        before = exchange_attention(decoder, NAME)
        try:
            yield
        finally:
            exchange_attention(decoder, before)


def _shape(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.shape
