"""Strategies: what becomes of a question's candidates while they decode, and which of them is the answer.

The engine (``reflective.search.loop``) decodes. Whenever candidates end a step or finish it shows the strategy all of them
(``observe``) and does as told: key-value cache, score state and text follow. At the end ``choose`` picks the answer.

A strategy of one's own::

    @dataclass
    class Patient(Strategy):
        patience: int = 3  # steps

        def observe(self, step):
            return [STOP if len(c.step_scores) > self.patience and c.score("last") < 0.1 else KEEP for c in step.candidates]
"""

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from numpy.random import Generator

    from ..results import Candidate

STOP, KEEP, HOLD, ANSWER = 0, 1, -1, -2  # k > 1 forks a candidate into k, itself the first
_HOME = {
    "best_of_n": "BestOfN",
    "majority": "Majority",
    "weighted_vote": "WeightedVote",
    "select": "Select",
    "first_finish": "FirstFinish",
    "prune": "Prune",
    "replace": "Replace",
    "exit": "Exit",
    "auto": "Auto",
    "refine": "Refine",
    "step_beam": "StepBeam",
    "dvts": "DVTS",
    "particles": "Particles",
    "astar": "AStar",
    "rpc": "RPC",
}
MOST = 65_536  # candidates of a question: each has a generator of its own, whether it decodes or waits
_FILES = {"majority": "votes", "weighted_vote": "votes"}  # the others' files bear their names
NAMES = tuple(_HOME)
WITHOUT_SCORE, WITHOUT_STEP, SCORED = range(3)  # standings of a candidate


class Live(Protocol):
    """What a strategy sees of a candidate while the run lasts.

    Attributes: see ``search.candidates.Live``.
    """

    number: int
    parent: int | None
    asked: str
    token_ids: list[int]
    step_scores: list[float]
    new_tokens: int
    log_prob: float
    finished: str | None
    status: str

    @property
    def text(self) -> str: ...

    @property
    def answer(self) -> str | None: ...

    def score(self, aggregation: str = "geometric_mean") -> float: ...


@dataclass
class Step:
    """What a strategy sees.

    Attributes:
        candidates: of one question, all that were neither stopped nor discarded: running, held and finished.
        rng: of this question, from the run's seed; the only randomness a strategy may use.
        tokens: decoded for this question so far, by all its candidates.
        changed: which candidates ended a step or finished since the last ``observe``.
        fresh: set it, to have so many further candidates begin, from the prompt on; asked: and to this, what stands behind the question in
            their prompt. Where the model has no room for that none begin.
    """

    candidates: list[Live]
    rng: "Generator"
    tokens: int
    changed: list[bool]
    fresh: int = 0
    asked: str = ""


@dataclass
class Strategy:
    """Base of all strategies; its fields are settings. One deep copy serves one question.

    Attributes:
        n: candidates to begin with; 8 is the medium effort.
        asks: whether it has the question asked anew, with more behind it.
        by_step: False: ``observe`` after every forward in which a candidate ended a step or finished. True: only when
            every running candidate has; those that have wait for the others.
        aggregation: of step scores to one, see ``reflective.scoring.scores.aggregate``; by default the head's. ``"gated"``, for gated heads: the score
            of whoever has finished, and until then the mean, as the search is not told of gates.
        chooser: another strategy, whose ``choose`` picks the answer in place of its own, as ``select`` among those that ``prune`` has left; for ``by_name``
            its name will do. What is promised of a strategy's own pick is not promised of another's.
        name: by which ``by_name`` knows it; about: what it does, and stops: why it stops a candidate, in words for whoever watches.
        chosen_by: what decided in ``choose``, see ``Generation.chosen_by``; a ``choose`` of one's own may say so too.
    """

    name: ClassVar[str] = "strategy"
    about: ClassVar[str] = ""
    stops: ClassVar[str] = "its strategy had no further use for it"
    asks: ClassVar[bool] = False
    n: int = 8
    by_step: bool = False
    aggregation: str = "geometric_mean"
    chooser: "Strategy | None" = None
    chosen_by: str = field(default="strategy", init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        from ...scoring.scores import AGGREGATIONS  # not above: with torch it takes seconds, and NAMES should not

        if isinstance(self.n, bool) or not isinstance(self.n, Integral):
            raise ValueError(f"n={self.n!r}: expected a number of candidates, an integer")  # noqa: TRY004
        if self.n < 1:
            raise ValueError(f"n={self.n}: at least one candidate is needed")
        if self.n > MOST:
            raise ValueError(f"n={self.n}: more than {MOST} candidates; ask several times, with other seeds")
        if self.chooser is not None and not isinstance(self.chooser, Strategy):
            raise ValueError(f"chooser={self.chooser!r}: expected a strategy; by_name finds one by its name")
        if self.aggregation not in (*AGGREGATIONS, "gated"):
            raise ValueError(f"aggregation={self.aggregation!r}; expected one of {', '.join(AGGREGATIONS)}")

    @classmethod
    def of(cls, home: str | Path | None, **settings: Any) -> "Strategy":
        """The strategy with ``settings`` and what the checkpoint at ``home`` says of it."""
        return cls(**settings)

    @property
    def begins_with(self) -> int:
        """Candidates to begin with, where these are not n."""
        return self.n

    def observe(self, step: Step) -> Sequence[int] | None:
        """An action for each of ``step.candidates``: STOP, KEEP, HOLD (rest until a later ``observe`` says otherwise), ANSWER (end its
        thinking here, as a thinking budget does, and go on with the answer) or k > 1 (fork into k). None keeps all. On a finished candidate
        KEEP leaves it among the results."""
        return None

    def choose(self, candidates: "Sequence[Candidate]") -> int:
        """Index of the answer: the highest score among those not stopped; of equals the first.

        A candidate without a step never beats one that has some, and where a step has no score a candidate comes last. If
        nobody has a score, as where all are too short for a step, the answer that most give is chosen, and of equally
        frequent ones the likeliest response.
        """
        there = eligible(candidates)
        standings = self.standings([candidates[i] for i in there])
        best = max(standings)
        level = [i for i, (rank, _) in zip(there, standings, strict=True) if rank == best[0]]
        if best[0] == SCORED or len(level) == 1:
            self.chosen_by = "score"
            return there[standings.index(best)]
        from .votes import likeliest_of_most

        p = [p for rank, p in standings if rank == best[0]]
        index, self.chosen_by = likeliest_of_most([candidates[i] for i in level], p)
        return level[index]

    def standing(self, candidate: "Candidate | Live") -> tuple[int, float]:
        """What candidates are ordered by: whether they have steps, and their scores; without those, how likely they are."""
        if any(map(math.isnan, candidate.step_scores)):
            return WITHOUT_SCORE, likelihood(candidate)
        return (SCORED, self.value(candidate)) if candidate.step_scores else (WITHOUT_STEP, likelihood(candidate))

    def standings(self, candidates: "Sequence[Candidate]") -> list[tuple[int, float]]:
        """``standing`` of each; of responses of the same tokens that of the first, for in another company the last bits differ."""
        first: dict[tuple[int, ...], tuple[int, float]] = {}
        return [first.setdefault(tuple(c.token_ids), self.standing(c)) for c in candidates]

    def value(self, candidate: "Candidate | Live") -> float:
        """The candidate's score under ``aggregation``; 0 without a step, -1 where a step has none."""
        from ...scoring.scores import aggregate

        if self.aggregation == "gated":
            score = aggregate(candidate.step_scores, "mean") if callable(candidate.score) else candidate.score
        else:
            score = aggregate(candidate.step_scores, self.aggregation)
        return -1.0 if math.isnan(score) else score


def observes(strategy: Strategy) -> bool:
    """Whether it looks at candidates before they have ended."""
    return type(strategy).observe is not Strategy.observe


def likelihood(candidate: "Candidate | Live") -> float:
    """``exp(log_prob / length)``, the geometric mean of its tokens' probabilities; 0 where they are not known."""
    p = math.exp(candidate.log_prob / max(1, len(candidate.token_ids)))
    return 0.0 if math.isnan(p) else p


def eligible(candidates: "Sequence[Candidate]") -> list[int]:
    """Indices of the candidates that were not stopped; of all where nothing else is there."""
    return [i for i, c in enumerate(candidates) if c.status != "stopped"] or list(range(len(candidates)))


def kind(name: str) -> type[Strategy]:
    """The class of the strategy called ``name``.

    Raises:
        ValueError: unknown name.
    """
    if not isinstance(name, str) or name not in _HOME:
        raise ValueError(f"strategy={name!r}; expected one of {', '.join(NAMES)}")
    return __getattr__(_HOME[name])


def by_name(name: str, home: str | Path | None = None, **settings: Any) -> Strategy:
    """The strategy called ``name``.

    Args:
        home: directory of the checkpoint's head, where a calibrated strategy finds its rule (``prune.json``, ``select.json``, ``exit.json``, ``auto.json``).
        settings: instead of the defaults.

    Raises:
        ValueError: unknown name; a calibrated strategy (``"prune"``, ``"select"``, ``"exit"``, ``"auto"``) without its rule. TypeError: unknown setting.
    """
    if isinstance(chooser := settings.get("chooser"), str):
        settings["chooser"] = by_name(chooser, home)
    return kind(name).of(home, **settings)


def __getattr__(attribute: str) -> Any:
    """Import a strategy's class on first use."""
    for name, cls in _HOME.items():
        if attribute == cls:
            return getattr(importlib.import_module(f".{_FILES.get(name, name)}", __name__), cls)
    raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")
