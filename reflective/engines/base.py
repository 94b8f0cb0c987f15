"""The door by which the search drives an engine. Whoever brings another engine reads this page, and needs no other.

An engine knows tokens, caches, states and scores. The search (``reflective.search``) knows questions, candidates and strategies.
Neither touches the other's fields: between them go the calls and the records below, and no torch.

::

    with engine:                                                # the model is heard from here to the end
        (prefix,) = engine.open([Prompt(ids, steps="awaited")])
        a, b = engine.start(prefix, [Sampling(seed=(0, 0, c)) for c in range(2)])
        while (events := engine.advance()) is not None:
            ...                                                 # Opened, Appended, Stepped, Ended
            c, = engine.fork(a, [Sampling(seed=(0, 0, 2))])     # goes on where a is
            (score,) = engine.stop([b])
        engine.close([prefix])

1. **A prefix is a prompt, run once; a sequence continues one.** Both are known by numbers that the engine gives out and never
   again. ``open`` and ``start`` come back at once; the work is done by ``advance``.
2. **A sequence is what was told of it.** An engine may be ahead, by a token (a device that is not waited for), by a draft, by a
   whole server. Whoever calls ``fork``, ``stop``, ``rest`` or ``force`` means the sequence as the events so far tell it; what the
   engine has done beyond that is undone, forgotten or told later, which is nobody else's business.
3. **Events of a sequence come in order, and one token at a time.** A step that ended is told before the next token, the end last;
   an ``advance`` tells no more than one token of a sequence, so that who reads the text can stop it there. Where the steps of a
   prompt are ``"awaited"``, a step that ended is the last that an ``advance`` tells of its sequence: who steers by scores meets it
   there, and ``fork`` branches behind the step.
4. **A sequence draws as if it were alone.** Its tokens depend on its prefix, its sampling and its own tokens, not on which
   others are decoded, stopped or forked. A fork draws by its own seed from where it begins.
5. **Scores are exact.** Those of an ended or stopped sequence are of the tokens told, the last one included (with
   ``at="predict"`` a step-token that was never fed back counts), and equal ``rf.score`` of the text.
6. **Nothing is copied a token.** A fork may cost what its cache costs; a token costs its event.
7. **The model is left as it was found**, also after an exception. What an engine cannot do it refuses by name when it is made.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, NamedTuple, Protocol

from typing_extensions import Self

Steps = Literal["untold", "told", "awaited"]


class Chance(NamedTuple):
    """What a token's chances were: natural logarithms of the softmax, in float32, of the model's logits as they are, before
    anything that ``Sampling`` does to them.

    Attributes:
        token: that came; log_prob: its own; of the first token of a prompt, which nothing precedes, None.
        top: the likeliest tokens with theirs, in descending order, as many as were asked for.
    """

    token: int
    log_prob: float | None
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Prompt:
    """A prompt to be opened.

    Attributes:
        ids: of its tokens, at least one.
        steps: of its sequences: ``"untold"``, scores come with the end; ``"told"``, a ``Stepped`` comes with every step;
            ``"awaited"``, and nothing further of that sequence until the next ``advance``.
        logprobs: the chances of how many tokens to give at every place of the prompt, beside those of the token there; None: none.
    """

    ids: Sequence[int] = field(repr=False)
    steps: Steps = "untold"
    logprobs: int | None = None


@dataclass(frozen=True)
class Sampling:
    """How one sequence is drawn. Where several settings are used, each changes what those before it have left, in this order:
    ``logit_bias``, ``repetition_penalty``, ``frequency_penalty``, ``presence_penalty``, ``min_tokens``, ``temperature``, ``top_k``,
    ``top_p``, ``min_p``.

    Attributes:
        seed: non-negative integers, a sequence's own: one uniform a token comes from it.
        temperature, top_p: 0 decodes greedily; the likeliest tokens are kept whose probabilities come to ``top_p``.
        max_tokens: of the sequence, what it has from its parent included; with 0 it ends when its prompt is run.
        logprobs: as for ``Prompt``, at every place of the sequence.
        top_k: so many of the likeliest tokens are kept; 0: all.
        min_p: tokens are kept whose probability is at least this part of the likeliest one's.
        repetition_penalty: the logit of a token that the prompt or the sequence has is divided by it, or multiplied where it is
            negative; 1: none.
        presence_penalty: is taken from the logit of a token that the sequence has; frequency_penalty: as often as it has it.
        logit_bias: tokens, and what is added to the logit of each.
        min_tokens: of the sequence, before which no end-of-sequence token comes.
    """

    seed: tuple[int, ...]
    temperature: float = 0.6
    top_p: float = 0.95
    max_tokens: int = 512
    logprobs: int | None = None
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0

    @property
    def looks_back(self) -> bool:
        """Whether what may be drawn depends on the tokens before."""
        penalties = self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty
        return bool(penalties or self.min_tokens)


class Score(NamedTuple):
    """What a sequence has come to.

    Attributes:
        score: geometric mean of the step scores; 0 without a step, NaN with an error.
        step_scores: in (0, 1), one a step that counts.
        positions: of every step's last token, among the sequence's tokens, the prompt's not counted.
        error: why there is no score, or None.
    """

    score: float = 0.0
    step_scores: Sequence[float] = ()
    positions: Sequence[int] = ()
    error: str | None = None


class Opened(NamedTuple):
    """A prefix was run; ``chances``: of its tokens, if asked for."""

    prefix: int
    chances: list[Chance]


class Appended(NamedTuple):
    """A token was drawn, and belongs to the sequence."""

    sequence: int
    chance: Chance


class Stepped(NamedTuple):
    """The scores of the steps so far have changed: by a step that ended (``ended``), or by a tag that made others count."""

    sequence: int
    step_scores: list[float]
    ended: bool


class Ended(NamedTuple):
    """A sequence has ended by itself: by ``"stop"``, an end-of-sequence token, which is ``chance`` and no part of the sequence; or by
    ``"length"``."""

    sequence: int
    reason: Literal["stop", "length"]
    chance: Chance | None
    score: Score


Event = Opened | Appended | Stepped | Ended


class Engine(Protocol):
    """Attributes:
    scoring_seconds: host time spent within the scorer so far.
    how: what decodes, in a word: generations tell it.
    """

    scoring_seconds: float
    how: str

    @property
    def room(self) -> int:
        """How many further sequences there are places for; at 0 and below those that are started wait."""

    def __enter__(self) -> Self:
        """Within, the engine may be called."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def open(self, prompts: Sequence[Prompt]) -> list[int]:
        """Prefixes for ``prompts``, each to be run once, in the next ``advance`` calls."""

    def start(self, prefix: int, samplings: Sequence[Sampling]) -> list[int]:
        """New sequences behind a prefix, which need not be run yet."""

    def advance(self) -> list[Event] | None:
        """Do one piece of work, and tell what came of it: run prompts, or a token of every sequence that decodes. What is known
        already, as the first token of a fork or what an awaited step held back, is told at once, and nothing is run.

        Returns:
            The events, possibly none; None: there was nothing to do.
        """

    def fork(self, sequence: int, samplings: Sequence[Sampling]) -> list[int]:
        """New sequences that go on where one that has not ended is, tokens, steps and forced tokens included."""

    def stop(self, sequences: Sequence[int]) -> list[Score]:
        """End sequences here. Nothing further is told of them."""

    def rest(self, sequences: Sequence[int]) -> None:
        """Have sequences leave their places and wait. Nothing is told of them meanwhile."""

    def resume(self, sequences: Sequence[int]) -> None:
        """Have resting sequences go on."""

    def force(self, sequence: int, tokens: Sequence[int]) -> None:
        """The next tokens of a sequence are these, whatever it would draw."""

    def close(self, prefixes: Sequence[int]) -> None:
        """Forget prefixes, run or not, and whatever sequences they still have."""
