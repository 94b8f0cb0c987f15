"""The decode loop behind ``ReflectiveModel.generate``: candidates of several questions in one batch, steered by score.

A prompt is prefilled once. A candidate has a place in the batch only while it decodes: when it finishes, is stopped,
waits or is held, it leaves, and goes on later from the keys and values kept for it.
"""

import collections
import copy
import dataclasses
import inspect
import itertools
import math
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, TemperatureLogitsWarper, TopPLogitsWarper

from ..engines.base import Chance
from ..engines.hf.generation import TAIL, end_tokens, pad_token
from ..engines.hf.internals import cache_argument
from ..engines.hf.kv import Row, Rows, check_cache, new_cache
from ..engines.hf.scorer import StreamScorer
from ..scoring.scores import TrajectoryScores, aggregate
from ..utils.arguments import real, whole
from ..utils.lengths import batches_by_length
from .strategies import HOLD, KEEP, STOP, Step, Strategy

if TYPE_CHECKING:
    from ..model import ReflectiveModel


PREFILL_TOKENS = 16_384  # padded, in one forward
LOGITS = 1 << 25  # of a prompt whose log-probabilities are asked for, in one forward: 128 MiB in float32


@dataclass(eq=False)
class Live:
    """A candidate while the run lasts, as strategies and ``on_step`` see it.

    Attributes:
        number: within its question, in order of creation; parent: the number of the one that it was forked from.
        token_ids: of the response so far, without end-of-sequence token; a fork's include its parent's.
        step_scores: in (0, 1), of every step so far. Kept up to date for strategies that observe and for ``on_step``.
        new_tokens: decoded for this candidate itself.
        log_prob: sum of the model's log-probabilities of its tokens, end-of-sequence included, at temperature 1.
        chances: of each of these tokens, where they are asked for.
        finished: ``"stop"`` (end-of-sequence, stop pattern, complete answer) or ``"length"``; None while it decodes.
        status: ``finished``, or else ``"running"``; ``"stopped"`` by the strategy, ``"interrupted"``.
    """

    number: int
    question: "Question" = field(repr=False)
    parent: int | None = None
    token_ids: list[int] = field(default_factory=list)
    step_scores: list[float] = field(default_factory=list)
    new_tokens: int = 0
    log_prob: float = 0.0
    chances: list[Chance] = field(default_factory=list, repr=False)
    finished: str | None = None
    status: str = "running"
    # What its last scoring says: geometric mean, columns of the steps in ``token_ids``, and what is wrong.
    scored: "Scored | None" = field(default=None, repr=False)
    _state: int | None = field(default=None, repr=False)  # row of the score state; None: as the prompt left it
    _kept: Row | None = field(default=None, repr=False)  # its cache, outside of the batch
    _seat: int | None = field(default=None, repr=False)  # its place within the batch
    _next: Chance | None = field(default=None, repr=False)  # token drawn but not accepted
    _logits: Tensor | None = field(default=None, repr=False)  # that it was drawn from, for forks to draw theirs
    _unfed: bool = field(default=False, repr=False)  # whether the newest of token_ids is still to be fed
    _changed: bool = field(default=False, repr=False)
    _held: bool = field(default=False, repr=False)
    _steps: int = field(default=0, repr=False)
    _answer_from: int | None = field(default=0, repr=False)  # where thinking ended in token_ids; None within it
    _cut: bool = field(default=False, repr=False)  # thinking was ended at the budget

    def __post_init__(self) -> None:
        q = self.question
        self._random = np.random.default_rng([q.ask.seed, q.ask.number, self.number])

    @property
    def text(self) -> str:
        return self.question.model.decode(self.token_ids)

    @property
    def answer(self) -> str | None:
        return self.question.model.answer(self.text)

    def score(self, aggregation: str = "geometric_mean") -> float:
        """The steps so far in one number, see ``reflective.scoring.scores.aggregate``."""
        return aggregate(self.step_scores, aggregation)

    @property
    def running(self) -> bool:
        return self.status == "running"

    @property
    def _ready(self) -> bool:
        """Whether there is a token to feed."""
        return self._unfed and not self._held and self.running


@dataclass(frozen=True)
class Scored:
    """Attributes: ``score``: geometric mean; ``positions``: in ``token_ids``, of every step's last token; ``error``."""

    score: float
    positions: list[int]
    error: str | None

    @classmethod
    def of(cls, scores: TrajectoryScores, i: int, prompt_length: int) -> "Scored":
        return cls(float(scores.score[i]), (scores.step_positions[i] - prompt_length).tolist(), scores.errors.get(i))


@dataclass(frozen=True)
class Ask:
    """What is wanted of a run: one question and how to answer it.

    Attributes:
        prompt: its ids.
        strategy: copied for this question.
        max_new_tokens: of a candidate, what it has from its parent included; 0 with ``prompt_logprobs`` alone.
        temperature, top_p: 0 decodes greedily. Of the model's ``generation_config`` only the end-of-sequence counts.
        seed, number: candidate c draws one uniform a token from ``default_rng([seed, number, c])``: its text does not
            depend on which others are alive.
        thinking_budget: tokens after which thinking is ended, see ``ReflectiveModel.generate``; None: never.
        stop: texts that end a response too, each of them part of it.
        logprobs: the chances of how many tokens to keep at every place of a response, beside that of the token that came; None:
            keep nothing. No influence on what is drawn.
        prompt_logprobs: the same of the prompt, which is then prefilled on its own and in pieces.

    Raises:
        ValueError: a setting out of its range.
    """

    prompt: Sequence[int] = field(repr=False)
    strategy: Strategy
    max_new_tokens: int = 512
    temperature: float = 0.6
    top_p: float = 0.95
    seed: int = 0
    number: int = 0
    thinking_budget: int | None = None
    stop: Sequence[str] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name), 0)
        whole("max_new_tokens", self.max_new_tokens, 1 if self.prompt_logprobs is None else 0)
        whole("seed", self.seed, 0)
        if self.thinking_budget is not None:
            whole("thinking_budget", self.thinking_budget, 0)
        if not real(self.temperature) or not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature!r} must be finite, and not negative")
        if not real(self.top_p) or not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p!r} must lie in [0, 1]")
        listed = isinstance(self.stop, Collection) and not isinstance(self.stop, str | bytes)
        if not listed or not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop={self.stop!r}: expected a list of texts, none of them empty")


@dataclass(eq=False)
class Question:
    """One question of a run, and afterwards its result.

    Attributes:
        strategy: its own copy; prompt: its ids.
        candidates: all that there ever were, in order of creation.
        prompt_chances: of the prompt's tokens, where they are asked for.
        tokens: decoded in all; alive: ``(seconds since it came, candidates running)`` after every forward.
        seconds: from when it came to its end, time within ``on_step`` left out.
        cancelled: set it, from any thread, to have its candidates ended before the next forward.
    """

    model: "ReflectiveModel" = field(repr=False)
    ask: Ask
    candidates: list[Live] = field(default_factory=list, repr=False)
    prompt_chances: list[Chance] = field(default_factory=list, repr=False)
    tokens: int = 0
    alive: list[tuple[float, int]] = field(default_factory=list, repr=False)
    seconds: float = 0.0
    cancelled: bool = False
    _began: float = field(default_factory=time.perf_counter, repr=False)
    _watched: float = field(default=0.0, repr=False)  # that the run had spent in ``on_step`` by then
    _padded: list[int] = field(default_factory=list, repr=False)  # prompt as the scorer was given it
    _state: int | None = field(default=None, repr=False)  # score state of the prompt, from which candidates fork
    _kept: Row | None = field(default=None, repr=False)  # the prompt's cache

    def __post_init__(self) -> None:
        self.prompt, self.strategy = list(self.ask.prompt), copy.deepcopy(self.ask.strategy)
        self.observes = type(self.strategy).observe is not Strategy.observe
        # Numbered beyond every candidate: numpy takes a shorter seed for one that ends in zeros.
        self.random = np.random.default_rng([self.ask.seed, self.ask.number, 0, 1])
        self._end_ids = [] if self.ask.thinking_budget is None else self.model.think_end()
        self._end_text = self.model.decode(self._end_ids, special=True).strip()
        own, given = self.model.config.stop, map(re.escape, self.ask.stop)
        self._stop = re.compile("|".join([*([own] if own else []), *given])) if own or self.ask.stop else None
        self._tail = max([TAIL, *map(len, self.ask.stop)])  # tokens: at least one character each
        steps = self.model.steps
        last = {token: i for i, token in enumerate(self.prompt)}
        opened, closed = (last.get(tag, -1) for tag in (steps.think_start_id, steps.think_end_id))
        self._may_cut = closed <= opened
        self.candidates = [Live(i, self, _answer_from=None if opened > closed else 0) for i in range(self.strategy.n)]

    @property
    def open(self) -> list[Live]:
        return [c for c in self.candidates if c.running]


class Pace:
    """How many tokens may be run between two forwards of those that decode: about as many as take ``seconds``.

    Learnt from what was run, as neither model nor machine is known; at least 64, for which a forward that reads all weights is
    worth it, and never more than twice as many as ever before.

    Args:
        most: tokens, at any time.
        device: on which they run.
    """

    LEAST = 64

    def __init__(self, most: int, device: torch.device, seconds: float = 0.2) -> None:
        self.most, self.device, self.seconds = max(most, self.LEAST), device, seconds
        self._rate, self._tried = 0.0, self.LEAST // 2

    def tokens(self) -> int:
        return max(self.LEAST, min(self.most, 2 * self._tried, int(self._rate * self.seconds)))

    @contextmanager
    def timed(self, tokens: int) -> Iterator[None]:
        """Within, so many are run."""
        began = time.perf_counter()
        yield
        if tokens >= self.LEAST:
            if self.device.type != "cpu":
                torch.accelerator.synchronize(self.device)
            self._rate = tokens / max(1e-6, time.perf_counter() - began)
            self._tried = max(self._tried, tokens)


@dataclass(eq=False)
class _Filling:
    """A long prompt, ids and positions [1, P], of which ``done`` tokens are in the cache."""

    question: Question
    cache: DynamicCache
    ids: Tensor
    positions: Tensor
    done: int = 0


class Search:
    """Runs of a model: questions that come and go in one batch, each with a strategy of its own.

    Args:
        scorer: attached here, for a run alone.
        batch_rows: candidates decoded together at most.
        on_step: called after every forward with the candidates, ended ones too, of each question under way.
        on_end: called with every question that has ended.
        pace: how many tokens of prompts may be prefilled between two forwards; a longer prompt is prefilled in pieces. None:
            all that came at once.

    Attributes:
        decode_seconds: of the last forward of those that decode; 0 when nobody does.

    Raises:
        ValueError: a model whose cache cannot be taken apart.
    """

    def __init__(
        self,
        model: "ReflectiveModel",
        scorer: StreamScorer,
        *,
        batch_rows: int = 64,
        on_step: Callable[[list[list[Live]]], None] | None = None,
        on_end: Callable[[Question], None] | None = None,
        pace: Pace | None = None,
    ) -> None:
        check_cache(model.model)
        self.model, self.scorer, self.batch_rows, self.on_step, self.on_end = model, scorer, batch_rows, on_step, on_end
        self.ends = end_tokens(model.model, model.tokenizer)
        self.answer = model.config.answer and re.compile(model.config.answer)
        self.inputs = inspect.signature(model.model.forward).parameters
        self.cache_name = cache_argument(model.model)
        self._under_way: list[Question] = []
        self._batch: list[Live] = []
        self._rows: Rows | None = None
        self._watching = 0.0
        self.pace, self.decode_seconds = pace, 0.0
        self._groups: collections.deque[list[Question]] = collections.deque()  # each to be prefilled in one forward
        self._long: collections.deque[_Filling] = collections.deque()  # each in several

    def run(self, asks: Iterable[Ask]) -> list[Question]:
        """Decode until every candidate has ended. After a KeyboardInterrupt: what was decoded and scored by then.

        Raises:
            ValueError: a ``thinking_budget`` without a text that ends thinking.
            RuntimeError: the strategy failed, holds everything for ever, or says what is no action.
        """
        questions = [self.question(ask) for ask in asks]
        waiting = collections.deque(questions)

        def arrivals(room: int) -> list[Question]:
            new = []
            while waiting and room > 0:
                new.append(waiting.popleft())
                room -= len(new[-1].candidates)
            return new

        try:
            self.serve(arrivals)
        except KeyboardInterrupt:
            self._interrupt(questions)
        return questions

    def question(self, ask: Ask) -> Question:
        """What ``serve`` takes for ``ask``."""
        return Question(self.model, ask, _watched=self._watching)

    def serve(self, arrivals: Callable[[int], list[Question]]) -> None:
        """Decode what ``arrivals`` brings, until that is nothing while nothing is left to do; see ``turn``."""
        with self.attached():
            while self.turn(arrivals):
                pass

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within, turns may be taken."""
        with torch.no_grad(), self.scorer:
            yield
            if self._batch:
                self._seat()  # nobody: keys and values are free

    def turn(self, arrivals: Callable[[int], list[Question]], *, fill: bool = True) -> bool:
        """One forward of all that decode, with those that ``arrivals`` brings; whether there was anything to do.

        ``arrivals(room)`` is asked where there are places: for questions with about ``room`` candidates in all, 1 at the
        least. ``fill``: whether a piece of a long prompt may be prefilled before, too.
        """
        self._drop()
        worked, self.decode_seconds = False, 0.0
        while True:
            coming = sum(len(q.candidates) for q in itertools.chain(*self._groups, (f.question for f in self._long)))
            room = self.batch_rows - coming - sum(c._ready for q in self._under_way for c in q.open)
            if not self._groups and room > 0:
                self._take_in(arrivals(room))
            if not self._groups:
                break
            self._prefill_batch(self._groups.popleft())
            worked = True
            if self.pace:
                break
        if self._long and fill:
            self._fill()
            worked = True
        if worked:
            self._drop()  # prefilling takes its time
        if self._under_way:
            began = time.perf_counter()
            self._seat()
            self._forward()
            self.decode_seconds = time.perf_counter() - began if self._under_way else 0.0
            worked = True
        return worked or bool(self._long)

    @property
    def filling(self) -> bool:
        """Whether a long prompt is being prefilled."""
        return bool(self._long)

    # -- the model ---------------------------------------------------------------------------------------------------

    def _take_in(self, questions: list[Question]) -> None:
        """Put prompts of similar lengths together, as many as one forward may have."""
        most = self.pace.tokens() if self.pace else PREFILL_TOKENS
        for q in (q for q in questions if q.ask.prompt_logprobs is not None):
            self._fill_later(q)
        questions = [q for q in questions if q.ask.prompt_logprobs is None]
        lengths = [len(q.prompt) for q in questions]
        for part in batches_by_length(lengths, most):
            group = [questions[i] for i in sorted(part)]
            if self.pace and lengths[part[0]] > most:
                self._fill_later(group[0])
            else:
                self._groups.append(group)

    def _fill_later(self, question: Question) -> None:
        ids, positions, _ = self._admit([question])
        self._long.append(_Filling(question, new_cache(), ids, positions))

    def _admit(self, questions: list[Question]) -> tuple[Tensor, Tensor, Tensor | None]:
        """New states for the prompts, and these as ids [B, P] with their positions and mask."""
        device, lengths = self.model.model.device, [len(q.prompt) for q in questions]
        width = max(lengths)
        for q in questions:
            q._padded = [pad_token(self.model.tokenizer) or 0] * (width - len(q.prompt)) + q.prompt
        ids = torch.tensor([q._padded for q in questions], device=device)
        begins, column = width - torch.tensor(lengths, device=device)[:, None], torch.arange(width, device=device)
        mask = None if width == min(lengths) else (column >= begins).long()
        for q, state in zip(questions, self.scorer.admit(ids, mask), strict=True):
            q._state = state
        return ids, (column - begins).clamp_min(0), mask

    def _fill(self) -> None:
        """A piece of the long prompt that came first."""
        filling = self._long[0]
        question, most = filling.question, self.pace.tokens() if self.pace else PREFILL_TOKENS
        chances = question.ask.prompt_logprobs is not None
        if chances:
            most = min(most, max(1, LOGITS // self.model.model.get_input_embeddings().num_embeddings))
        piece = slice(filling.done, min(filling.done + most, filling.ids.shape[1]))
        self.scorer.assign([question._state])
        with self.pace.timed(piece.stop - piece.start) if self.pace else nullcontext():
            logits = self._call(
                filling.cache, filling.ids[:, piece], filling.positions[:, piece], None, keep=0 if chances else 1
            )
            if chances:
                self._read_chances(question, logits[0], piece.start)
                logits = logits[:, -1]
        self.scorer.assign([c._state for c in self._batch])
        filling.done = piece.stop
        if filling.done == filling.ids.shape[1]:
            self._long.popleft()
            self._prefilled([question], filling.cache, logits)

    def _read_chances(self, question: Question, logits: Tensor, begin: int) -> None:
        """Of the tokens behind those, from place ``begin`` on, that ``logits`` [T, V] are of."""
        found, prompt = question.prompt_chances, question.prompt
        if not begin:
            found.append(Chance(prompt[0], None, []))
        tokens = torch.tensor(prompt[begin + 1 : begin + 1 + len(logits)], dtype=torch.int64, device=logits.device)
        found += _chances(logits[: len(tokens)].float(), tokens[:, None], [question.ask.prompt_logprobs] * len(tokens))

    def _prefill_batch(self, questions: list[Question]) -> None:
        ids, positions, mask = self._admit(questions)
        cache = new_cache()
        self.scorer.assign([q._state for q in questions])
        logits = self._call(cache, ids, positions, mask)
        self.scorer.assign([c._state for c in self._batch])
        self._prefilled(questions, cache, logits)

    def _prefilled(self, questions: list[Question], cache: DynamicCache, logits: Tensor) -> None:
        """Every candidate's first token, after prompts whose keys and values are in ``cache``."""
        rows = Rows(cache, [len(q.prompt) for q in questions])
        for i, q in enumerate(questions):
            q._kept = rows.take(i)
            for c in q.candidates:
                c._kept, c._logits = q._kept, logits[i]
        if self._rows is None:
            rows.arrange([])
            self._rows = rows
        candidates = [c for q in questions for c in q.candidates]
        for c in candidates:
            if not c.question.ask.max_new_tokens:
                c.status = c.finished = "length"
        candidates = [c for c in candidates if c.running]
        self._draw(candidates)
        self._under_way += questions
        self._follow(questions, candidates)

    def _seat(self) -> None:
        """Empty the places of those that do not go on, and fill what is free."""
        stay = [i for i, c in enumerate(self._batch) if c._ready]
        for i, c in enumerate(self._batch):
            if not c._ready:
                c._seat = None
                c._kept = self._rows.take(i) if c.running else None
        waiting = (c for q in self._under_way for c in q.candidates if c._ready and c._seat is None)
        join = list(itertools.islice(waiting, self.batch_rows - len(stay)))
        if not join and len(stay) == len(self._batch):
            return
        self._give_states(join)
        self._rows.arrange(stay, [c._kept for c in join])
        self._batch = [self._batch[i] for i in stay] + join
        for i, c in enumerate(self._batch):
            c._seat, c._kept = i, None
        self.scorer.assign([c._state for c in self._batch])

    def _forward(self) -> None:
        """Feed every seated candidate's newest token and draw its next."""
        batch, device = self._batch, self.model.model.device
        sent = torch.tensor([[c.token_ids[-1] for c in batch], self._rows.lengths]).to(device, non_blocking=True)
        logits = self._call(self._rows.cache, sent[0, :, None], sent[1, :, None], self._rows.mask(device))
        self._rows.grown()
        self._draw(batch, logits)
        for c in batch:
            c._unfed = False
        if self.on_step or any(q.observes for q in self._under_way):
            counts = self.scorer.counts()
            for c, logit in zip(batch, logits, strict=True):
                if counts[c._state] != c._steps:
                    c.step_scores = self.scorer.step_scores(c._state)
                    if c.question.observes and counts[c._state] > c._steps:
                        c._changed, c._logits = True, logit.clone()
                    c._steps = counts[c._state]
        self._follow(self._under_way, batch)

    def _call(
        self, cache: DynamicCache, ids: Tensor, positions: Tensor, mask: Tensor | None, *, keep: int = 1
    ) -> Tensor:
        """Logits [R, V] after the last of ``ids``; ``keep`` 0: [R, T, V], after each of them."""
        given = {"attention_mask": mask, "position_ids": positions, "logits_to_keep": keep}
        given = {name: value for name, value in given.items() if name in self.inputs}
        logits = self.model.model(input_ids=ids, **{self.cache_name: cache}, use_cache=True, **given).logits
        return logits[:, -1] if keep else logits

    def _draw(self, candidates: list[Live], logits: Tensor | None = None) -> None:
        """A next token for each, from ``logits`` [R, V] or, a batch at a time, from those kept; one read of the device."""
        if logits is None:
            for part in _pieces(candidates, self.batch_rows):
                self._draw(part, torch.stack([c._logits for c in part]))
            return
        chance = [c._random.random() for c in candidates]
        forced = [self._forced(c) for c in candidates]
        sent = torch.tensor([chance, forced], dtype=torch.float64).to(logits.device, non_blocking=True)
        logits = logits.float()
        ways = [(c.question.ask.temperature, c.question.ask.top_p) for c in candidates]
        tokens = torch.empty(len(ways), 1, dtype=torch.int64, device=logits.device)
        for way in dict.fromkeys(ways):
            rows = [i for i, other in enumerate(ways) if other == way]
            part = slice(None) if len(rows) == len(ways) else torch.tensor(rows, device=logits.device)
            tokens[part] = _drawn(logits[part], sent[0, part], *way)
        tokens = tokens.clamp_max(logits.shape[1] - 1)  # NaN logits sum to no distribution
        tokens = torch.where(sent[1, :, None] < 0, tokens, sent[1, :, None].long())
        for c, chance in zip(
            candidates, _chances(logits, tokens, [c.question.ask.logprobs for c in candidates]), strict=True
        ):
            c._next = chance

    # -- the candidates ----------------------------------------------------------------------------------------------

    def _follow(self, questions: list[Question], drawn: list[Live]) -> None:
        """What comes of the tokens just drawn."""
        self._accept([c for c in drawn if not c._changed])
        for q in questions:
            if q.observes:
                self._consult(q)
            q.seconds = self._elapsed(q)
            q.alive.append((q.seconds, len(q.open)))
        if self.on_step:
            began = time.perf_counter()
            self.on_step([q.candidates for q in self._under_way])
            self._watching += time.perf_counter() - began
        self._close([q for q in self._under_way if not q.open])

    def _close(self, questions: list[Question]) -> None:
        for q in questions:
            q._kept = None
            self._under_way.remove(q)
            self.scorer.release([q._state])
            if self.on_end:
                self.on_end(q)

    def _drop(self) -> None:
        """End what was cancelled, prompts that are not yet prefilled included."""
        for filling in [f for f in self._long if f.question.cancelled]:
            self._long.remove(filling)
            self._under_way.append(filling.question)
        cancelled = [q for q in self._under_way if q.cancelled]
        self._interrupt(cancelled)
        self._close(cancelled)

    def _accept(self, candidates: list[Live]) -> None:
        """Append each one's drawn token, and score those that it ends."""
        for c in candidates:
            chance, c._next, c._logits = c._next, None, None
            token = chance.token
            c.new_tokens += 1
            c.log_prob += chance.log_prob
            if c.question.ask.logprobs is not None:
                c.chances.append(chance)
            c.question.tokens += 1
            if token in self.ends:
                c.finished = "stop"
            else:
                c.token_ids.append(token)
                c._unfed = True
                if token in (self.model.steps.think_start_id, self.model.steps.think_end_id):
                    c._answer_from = len(c.token_ids) if token == self.model.steps.think_end_id else None
                if self._complete(c):
                    c.finished = "stop"
                elif len(c.token_ids) >= c.question.ask.max_new_tokens:
                    c.finished = "length"
            if c.finished:
                c.status, c._changed = c.finished, True
        self._score([c for c in candidates if c.finished])

    def _consult(self, q: Question) -> None:
        """Have the strategy observe what changed, and do as it says."""
        while True:
            shown = [c for c in q.candidates if c.running or (c.finished and c.status != "stopped")]
            due = any(c._changed for c in shown)
            if q.strategy.by_step:
                due = due and all(c._changed or c._held or c.finished for c in shown)
            stuck = not due and any(c._held for c in shown) and all(c._held or c.finished for c in shown)
            if not due and not stuck:
                return
            step = Step(shown, q.random, q.tokens, [c._changed for c in shown])
            self._act(q, shown, ask(q.strategy, "observe", step))
            if stuck and q.open and all(c._held for c in q.open):
                raise RuntimeError(
                    f"strategy {_name(q.strategy)}: it holds every candidate that could decode, time and again"
                )

    def _act(self, q: Question, shown: list[Live], actions: Sequence[int] | None) -> None:
        actions = [KEEP] * len(shown) if actions is None else [int(a) for a in actions]
        if len(actions) != len(shown) or min(actions, default=KEEP) < HOLD:
            raise RuntimeError(f"strategy {_name(q.strategy)}: observe gave {actions} for {len(shown)} candidates")
        forks: list[Live] = []
        for c, action in zip(shown, actions, strict=True):
            c._changed, c._held = False, action == HOLD and c.running
            if action == STOP:
                c.status = "stopped"
            elif action > 1:
                forks += self._fork(c, action - 1)
        self._draw([c for c in forks if c._logits is not None])
        self._score([c for c in shown if c.status == "stopped"])
        self._accept([c for c in q.open if c._next and not c._held])

    def _fork(self, c: Live, k: int) -> list[Live]:
        """``k`` further candidates that go on where ``c`` is, or are as it has ended."""
        q = c.question
        kept = self._rows.take(c._seat) if c._seat is not None and c.running else c._kept
        states = [None] * k if c._state is None or c.finished else self.scorer.fork([c._state] * k)
        forks = [
            dataclasses.replace(
                c, number=len(q.candidates) + i, parent=c.number, token_ids=list(c.token_ids), new_tokens=0,
                chances=list(c.chances), step_scores=list(c.step_scores), _state=state, _kept=kept, _seat=None, _next=None,
            )
            for i, state in enumerate(states)
        ]  # fmt: skip
        q.candidates += forks
        return forks

    def _give_states(self, candidates: list[Live]) -> None:
        """A score state for each that has none yet."""
        new = [c for c in candidates if c._state is None]
        for c, state in zip(new, self.scorer.fork([c.question._state for c in new]) if new else [], strict=True):
            c._state = state

    def _score(self, candidates: list[Live]) -> None:
        """Final scores of those that have none; their states are free afterwards."""
        candidates = [c for c in candidates if c.scored is None]
        if not candidates:
            return
        self._give_states(candidates)
        rows = [c._state for c in candidates]
        scores = self.scorer.result([torch.tensor(c.question._padded + c.token_ids) for c in candidates], rows=rows)
        for i, c in enumerate(candidates):
            c.scored = Scored.of(scores, i, len(c.question._padded))
            c.step_scores, c._kept, c._logits = scores.step_scores[i].tolist(), None, None
        self.scorer.release(rows)

    @torch.no_grad()
    def _interrupt(self, questions: list[Question]) -> None:
        for q in questions:
            if q.open:
                q.seconds = self._elapsed(q)
            for c in q.open:
                c.status = "interrupted"
        self._score([c for q in questions for c in q.candidates if c.new_tokens or c.token_ids])

    def _elapsed(self, q: Question) -> float:
        return time.perf_counter() - q._began - (self._watching - q._watched)

    # -- where a response ends ---------------------------------------------------------------------------------------

    def _complete(self, c: Live) -> bool:
        """Whether the newest text holds the stop pattern or, without one, an answer with something behind it."""
        q = c.question
        if q._stop and q._stop.search(self.model.decode(c.token_ids[-q._tail :])):
            return True
        if self.model.config.stop:
            return False
        if not self.answer or c._answer_from is None:
            return False
        text = self.model.decode(c.token_ids[max(c._answer_from, len(c.token_ids) - TAIL) :])
        found = self.answer.search(text)
        return bool(found) and found.end() < len(text)

    def _forced(self, c: Live) -> int:
        """The token that must come next, as the thinking budget is used up; -1: any."""
        q = c.question
        if not q._end_ids or not 0 <= (past := len(c.token_ids) - q.ask.thinking_budget) < len(q._end_ids):
            return -1
        if past == 0:
            ended = self.model.steps.think_end_id in c.token_ids
            ended = ended or q._end_text in self.model.decode(c.token_ids, special=True)
            c._cut = q._may_cut and not ended
        return q._end_ids[past] if c._cut else -1


def _drawn(logits: Tensor, chance: Tensor, temperature: float, top_p: float) -> Tensor:
    """Tokens [R, 1]: of logits [R, V] the distribution's inverse at ``chance`` [R] in [0, 1), float64."""
    if not temperature:
        return logits.argmax(-1, keepdim=True)
    logits = TemperatureLogitsWarper(float(temperature))(None, logits)
    if top_p < 1:
        logits = TopPLogitsWarper(float(top_p))(None, logits)
    # float64: a float32 sum over the vocabulary would round away probabilities below 6e-8.
    cdf = logits.softmax(-1, dtype=torch.float64).cumsum(-1)
    return torch.searchsorted(cdf, chance[:, None] * cdf[:, -1:], right=True)


def _chances(logits: Tensor, tokens: Tensor, most: Sequence[int | None]) -> list[Chance]:
    """Of ``tokens`` [R, 1], and of as many of the likeliest as ``most`` says of each, after float32 ``logits`` [R, V]; one read
    of the device."""
    total = logits.logsumexp(1, keepdim=True)
    columns = [tokens.double(), (logits.gather(1, tokens) - total).double()]
    k = min(max((m or 0 for m in most), default=0), logits.shape[1])
    if k:
        top = logits.topk(k)
        columns += [top.indices.double(), (top.values - total).double()]
    found = []
    for (token, log_prob, *likely), m in zip(torch.cat(columns, 1).tolist(), most, strict=True):
        top = zip(map(int, likely[:k]), likely[k:], strict=True)
        found.append(Chance(int(token), log_prob, list(itertools.islice(top, m or 0))))
    return found


def ask(strategy: Strategy, method: str, argument: Any) -> Any:
    """What ``strategy`` says; a RuntimeError names it if it fails."""
    try:
        return getattr(strategy, method)(argument)
    except Exception as error:
        raise RuntimeError(f"strategy {_name(strategy)}: {method} failed: {error!r}") from error


def _name(strategy: Strategy) -> str:
    """Of the class, for the strategies of users bear no other."""
    return type(strategy).__name__


def _pieces(items: list, size: int) -> list[list]:
    return [items[i : i + size] for i in range(0, len(items), size)]
