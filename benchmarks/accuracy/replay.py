"""What a strategy that only stops candidates makes of candidates that were decoded to their ends: nothing is decoded again.

A candidate's tokens do not depend on who else is alive, so that what it would have been told is known: so many tokens after the prompt, these steps.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from reflective.model import ReflectiveModel
from reflective.scoring.scores import aggregate
from reflective.search.results import Candidate, Generation
from reflective.search.strategies import KEEP, STOP, Step, Strategy


@dataclass
class Drawn:
    """A candidate.

    Attributes: ``step_scores``; ``places``: how many tokens it has when each is told; ``length``: tokens in all, that of its end included; ``answer``; ``score``.
    """

    step_scores: list[float]
    places: list[int]
    length: int
    answer: str | None
    score: float

    def candidate(self, number: int, tokens: int | None = None) -> Candidate:
        """As a search gives it: whole, or stopped after ``tokens``. Of its ids, by which strategies know the same response, the number stands."""
        if tokens is None:
            return Candidate("", self.score, self.step_scores, [], [number], answer=self.answer, number=number, tokens=self.length)
        told = [s for s, at in zip(self.step_scores, self.places, strict=True) if at <= tokens]
        return Candidate("", 0.0, told, [], [number], status="stopped", number=number, tokens=tokens)


def drawn(model: ReflectiveModel, run: Generation) -> list[Drawn]:
    """The candidates of a run of best of n."""
    prompt, found = model.encode(run.prompt)[0].tolist(), []
    for c in run.candidates:
        columns = model.steps.mask(torch.tensor([prompt + c.token_ids]), prompt_lengths=len(prompt))[0].nonzero().flatten()
        places = (columns - len(prompt) + 1).tolist()
        found.append(Drawn(c.step_scores, places[: len(c.step_scores)], c.tokens, c.answer, c.score))
    return found


@dataclass
class _Live:
    """What the strategy sees."""

    number: int
    step_scores: list[float] = field(default_factory=list)
    finished: str | None = None

    def score(self, aggregation: str = "geometric_mean") -> float:
        return aggregate(self.step_scores, aggregation)


def replay(strategy: Strategy, there: Sequence[Drawn]) -> list[Candidate]:
    """The candidates that ``strategy`` leaves, and those that it stopped, as far as they came.

    Raises:
        ValueError: it does something else than to stop them.
    """
    strategy, rng = copy.deepcopy(strategy), np.random.default_rng(0)
    live, tokens = [_Live(i) for i in range(len(there))], [c.length for c in there]
    alive = list(range(len(there)))
    for now in sorted({at for c in there for at in (*c.places, c.length)}):
        changed = []
        for i in alive:
            told = sum(at <= now for at in there[i].places)
            changed.append(told > len(live[i].step_scores) or there[i].length == now)
            live[i].step_scores = there[i].step_scores[:told]
            live[i].finished = "stop" if there[i].length <= now else None
        if not any(changed):
            continue
        actions = strategy.observe(Step([live[i] for i in alive], rng, 0, changed))
        if actions is None:
            continue
        if any(a not in (STOP, KEEP) for a in actions):
            raise ValueError(f"{strategy.name}: what is not only stopped has to be decoded")
        for i in [i for i, action in zip(alive, actions, strict=True) if action == STOP]:
            tokens[i] = min(now, there[i].length)
            alive.remove(i)
    return [c.candidate(i, None if i in alive else tokens[i]) for i, c in enumerate(there)]
