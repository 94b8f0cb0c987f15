"""What scoring returns, and how a trajectory's step scores become one number."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

FLOOR = 1e-10  # of a step score under a logarithm

AGGREGATIONS: dict[str, Callable[[Sequence[float]], float]] = {
    "geometric_mean": lambda scores: math.exp(math.fsum(math.log(max(s, FLOOR)) for s in scores) / len(scores)),
    "mean": lambda scores: math.fsum(scores) / len(scores),
    "min": min,
    "last": lambda scores: scores[-1],
    "product": lambda scores: math.prod(max(s, FLOOR) for s in scores),
}


def aggregate(step_scores: Sequence[float], how: str = "geometric_mean") -> float:
    """One number for a trajectory.

    ==================  ==================================================
    ``geometric_mean``  ``(prod_i max(s_i, 1e-10)) ^ (1/n)``, as published
    ``mean``            ``sum_i s_i / n``
    ``min``             ``min_i s_i``
    ``last``            ``s_n``
    ``product``         ``prod_i max(s_i, 1e-10)``
    ==================  ==================================================

    0 without a step; NaN where a step score is NaN.

    Raises:
        ValueError: unknown ``how``.
    """
    if how not in AGGREGATIONS:
        raise ValueError(f"aggregation={how!r}; expected one of {', '.join(AGGREGATIONS)}")
    if any(map(math.isnan, step_scores)):
        return math.nan
    return AGGREGATIONS[how](step_scores) if step_scores else 0.0


class NonFiniteWarning(RuntimeWarning):
    """A hidden state held NaN or inf, so its sequence has no score; the others are unharmed."""


@dataclass
class TrajectoryScores:
    """Scores of B trajectories.

    Attributes:
        score: [B] float32, the geometric mean of each trajectory's step scores; 0 without a step; NaN where a hidden
            state was not finite.
        n_steps: [B] int64, how many steps count.
        step_scores: B tensors [n_steps] float32 in (0, 1).
        step_positions: B tensors [n_steps] int64: columns of the step-tokens in the ids that were scored, padding
            included. (The feature of ``at="predict"`` lies one column earlier, which is what the published server calls a
            position.)
        errors: sequence -> what is wrong with it, for sequences without a valid score.
    """

    score: Tensor
    n_steps: Tensor
    step_scores: list[Tensor]
    step_positions: list[Tensor]
    errors: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.score)

    def best(self) -> int:
        """Index of the highest score; sequences with an error come last, and of equals the first wins."""
        return int(self.score.nan_to_num(nan=-1.0).argmax())

    def aggregate(self, how: str = "geometric_mean") -> Tensor:
        """[B] float32: every trajectory's step scores in one number, see ``reflective.scoring.scores.aggregate``.

        NaN where ``score`` is.

        Raises:
            ValueError: unknown ``how``; a trajectory with more steps than were recorded one by one.
        """
        if how == "geometric_mean":
            return self.score.clone()
        for i, (scores, n) in enumerate(zip(self.step_scores, self.n_steps.tolist(), strict=True)):
            if len(scores) < n:
                raise ValueError(
                    f"aggregation={how!r}: of the {n} steps of trajectory {i} only {len(scores)} were recorded"
                )
        return torch.tensor([aggregate(scores.tolist(), how) for scores in self.step_scores], dtype=torch.float32)

    @classmethod
    def collect(
        cls, log_sums: list[float], n_steps: list[int], log_scores: list[Tensor], columns: list[Tensor], at: str
    ) -> "TrajectoryScores":
        """From per-sequence sums and step logs (natural log); warns of steps whose features were not finite."""
        count = torch.tensor(n_steps, dtype=torch.int64)
        mean = torch.tensor(log_sums, dtype=torch.float64) / count.clamp_min(1)
        score = torch.where(count > 0, mean.exp(), 0.0).float()
        errors = {}
        for i in score.isnan().nonzero().flatten().tolist():
            bad = columns[i][log_scores[i].isnan()].tolist()
            where = f"at column {bad[0] - (at == 'predict')}" if bad else "past the step log's capacity"
            errors[i] = f"the hidden state {where} holds NaN or inf; its trajectory has no score"
        if errors:
            told = "; ".join(f"sequence {i}: {error}" for i, error in errors.items())
            warnings.warn(told, NonFiniteWarning, stacklevel=3)
        return cls(score, count, [s.exp() for s in log_scores], columns, errors)
