"""What is in a file of candidates, or in several, once it has been read and judged."""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Draw(NamedTuple):
    """A candidate. ``scores``: by aggregation, NaN for none; ``outcome``, ``tokens``: NaN where unknown; ``answer``: or None."""

    scores: tuple[float, ...]
    outcome: float
    answer: str | None
    tokens: float


class Chosen(NamedTuple):
    """What a run chose. ``outcome`` NaN without a verdict; ``tokens``: decoded by all its candidates, NaN where unknown."""

    outcome: float
    tokens: float


@dataclass
class Result:
    """What is in a file, or in several.

    Attributes:
        draws: of every question, in order, whether or not they have a verdict.
        chosen: of every question, one a row of the file.
        steered: a strategy stopped or forked candidates; interrupted: rows that Ctrl-C cut short, left out.
        verdicts: what judged the draws.
        tasks: of its files that the published code has written, None for an unknown one.
        published: of every prompt there, as it stands, score and verdict of ``compute_metric.py``.
    """

    name: str
    draws: dict[str, list[Draw]] = field(default_factory=dict)
    chosen: dict[str, list[Chosen]] = field(default_factory=dict)
    steered: bool = False
    interrupted: int = 0
    verdicts: set[str] = field(default_factory=set)
    tasks: set[str | None] = field(default_factory=set)
    published: dict[str, list[tuple[float, bool]]] = field(default_factory=dict)

    def judged(self) -> dict[str, list[Draw]]:
        """Of every question the candidates with a verdict, if any."""
        return {q: kept for q, draws in self.draws.items() if (kept := [d for d in draws if not math.isnan(d.outcome)])}

    def most(self) -> int:
        """The most candidates that a question's groups can have."""
        return 0 if self.steered else max(map(len, self.judged().values()), default=0)

    def counts(self) -> dict[str, Any]:
        """What is there, and what is left out of which numbers."""
        candidates = [draw for draws in self.draws.values() for draw in draws]
        return {
            "questions": len(self.draws),
            "without_candidates": sum(not draws for draws in self.draws.values()),
            "without_verdict": sum(map(bool, self.draws.values())) - len(self.judged()),
            "candidates": len(candidates),
            "candidates_without_verdict": sum(math.isnan(d.outcome) for d in candidates),
            "candidates_without_score": sum(math.isnan(d.scores[0]) for d in candidates),
            "candidates_without_answer": sum(d.answer is None for d in candidates),
            "interrupted_rows": self.interrupted,
            "steered": self.steered,
            "verdict": ", ".join(sorted(self.verdicts)),
            "task": self._task(),
        }

    def _task(self) -> str | None:
        """The published task, why there is none, or None where no file is the published code's."""
        if None in self.tasks:
            return "none: unknown task, give task="
        return "none: several tasks" if len(self.tasks) > 1 else next(iter(self.tasks), None)
