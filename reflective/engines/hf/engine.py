"""The engine that decodes models of transformers, one forward a token (``engines.base`` says what an engine is).

A prompt is prefilled once. A sequence has a place in the batch only while it decodes: when it ends or rests it leaves, and goes on
later from the keys and values kept for it.
"""

import collections
import itertools
import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack, nullcontext
from types import TracebackType
from typing import Literal, get_args

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from typing_extensions import Self

from ...utils.arguments import one_of, whole
from ...utils.lengths import batches_by_length
from ..base import Appended, Chance, Ended, Event, Opened, Prompt, Sampling, Score, Stepped
from .attention import Unseatable
from .batch import Batch, Drawn, Forward
from .finished import of_text
from .kv import Rows, check_rows_apart, free_bytes, new_cache
from .pace import Pace
from .sampling import chances, draw
from .scorer import StreamScorer
from .seats import Seats, worth_sharing
from .sequences import Continuation, Prefix

Decoding = Literal["auto", "batch", "seats", "compiled"]

PREFILL_TOKENS = 16_384  # padded, in one forward
LOGITS = 1 << 25  # of a prompt whose log-probabilities are asked for, in one forward: 128 MiB in float32
_NONE = Score()


class TransformersEngine:
    """See ``engines.base.Engine`` for all that is not said here.

    Args:
        model: decoder-only, with a cache of keys and values alone.
        scorer: of this model; attached while the engine is entered.
        ends: tokens that end a sequence.
        pad: the token of left padding.
        batch_rows: sequences decoded together at most.
        pace: how many tokens of prompts may be prefilled between two forwards of those that decode; a longer prompt is prefilled in
            pieces. None: all that were opened.
        decoding: ``"batch"``: eager, in a cache that grows with its sequences; ``"seats"``: by a step of fixed shape, which is a CUDA
            graph on a GPU; ``"compiled"``: the same, its forward compiled; ``"auto"``: seats where the model can have them, on a GPU
            from the beginning, on a CPU as soon as it pays to keep a long prompt once for all of its sequences; else the batch.
        kv_tokens: of so many tokens there are keys and values while they decode, padding and empty seats included, prompts that are
            shared not; candidates for which
            that is not enough wait, what they have kept in the host's memory. One always decodes. None: as many as fit into three
            quarters of the memory that is free when the first prompt has been run.

    Attributes:
        did: what the last ``advance`` ran: ``"prompts"``, a ``"piece"`` of a long one, ``"tokens"``; None: nothing.
        decode_seconds: of the last forward of those that decode; 0 when nobody does.

    Raises:
        ValueError: a model whose cache cannot be taken apart.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        scorer: StreamScorer,
        *,
        ends: Collection[int],
        pad: int = 0,
        batch_rows: int = 64,
        pace: Pace | None = None,
        decoding: Decoding = "auto",
        kv_tokens: int | None = None,
    ) -> None:
        check_rows_apart(model)
        if kv_tokens is not None:
            whole("kv_tokens", kv_tokens, 1)
        one_of("decoding", decoding, get_args(Decoding))
        self.model, self.scorer, self.ends, self.pad, self.batch_rows, self.pace = (
            model, scorer, frozenset(ends), pad, batch_rows, pace,
        )  # fmt: skip
        self.did: Literal["prompts", "piece", "tokens"] | None = None
        self.decode_seconds = 0.0
        self._call = Forward.of(model)
        self.why_batch: str | None = None
        self._decoding, self.kv_tokens = decoding, kv_tokens
        self._places = self._made(decoding)
        self._numbers = itertools.count()
        self._prefixes: dict[int, Prefix] = {}  # prefilled or not, in order of their prefill
        self._sequences: dict[int, Continuation] = {}  # that have not ended
        self._groups: collections.deque[list[Prefix]] = collections.deque()  # each to be prefilled in one forward
        self._long: collections.deque[Prefix] = collections.deque()  # each in several
        self._learnt: tuple[Rows, Tensor] | None = None  # what keys, values and logits are like
        self._untold: list[Continuation] = []  # behind a step or a fork: with logits, perhaps a token drawn
        self._ended: list[Ended] = []  # to be told
        self._read: list[Drawn] = []  # the same, with what follows from it
        self._entered: ExitStack | None = None
        self._between: set[str] = set()  # what was run since those that decode had their last token

    @property
    def scoring_seconds(self) -> float:
        return self.scorer.host_seconds

    def __enter__(self) -> Self:
        with ExitStack() as entered:
            entered.enter_context(torch.no_grad())
            entered.enter_context(self.scorer)
            self._entered = entered.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        entered, self._entered = self._entered, None
        with entered:
            if kind is None and self._seated:
                self._seat()  # nobody: keys and values are free
            self._places.forget()

    @property
    def how(self) -> str:
        """How sequences are decoded: ``"batch"``, ``"seats"``, ``"captured"`` or ``"compiled"``."""
        return self._places.how

    @property
    def reusable(self) -> bool:
        """Whether it may be entered once more, and had better be."""
        wanted = self._decoding != "auto" or self.model.device.type == "cuda"
        return wanted and self._places.keeps_idle and not self._sequences and not self._prefixes

    def _made(self, decoding: Decoding) -> Batch | Seats:
        """Places for those that decode.

        Raises:
            ValueError: the model cannot have the seats asked for.
        """
        if decoding == "batch" or decoding == "auto" and self.model.device.type != "cuda":
            return Batch(self.model, self.scorer, self.ends)
        try:
            return Seats(self.model, self.scorer, self.ends, compiled=decoding == "compiled")
        except Unseatable as why:
            if decoding != "auto":
                raise ValueError(f"decoding={decoding!r}: {why}; take 'batch'") from why
            self.why_batch = str(why)
            return Batch(self.model, self.scorer, self.ends)

    @property
    def _seated(self) -> list[Continuation]:
        return [s for s in self._places.seated if s is not None]

    # -- prompts -----------------------------------------------------------------------------------------------------

    @property
    def room(self) -> int:
        if self._groups:
            return 0
        return self.batch_rows - sum(s.goes or s.prefix.row is None for s in self._sequences.values())

    @property
    def filling(self) -> bool:
        """Whether a long prompt is being prefilled."""
        return bool(self._long)

    def open(self, prompts: Sequence[Prompt]) -> list[int]:
        new = [Prefix(next(self._numbers), prompt) for prompt in prompts]
        self._prefixes |= {p.number: p for p in new}
        most = self.pace.tokens() if self.pace else PREFILL_TOKENS
        for prefix in (p for p in new if p.prompt.logprobs is not None):
            self._fill_later(prefix)
        # Prompts of similar lengths together, as many as one forward may have.
        short = [p for p in new if p.prompt.logprobs is None]
        lengths = [len(p.prompt.ids) for p in short]
        for part in batches_by_length(lengths, most):
            group = [short[i] for i in sorted(part)]
            if self.pace and lengths[part[0]] > most:
                self._fill_later(group[0])
            else:
                self._groups.append(group)
        return [p.number for p in new]

    def start(self, prefix: int, samplings: Sequence[Sampling]) -> list[int]:
        if (place := self._prefixes.get(prefix)) is None:
            raise KeyError(f"prefix {prefix} was closed, or never opened")
        new = [Continuation(next(self._numbers), place, sampling) for sampling in samplings]
        self._keep(new)
        if place.row is not None:
            self._begin(new)
        return [s.number for s in new]

    def _keep(self, new: list[Continuation]) -> None:
        for s in new:
            self._sequences[s.number] = s
            s.prefix.sequences.append(s)

    def _begin(self, sequences: Iterable[Continuation]) -> None:
        """Behind their prefixes, whose keys and values are there."""
        for s in sequences:
            s.row, s.logits, s.fed = s.prefix.row, s.prefix.logits, s.prefix.row.length
            if s.sampling.max_tokens:
                self._untold.append(s)
            else:
                self._end([s])
                self._ended.append(Ended(s.number, "length", None, _NONE))

    def _fill_later(self, prefix: Prefix) -> None:
        prefix.ids, prefix.positions, _ = self._admit([prefix])
        prefix.cache = new_cache()
        self._long.append(prefix)

    def _admit(self, prefixes: list[Prefix]) -> tuple[Tensor, Tensor, Tensor | None]:
        """New states for the prompts, and these as ids [B, P] with their positions and mask."""
        device, lengths = self.model.device, [len(p.prompt.ids) for p in prefixes]
        width = max(lengths)
        for p in prefixes:
            p.columns = [self.pad] * (width - len(p.prompt.ids)) + list(p.prompt.ids)
        ids = torch.tensor([p.columns for p in prefixes], device=device)
        begins, column = width - torch.tensor(lengths, device=device)[:, None], torch.arange(width, device=device)
        mask = None if width == min(lengths) else (column >= begins).long()
        for p, state in zip(prefixes, self.scorer.admit(ids, mask), strict=True):
            p.state = state
        return ids, (column - begins).clamp_min(0), mask

    def _prefill(self, prefixes: list[Prefix]) -> list[Event]:
        ids, positions, mask = self._admit(prefixes)
        cache = new_cache()
        self.scorer.assign([p.state for p in prefixes], prompts=True)
        logits = self._call(cache, ids, positions, mask)
        self._places.assign()
        return self._prefilled(prefixes, cache, logits)

    def _fill(self) -> list[Event]:
        """A piece of the long prompt that came first."""
        prefix, most = self._long[0], self.pace.tokens() if self.pace else PREFILL_TOKENS
        asked = prefix.prompt.logprobs is not None
        if asked:
            most = min(most, max(1, LOGITS // self.model.get_input_embeddings().num_embeddings))
        piece = slice(prefix.done, min(prefix.done + most, prefix.ids.shape[1]))
        self.scorer.assign([prefix.state], prompts=True)
        with self.pace.timed(piece.stop - piece.start) if self.pace else nullcontext():
            logits = self._call(
                prefix.cache, prefix.ids[:, piece], prefix.positions[:, piece], None, keep=0 if asked else 1
            )
            if asked:
                self._read_chances(prefix, logits[0], piece.start)
                logits = logits[:, -1]
        self._places.assign()
        prefix.done = piece.stop
        if prefix.done < prefix.ids.shape[1]:
            return []
        self._long.popleft()
        cache, prefix.cache = prefix.cache, None
        return self._prefilled([prefix], cache, logits)

    def _read_chances(self, prefix: Prefix, logits: Tensor, begin: int) -> None:
        """Of the tokens behind those, from place ``begin`` on, that ``logits`` [T, V] are of."""
        ids = prefix.prompt.ids
        if not begin:
            prefix.chances.append(Chance(ids[0], None, []))
        tokens = torch.tensor(ids[begin + 1 : begin + 1 + len(logits)], dtype=torch.int64, device=logits.device)
        wanted = [prefix.prompt.logprobs] * len(tokens)
        prefix.chances += chances(logits[: len(tokens)], tokens, wanted)

    def _prefilled(self, prefixes: list[Prefix], cache: DynamicCache, logits: Tensor) -> list[Event]:
        """Every sequence's first token, after prompts whose keys and values are in ``cache``."""
        rows = Rows(cache, [len(p.prompt.ids) for p in prefixes])
        for i, p in enumerate(prefixes):
            p.row, p.logits = rows.take(i), logits[i].clone()  # or those of all would be kept
            self._prefixes[p.number] = self._prefixes.pop(p.number)  # those that were prefilled first are seated first
        if self._learnt is None:
            self._learn(rows, logits)
        self._begin(s for p in prefixes for s in list(p.sequences))
        return [*(Opened(p.number, p.chances) for p in prefixes), *self._tell_untold()]

    def _learn(self, rows: Rows, logits: Tensor) -> None:
        if self.kv_tokens is None and (free := free_bytes(self.model.device)) is not None:
            self.kv_tokens = max(1, 3 * free // (4 * rows.take(0).token_bytes))
        rows.arrange([])
        self._learnt = rows, logits.new_empty(0, logits.shape[1])  # no view, which would keep them all
        try:
            self._places.learn(rows, logits)
        except Unseatable as why:
            self._batch_instead(why)

    def _batch_instead(self, why: Unseatable) -> None:
        """The model cannot have seats, as was seen when it was about to.

        Raises:
            ValueError: they were asked for by name.
        """
        if self._decoding != "auto":
            raise ValueError(f"decoding={self._decoding!r}: {why}; take 'batch'") from why
        self.why_batch = str(why)
        self._move(Batch(self.model, self.scorer, self.ends))
        self._seat()

    def _move(self, places: Batch | Seats) -> None:
        """All that decode are to have ``places`` instead.

        Raises:
            Unseatable: nobody has moved.
        """
        places.learn(*self._learnt)
        for s in self._seated:
            s.row, s.seated = self._places.take(s), False
        self._places = places

    def _to_share(self) -> None:
        """In a batch everybody has a prompt of their own: where that takes too much, seats instead, unless it was asked for."""
        if self._decoding != "auto":
            return
        try:
            self._move(Seats(self.model, self.scorer, self.ends))
        except Unseatable as why:
            self.why_batch = str(why)

    # -- tokens ------------------------------------------------------------------------------------------------------

    def advance(self, *, fill: bool = True) -> list[Event] | None:
        """``fill``: whether it may be a piece of a long prompt."""
        if self._entered is None:
            raise RuntimeError("the engine hears no forward: call it within `with engine:`")
        self.did = None
        if self._read:
            read, self._read = self._read, []
            return self._drawn(read)
        if events := self._tell_untold():
            return events
        decoding = any(s.ready or s.flying for s in self._sequences.values())
        if not decoding:
            self.decode_seconds = 0.0
        # At a pace no two prompts, and never two pieces, between two tokens of those that decode.
        if self._groups and not (decoding and self.pace and "prompts" in self._between):
            self.did = "prompts"
        elif self._long and fill and not (decoding and "piece" in self._between):
            self.did = "piece"
        elif decoding:
            self.did = "tokens"
        else:
            return [] if self._long else None
        if self.did == "tokens":
            self._between.clear()
            return self._decode()
        self._between.add(self.did)
        return self._prefill(self._groups.popleft()) if self.did == "prompts" else self._fill()

    def _decode(self) -> list[Event]:
        """Feed every seated sequence's newest token and draw its next. Where a step may be launched before the one before it is read,
        what is told is the latter's, and the device does not wait for whoever is told."""
        began = time.perf_counter()
        if self._places.unread and len(self._seated) > self._most(self._longest(self._seated)):
            return self._drawn(self._places.read())  # somebody must leave: nobody may be under way
        self._seat()
        steps = any(p.prompt.steps != "untold" for p in self._prefixes.values())
        if any(s.goes for s in self._seated):
            try:
                self._places.launch(steps)
            except Unseatable as why:
                events = self._drawn(self._places.read()) if self._places.unread else []
                self._batch_instead(why)
                return events
        events = self._drawn(self._places.read()) if self._places.unread > self._behind else []
        self.decode_seconds = time.perf_counter() - began
        return events

    @property
    def _behind(self) -> int:
        """How many steps may be under way when the next is launched, unless there is none to launch.

        None where the state must be as it was when the step ended: where steps are told, and with ``at="token"``, where a step-token
        that came last counts if it was fed. Nor where a token changes what may follow it, which the host works out.
        """
        if not self._places.ahead or self.scorer.at != "predict" or not any(s.goes for s in self._seated):
            return 0
        told = any(p.prompt.steps == "told" for p in self._prefixes.values())
        return int(not told and not any(s.sampling.looks_back for s in self._seated))

    def _drawn(self, drawn: list[Drawn]) -> list[Event]:
        """What there is to tell of a step: steps that ended, and the tokens of those of which more may be told now."""
        events, going = [], []
        for s, chance, count, newest in drawn:
            if s.number not in self._sequences:
                continue  # it was stopped meanwhile
            s.drawn = chance
            told = count is not None and s.prefix.prompt.steps != "untold"
            before = s.steps
            if told and self._follow_steps(s, count, *newest):
                ended = count > before
                awaited = s.prefix.prompt.steps == "awaited"
                if awaited:
                    self._places.halted(s)
                events.append(Stepped(s.number, s.step_scores, ended))
                if ended and awaited:
                    s.logits = self._places.logits_of(s)  # forks draw from it
            if s.logits is not None or s.resting:
                self._untold.append(s)
            else:
                going.append(s)
        return events + self._tell(going)

    def _follow_steps(self, s: Continuation, count: int, newest: float, tags: int) -> bool:
        """Keep the scores of the ``count`` steps that ``s`` has by now, the newest of which scores ``newest``; whether their number has
        changed."""
        before, s.steps = s.steps, count
        if not count:
            s.step_scores, s.tags = [], tags
        elif count == before + 1 and tags == s.tags >= 0:  # what counted before counts still
            s.step_scores = [*s.step_scores, newest]
        elif count != before:
            s.step_scores, s.tags = self.scorer.step_scores(s.state), tags
        return count != before

    def _tell_untold(self) -> list[Event]:
        """What is known already, of those that do not rest."""
        going = [s for s in self._untold if not s.resting]
        if going:
            self._untold = [s for s in self._untold if s.resting]
            fresh = [s for s in going if s.drawn is None]
            for begin in range(0, len(fresh), self.batch_rows):
                part = fresh[begin : begin + self.batch_rows]
                self._draw(part, torch.stack([s.logits for s in part]))
        ended, self._ended = self._ended, []
        return [*self._tell(going), *ended]

    def _drawn_anew(self, s: Continuation) -> Chance:
        """What ``s`` is forced to, instead of what its place has drawn."""
        if s.seated:
            self._places.halt(s)
        s.unused()
        logits = self._places.logits_of(s) if s.logits is None else s.logits
        with torch.no_grad():
            return self._draws([s], logits[None])[0]

    def _draw(self, sequences: list[Continuation], logits: Tensor) -> None:
        """A next token for each, from ``logits`` [R, V]."""
        for s, chance in zip(sequences, self._draws(sequences, logits), strict=True):
            s.drawn = chance

    def _draws(self, sequences: list[Continuation], logits: Tensor) -> list[Chance]:
        return draw(
            logits, [s.uniform() for s in sequences], [s.next() for s in sequences], [s.sampling for s in sequences],
            [s.text for s in sequences], self.ends,
        )  # fmt: skip

    def _tell(self, sequences: list[Continuation]) -> list[Event]:
        """The tokens drawn, and the ends that they make."""
        events: list[Event] = []
        ended: list[tuple[Continuation, Literal["stop", "length"], Chance | None]] = []
        for s in sequences:
            chance, s.drawn, s.logits = s.drawn, None, None
            if chance.token in self.ends:
                ended.append((s, "stop", chance))
                continue
            s.tokens.append(chance.token)
            events.append(Appended(s.number, chance))
            if len(s.tokens) >= s.sampling.max_tokens:
                ended.append((s, "length", None))
        if ended:
            scores = self._scores([s for s, *_ in ended])
            events += [
                Ended(s.number, reason, chance, score)
                for (s, reason, chance), score in zip(ended, scores, strict=True)
            ]
        return events

    def _seat(self) -> None:
        """Empty the places of those that do not go on, if others want them or they are over, and fill what is free."""
        waiting = [s for p in self._prefixes.values() for s in p.sequences if s.ready and not s.seated]
        if any(worth_sharing(s.prefix) for s in waiting) and self.how == "batch" and not self.why_batch:
            self._to_share()
            waiting = [s for p in self._prefixes.values() for s in p.sequences if s.ready and not s.seated]
        seated, places = self._seated, self._places
        over = [s for s in seated if s.number not in self._sequences]
        # In a batch nobody can sit without decoding; a seat costs little.
        idle = [s for s in seated if s.number in self._sequences and not s.goes and not s.flying]
        room = self._most(self._longest(seated)) - len(seated) + len(over)
        leave = over + (idle if not places.keeps_idle or len(waiting) > room else [])
        stay = [s for s in seated if s not in leave]
        put_off = stay[max(1, self._most(self._longest(stay))) :] if not places.unread else []  # those that came last
        stay, join = stay[: len(stay) - len(put_off)], []
        for s in waiting:
            if put_off or len(stay) + len(join) >= self._most(self._longest([*stay, *join, s])):
                break
            join.append(s)
        leave += put_off
        if not leave and not join:
            return
        for s in leave:
            if s.number in self._sequences:
                s.row = places.take(s)
                if s.drawn is not None and s.logits is None:
                    s.logits = places.logits_of(s)  # for whoever is forked from it, or forced to something else
                if s in put_off:
                    s.row = s.row.to(torch.device("cpu"))
        self._give_states(join)
        places.arrange(leave, join)
        for s in leave:
            s.seated = False
        for s in join:
            s.seated, s.row = True, None

    def _longest(self, sequences: Iterable[Continuation]) -> int:
        """Tokens that have a place of their own, of the longest, with the next."""
        return max(map(self._places.own, sequences), default=0) + 1

    def _most(self, longest: int) -> int:
        """How many sequences may have places, the longest of which has so many tokens; one may always."""
        most = self.batch_rows
        while most > 1 and self.kv_tokens is not None and self._places.tokens(most, longest) > self.kv_tokens:
            most -= 1
        return most

    # -- what becomes of sequences -----------------------------------------------------------------------------------

    def fork(self, sequence: int, samplings: Sequence[Sampling]) -> list[int]:
        s = self._going(sequence)
        row, logits = self._places.take(s) if s.seated else s.row, s.logits
        if logits is None and s.flying:
            logits = self._places.logits_of(s)
        states = [None] * len(samplings) if s.state is None else self.scorer.fork([s.state] * len(samplings))
        new = [
            Continuation(
                next(self._numbers), s.prefix, sampling, tokens=list(s.tokens), steps=s.steps, step_scores=s.step_scores,
                tags=s.tags, forced=s.forced,
                state=state, row=row, fed=s.fed, logits=logits,
            )
            for sampling, state in zip(samplings, states, strict=True)
        ]  # fmt: skip
        self._keep(new)
        self._untold += [f for f in new if f.logits is not None]
        return [f.number for f in new]

    def stop(self, sequences: Sequence[int]) -> list[Score]:
        with torch.no_grad():
            return self._scores([self._going(number) for number in sequences])

    def rest(self, sequences: Sequence[int]) -> None:
        for number in sequences:
            self._going(number).resting = True

    def resume(self, sequences: Sequence[int]) -> None:
        for number in sequences:
            self._going(number).resting = False

    def force(self, sequence: int, tokens: Sequence[int]) -> None:
        s = self._going(sequence)
        s.forced = len(s.tokens), list(tokens)
        if s.drawn is not None:  # and not told: it lies behind a step that is awaited, or the sequence rests
            s.drawn = self._drawn_anew(s)
        if s.flying:  # a token is being drawn that is not the one
            self._read += self._places.read()
        self._read = [d._replace(chance=self._drawn_anew(s)) if d.sequence is s else d for d in self._read]

    def close(self, prefixes: Sequence[int]) -> None:
        closed = [self._prefixes.pop(number) for number in prefixes]
        for prefix in closed:
            self.scorer.release([s.state for s in prefix.sequences if s.state is not None])
            self._end(list(prefix.sequences))
            if prefix.state is not None:
                self.scorer.release([prefix.state])
        groups = ([p for p in group if p not in closed] for group in self._groups)
        self._groups = collections.deque(group for group in groups if group)
        self._long = collections.deque(p for p in self._long if p not in closed)

    def _going(self, sequence: int) -> Continuation:
        """The sequence of this number; KeyError if none of those that go on has it."""
        if (found := self._sequences.get(sequence)) is None:
            raise KeyError(f"sequence {sequence} has ended, or was never started")
        return found

    def _give_states(self, sequences: list[Continuation]) -> None:
        """A score state for each that has none yet."""
        new = [s for s in sequences if s.state is None]
        for s, state in zip(new, self.scorer.fork([s.prefix.state for s in new]) if new else [], strict=True):
            s.state = state

    def _scores(self, sequences: list[Continuation]) -> list[Score]:
        """Of sequences that end here; their states are free afterwards."""
        there = [s for s in sequences if s.prefix.row is not None]
        self._give_states(there)
        rows, found = [s.state for s in there], {}
        if there:
            scores = self.scorer.result([torch.tensor(s.prefix.columns + s.tokens) for s in there], rows=rows)
            found = {s: of_text(scores, i, len(s.prefix.columns)) for i, s in enumerate(there)}
            self.scorer.release(rows)
        self._end(sequences)
        return [found.get(s, _NONE) for s in sequences]

    def _end(self, sequences: list[Continuation]) -> None:
        gone = set(sequences)
        for s in sequences:
            del self._sequences[s.number]
            s.row = s.logits = s.drawn = None
        for prefix in {s.prefix for s in sequences}:
            prefix.sequences = [s for s in prefix.sequences if s not in gone]
        self._untold = [s for s in self._untold if s not in gone]
