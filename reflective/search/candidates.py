"""Questions and their candidates while a run lasts: what strategies see, and what a result is made of."""

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypedDict

import numpy as np

from ..engines.base import Chance, Prompt, Sampling, Score
from ..utils.arguments import brief, real, whole
from .strategies import Strategy, observes
from .text import Reader, Watch


class SamplingSettings(TypedDict, total=False):
    """How candidates are drawn, as keyword arguments that go from ``ReflectiveModel.generate``, the server or a file through to an ``Ask``,
    which says what each means and what it is where it is not given."""

    temperature: float | Sequence[float]
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    min_tokens: int


@dataclass(frozen=True)
class Ask:
    """What is wanted of a run: one question and how to answer it.

    Attributes:
        prompt: its ids.
        strategy: copied for this question.
        max_new_tokens: of a candidate, what it has from its parent included; 0 with ``prompt_logprobs`` alone.
        temperature: 0 decodes greedily. Of several, at most one a candidate, candidate c has number c modulo how many there are; a fork
            has its parent's.
        top_p: the likeliest tokens are kept whose probabilities come to this. Of the model's ``generation_config`` only the
            end-of-sequence counts.
        seed, number: candidate c draws one uniform a token from ``default_rng([seed, number, c])``: its text does not
            depend on which others are alive.
        thinking_budget: tokens after which thinking is ended, see ``ReflectiveModel.generate``; None: never.
        stop: texts that end a response too, each of them part of it.
        logprobs: the chances of how many tokens to keep at every place of a response, beside that of the token that came; None:
            keep nothing. No influence on what is drawn.
        prompt_logprobs: the same of the prompt, which is then prefilled on its own and in pieces.
        top_k: so many of the likeliest tokens are kept; 0: all.
        min_p: tokens are kept whose probability is at least this part of the likeliest one's; 0: all.
        repetition_penalty: logits of tokens that prompt or response have are divided by it, negative ones multiplied; 1: none.
        presence_penalty, frequency_penalty: in [-2, 2], taken from the logit of a token that the response has: once, or as often as it
            has it.
        logit_bias: token ids, and what is added to the logit of each.
        min_tokens: of a response, before which no end-of-sequence token comes; a stop text or a complete answer ends it all the same.
        again: the prompt with a text behind its question, for strategies that ask so; it gives None where the model has no room for it. None: nobody
            can say, as where a prompt came as tokens.

    They are applied in the order in which ``engines.base.Sampling`` names them, as transformers does it and, with penalties, OpenAI and vLLM.

    Raises:
        ValueError: a setting out of its range.
    """

    prompt: Sequence[int] = field(repr=False)
    strategy: Strategy
    max_new_tokens: int = 512
    temperature: float | Sequence[float] = 0.6
    top_p: float = 0.95
    seed: int = 0
    number: int = 0
    thinking_budget: int | None = None
    stop: Sequence[str] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    min_tokens: int = 0
    again: Callable[[str], Sequence[int] | None] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name), 0)
        whole("max_new_tokens", self.max_new_tokens, 1 if self.prompt_logprobs is None else 0)
        whole("seed", self.seed, 0)
        if self.thinking_budget is not None:
            whole("thinking_budget", self.thinking_budget, 0)
        self._check_sampling()
        if self.strategy.asks and self.again is None:
            raise ValueError(
                f"strategy={self.strategy.name!r} has the question asked anew, and here the prompt alone is known; use ReflectiveModel.generate, or a "
                "server's /v1/chat/completions"
            )
        listed = isinstance(self.stop, Collection) and not isinstance(self.stop, str | bytes)
        if not listed or not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop={self.stop!r}: expected a list of texts, none of them empty")

    def _check_sampling(self) -> None:
        several = isinstance(self.temperature, Sequence) and not isinstance(self.temperature, str | bytes)
        if several and not 0 < len(self.temperature) <= self.strategy.n:
            raise ValueError(
                f"temperature: {len(self.temperature)} for {self.strategy.n} candidates; give one, or at most one a candidate"
            )
        for i, t in enumerate(self.temperature if several else [self.temperature]):
            if not real(t) or not 0 <= t < math.inf:
                raise ValueError(f"temperature{[i] if several else ''}={t!r} must be finite, and not negative")
        for name in ("top_k", "min_tokens"):
            whole(name, getattr(self, name), 0)
        ranges = {"top_p": (0, 1), "min_p": (0, 1), "presence_penalty": (-2, 2), "frequency_penalty": (-2, 2)}
        for name, (least, most) in ranges.items():
            value = getattr(self, name)
            if not real(value) or not least <= value <= most:
                raise ValueError(f"{name}={value!r} must lie in [{least}, {most}]")
        if not real(self.repetition_penalty) or not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty={self.repetition_penalty!r} must be finite, and above 0; 1 is none")
        if not isinstance(self.logit_bias, Mapping | None):
            raise ValueError(  # noqa: TRY004
                f"logit_bias={brief(self.logit_bias)}: expected a mapping from token ids to numbers"
            )
        for token, value in (self.logit_bias or {}).items():
            whole("logit_bias: token id", token, 0)
            if not real(value) or not math.isfinite(value):
                raise ValueError(f"logit_bias[{token}]={value!r}: expected a finite number")

    @property
    def temperatures(self) -> Sequence[float]:
        """One or several, of which candidate c has number c modulo how many there are."""
        return [self.temperature] if real(self.temperature) else self.temperature

    def sampling(self, candidate: int, temperature: float) -> Sampling:
        """For the engine."""
        return Sampling(
            (self.seed, self.number, candidate), temperature, self.top_p, self.max_new_tokens, self.logprobs, self.top_k, self.min_p,
            self.repetition_penalty, self.presence_penalty, self.frequency_penalty, tuple((self.logit_bias or {}).items()), self.min_tokens,
        )  # fmt: skip


SAMPLING_DEFAULTS = SamplingSettings(
    **{f.name: f.default for f in dataclasses.fields(Ask) if f.name in SamplingSettings.__annotations__}
)


@dataclass(eq=False)
class Question:
    """One question of a run, and afterwards its result.

    Attributes:
        reader: of the checkpoint's responses.
        strategy: its own copy; prompt: its ids; observes: whether the strategy looks at steps.
        random: of the strategy.
        candidates: all that there ever were, in order of creation.
        prompt_chances: of the prompt's tokens, where they are asked for.
        tokens: decoded in all; alive: ``(seconds since it came, candidates running)`` after every forward.
        seconds: from when it came to its end, time within ``on_step`` left out.
        cancelled: set it, from any thread, to have its candidates ended before the next forward.
        watched: seconds that the search had spent within ``on_step`` when it came; None: it is yet to come.

    Raises:
        ValueError: a ``thinking_budget`` without a text that ends thinking.
    """

    reader: Reader = field(repr=False)
    ask: Ask
    candidates: list["Live"] = field(default_factory=list, repr=False)
    prompt_chances: list[Chance] = field(default_factory=list, repr=False)
    tokens: int = 0
    alive: list[tuple[float, int]] = field(default_factory=list, repr=False)
    seconds: float = 0.0
    cancelled: bool = False
    watched: float | None = field(default=None, repr=False)
    _began: float = field(default_factory=time.perf_counter, repr=False)

    def __post_init__(self) -> None:
        self.prompt, self.strategy = list(self.ask.prompt), copy.deepcopy(self.ask.strategy)
        self.observes = observes(self.strategy)
        # Numbered beyond every candidate: numpy takes a shorter seed for one that ends in zeros.
        self.random = np.random.default_rng([self.ask.seed, self.ask.number, 0, 1])
        self.watch = Watch(self.reader, self.ask.stop)
        if self.ask.thinking_budget is not None:  # before the first token
            try:
                _ = self._end
            except ValueError as error:
                raise ValueError(f"thinking_budget: {error}") from None
        thinking, self._may_cut = self.reader.opens(self.prompt)
        self._thinks = thinking
        self.candidates = []
        self.prompts: dict[str, list[int]] = {"": self.prompt}
        self.begin(self.strategy.begins_with)

    def begin(self, k: int, asked: str = "") -> list["Live"]:
        """``k`` further candidates, from the prompt on, with ``asked`` behind its question; none where there is no room for that."""
        if asked not in self.prompts:
            ids = self.ask.again(asked)
            if ids is None:
                return []
            self.prompts[asked] = list(ids)
        temperatures, there = self.ask.temperatures, len(self.candidates)
        new = [
            Live(i, self, answer_from=None if self._thinks else 0, temperature=temperatures[i % len(temperatures)], asked=asked)
            for i in range(there, there + k)
        ]
        self.candidates += new
        return new

    @property
    def open(self) -> list["Live"]:
        return [c for c in self.candidates if c.running]

    def opening(self, told: bool, asked: str = "") -> Prompt:
        """For the engine; ``told``: whether somebody looks at steps, even where the strategy does not."""
        steps = "awaited" if self.observes else "told" if told else "untold"
        return Prompt(self.prompts[asked], steps, None if asked else self.ask.prompt_logprobs)

    def forced(self, candidate: "Live") -> Sequence[int]:
        """The tokens that must come next: those that end thinking, where the budget is just used up and it still thinks."""
        if len(candidate.token_ids) != self.ask.thinking_budget:
            return ()
        return self.thinking_end(candidate)

    def thinking_end(self, candidate: "Live") -> Sequence[int]:
        """The tokens that end its thinking here; none where that has ended.

        Raises:
            ValueError: there is nothing that ends thinking.
        """
        ids, text = self._end
        if not self._may_cut or self.reader.think_end in candidate.token_ids:
            return ()
        return () if text in self.reader.decode(candidate.token_ids, special=True) else ids

    @cached_property
    def _end(self) -> tuple[list[int], str]:
        """What ends thinking, as tokens and as text."""
        ids = self.reader.thinking_end()
        return ids, self.reader.decode(ids, special=True).strip()

    def went_by(self, watched: float) -> None:
        """Note the time. ``watched``: seconds that the search has spent within ``on_step`` by now."""
        self.seconds = time.perf_counter() - self._began - (watched - (self.watched or 0.0))


@dataclass(eq=False)
class Live:
    """A candidate while the run lasts, as strategies and ``on_step`` see it.

    Attributes:
        number: within its question, in order of creation; parent: the number of the one that it was forked from.
        token_ids: of the response so far, without end-of-sequence token; a fork's include its parent's.
        step_scores: in (0, 1), of every step so far. Kept up to date for strategies that observe and for ``on_step``.
        step_ends: of each of these how many of ``token_ids`` there are up to its end; fewer where a tag has changed which steps count and
            it has not ended.
        inherited: how many of ``token_ids`` a fork had from its parent when it began.
        new_tokens: decoded for this candidate itself.
        log_prob: sum of the model's log-probabilities of its tokens, end-of-sequence included, at temperature 1.
        chances: of each of these tokens, where they are asked for.
        finished: ``"stop"`` (end-of-sequence, stop pattern, complete answer) or ``"length"``; None while it decodes.
        status: ``finished``, or else ``"running"``; ``"stopped"`` by the strategy, ``"interrupted"``.
        scored: what its last scoring says; None before.
        sequence: by which number the engine knows it; None where it does not, before the start and after the end.
        changed: whether it has ended a step or finished since the strategy last observed.
        held: by the strategy; resting: in the engine, as it is held or waits for the others to end their steps.
        waits: behind a step that ended, whether the engine keeps back its next token.
        answer_from: where thinking ended in ``token_ids``; None within it.
        temperature: that it is drawn at; a fork has its parent's.
        asked: what stands behind the question in its prompt.
    """

    number: int
    question: Question = field(repr=False)
    parent: int | None = None
    token_ids: list[int] = field(default_factory=list)
    step_scores: list[float] = field(default_factory=list)
    step_ends: list[int] = field(default_factory=list, repr=False)  # never changed in place
    inherited: int = 0
    new_tokens: int = 0
    log_prob: float = 0.0
    chances: list[Chance] = field(default_factory=list, repr=False)
    finished: str | None = None
    status: str = "running"
    scored: Score | None = field(default=None, repr=False)
    sequence: int | None = field(default=None, repr=False)
    changed: bool = field(default=False, repr=False)
    held: bool = field(default=False, repr=False)
    resting: bool = field(default=False, repr=False)
    waits: bool = field(default=False, repr=False)
    answer_from: int | None = field(default=0, repr=False)
    temperature: float = 0.6
    asked: str = field(default="", repr=False)

    @property
    def text(self) -> str:
        return self.question.reader.decode(self.token_ids)

    @property
    def answer(self) -> str | None:
        return self.question.reader.answer(self.text)

    def score(self, aggregation: str = "geometric_mean") -> float:
        """The steps so far in one number, see ``reflective.scoring.scores.aggregate``."""
        from ..scoring.scores import aggregate

        return aggregate(self.step_scores, aggregation)

    @property
    def running(self) -> bool:
        return self.status == "running"

    def heard(self, chance: Chance) -> None:
        """Count a token that was drawn for it."""
        self.waits = False
        self.new_tokens += 1
        self.question.tokens += 1
        self.log_prob += chance.log_prob
        if self.question.ask.logprobs is not None:
            self.chances.append(chance)

    def append(self, chance: Chance) -> None:
        """Take a token into the response."""
        self.heard(chance)
        self.token_ids.append(chance.token)
        reader = self.question.reader
        if chance.token in (reader.think_start, reader.think_end):
            self.answer_from = len(self.token_ids) if chance.token == reader.think_end else None

    def stepped(self, step_scores: list[float]) -> None:
        """Take in the scores of its steps so far: a step has ended, or a tag has made others count."""
        reader = self.question.reader
        tag = self.token_ids[-1:] in ([reader.think_start], [reader.think_end])
        one_more = len(step_scores) == len(self.step_ends) + 1
        self.step_ends = [*self.step_ends, len(self.token_ids)] if one_more and not tag else []
        self.step_scores = step_scores

    def complete(self) -> bool:
        """Whether its text says that it is."""
        return self.question.watch.complete(self.token_ids, self.answer_from)

    def end(self, status: str, score: Score) -> None:
        """``status``: as the attribute; nothing comes any more."""
        self.status, self.scored, self.step_scores, self.sequence = status, score, list(score.step_scores), None
        self.step_ends = [place + 1 for place in score.positions]
        if status in ("stop", "length"):
            self.finished, self.changed = status, True

    def forked(self, number: int, sequence: int | None) -> "Live":
        """A further candidate that goes on where this one is, or is as it has ended."""
        return dataclasses.replace(
            self, number=number, parent=self.number, token_ids=list(self.token_ids), new_tokens=0, chances=list(self.chances),
            step_scores=list(self.step_scores), inherited=len(self.token_ids), sequence=sequence, resting=False,
        )  # fmt: skip
