"""What scoring returns, and how a trajectory's step scores become one number."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import view
from ..kernels.layout import LOG_FLOOR

FLOOR = 1e-10  # of a step score under a logarithm

AGGREGATIONS: dict[str, Callable[[Sequence[float]], float]] = {
    "geometric_mean": lambda scores: math.exp(math.fsum(math.log(max(s, FLOOR)) for s in scores) / len(scores)),
    "mean": lambda scores: math.fsum(scores) / len(scores),
    "min": min,
    "max": max,
    "last": lambda scores: scores[-1],
    "product": lambda scores: math.prod(max(s, FLOOR) for s in scores),
}


FROM_LOGARITHMS = ("geometric_mean", "product")  # of probabilities alone


def aggregate(step_scores: Sequence[float], how: str = "geometric_mean") -> float:
    """One number for a trajectory.

    ==================  ==================================================
    ``geometric_mean``  ``(prod_i max(s_i, 1e-10)) ^ (1/n)``, as published
    ``mean``            ``sum_i s_i / n``
    ``min``             ``min_i s_i``
    ``max``             ``max_i s_i``
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
        score: [B] float32, each trajectory's step scores in one number: their geometric mean, or what the head says (``aggregation``); 0
            without a step; NaN where a hidden state was not finite.
        n_steps: [B] int64, how many steps count.
        step_scores: B tensors [n_steps] float32 in (0, 1); of a head without a final sigmoid, its values.
        step_positions: B tensors [n_steps] int64: columns of the step-tokens in the ids that were scored, padding
            included. (The feature of ``at="predict"`` lies one column earlier, which is what the published server calls a
            position.)
        errors: sequence -> what is wrong with it, for sequences without a valid score.
        aggregation: how ``score`` came of the step scores.
        higher_is_better: False for scores of risk.
        gates: of a gated head, B tensors [n_steps] float32 in (0, 1): the weights of its step scores; else None.
    """

    score: Tensor
    n_steps: Tensor
    step_scores: list[Tensor]
    step_positions: list[Tensor]
    errors: dict[int, str] = field(default_factory=dict)
    aggregation: str = "geometric_mean"
    gates: list[Tensor] | None = None
    higher_is_better: bool = True

    def __len__(self) -> int:
        return len(self.score)

    def best(self) -> int:
        """Index of the highest score, or of the lowest if these are of risk; sequences with an error come last, and of equals the first
        wins."""
        score = self.score if self.higher_is_better else -self.score
        return int(score.nan_to_num(nan=-torch.inf).argmax())

    def aggregate(self, how: str = "geometric_mean") -> Tensor:
        """[B] float32: every trajectory's step scores in one number, see ``reflective.scoring.scores.aggregate``.

        NaN where ``score`` is.

        Raises:
            ValueError: unknown ``how``; a trajectory with more steps than were recorded one by one.
        """
        if how == self.aggregation:
            return self.score.clone()
        for i, (scores, n) in enumerate(zip(self.step_scores, self.n_steps.tolist(), strict=True)):
            if len(scores) < n:
                raise ValueError(
                    f"aggregation={how!r}: of the {n} steps of trajectory {i} only {len(scores)} were recorded"
                )
        return torch.tensor([aggregate(scores.tolist(), how) for scores in self.step_scores], dtype=torch.float32)

    def html(
        self, path: str | Path | None = None, *, texts: Sequence[str] | None = None, ids: Any = None, tokenizer: Any = None
    ) -> str | None:
        """Each trajectory's steps, with position, score and the score so far, which is drawn as a line; a notebook shows the same by itself.

        Args:
            path: file for a whole page, which needs neither network nor script; None: the HTML is returned, to be put into a page.
            texts: of the B trajectories, to be shown with them.
            ids, tokenizer: the [B, T] ids that were scored, padding and prompts included, and whose they are: in place of ``texts``, with each step
                tinted by its score. Special tokens are left out.

        Raises:
            ValueError: ids without tokenizer or the other way round, or beside texts; not as many as trajectories; ids too short for the steps' positions.
            OSError: the file cannot be written.
        """
        if (ids is None) != (tokenizer is None):
            raise ValueError("ids and tokenizer go together: the one is read by the other; give both, or neither")
        if ids is not None and texts is not None:
            raise ValueError("texts: with ids and tokenizer the texts are known; give one or the other")
        given = texts if ids is None else ids
        if given is not None and len(given) != len(self):
            raise ValueError(f"{'texts' if ids is None else 'ids'}: {len(given)} for {len(self)} trajectories; give one each")
        fragment = self._fragment(None if given is None else [self._text(i, given[i], tokenizer) for i in range(len(self))])
        return view.written(f"Scores of {len(self)} trajectories", fragment, path)

    def _repr_html_(self) -> str:
        return self._fragment(limit=view.NOTEBOOK)

    def _fragment(self, texts: "list[tuple[str, list[tuple[int, int]]]] | None" = None, limit: int | None = None) -> str:
        items = []
        for i, (score, steps) in enumerate(zip(self.score.tolist(), self.step_scores, strict=True)):
            text, spans = texts[i] if texts else ("", [])
            items.append(
                view.Trajectory(
                    f"Trajectory {i}", text, score, steps.tolist(), spans, view.running(steps.tolist(), self.aggregation),
                    error=self.errors.get(i), higher_is_better=self.higher_is_better,
                )
            )  # fmt: skip
        gates = None if self.gates is None else [g.tolist() for g in self.gates]
        where = [p.tolist() for p in self.step_positions]
        return view.table(items, where, gates, best=self.best() if len(self) else None, aggregation=self.aggregation, limit=limit)

    def _text(self, i: int, given: Any, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
        """The text of trajectory i and the spans of its steps in it."""
        if tokenizer is None:
            return given, []
        row, ends = [int(t) for t in given], [p + 1 for p in self.step_positions[i].tolist()]
        if ends and ends[-1] > len(row):
            raise ValueError(f"ids[{i}]: {len(row)} ids, and a step ends at position {ends[-1] - 1}; give the ids that were scored")
        text, spans, before = "", [], 0
        for begin, end in zip([0, *ends], [*ends, len(row)], strict=True):
            # With the piece before it: alone, some tokenizers would take the space from its first word.
            whole, known = (tokenizer.decode(row[before:stop], skip_special_tokens=True) for stop in (end, begin))
            spans.append((len(text), len(text) + len(whole) - len(known)))
            text, before = text + whole[len(known) :], begin
        return text, spans[:-1]

    @classmethod
    def gated(cls, value: "TrajectoryScores", gate: "TrajectoryScores") -> "TrajectoryScores":
        """Of a head's values and gates at the same steps: ``sum_i g_i v_i / sum_i g_i``; 0 without a step.

        Raises:
            ValueError: a trajectory with more steps than were recorded one by one.
        """
        scores = []
        for i, (v, g, n) in enumerate(zip(value.step_scores, gate.step_scores, value.n_steps.tolist(), strict=True)):
            if len(v) < n:
                raise ValueError(f"aggregation='gated': of the {n} steps of trajectory {i} only {len(v)} were recorded")
            v, g = v.double(), g.double()
            scores.append(float((g * v).sum() / g.sum()) if n else 0.0)
        score, errors = torch.tensor(scores, dtype=torch.float32), value.errors | gate.errors
        score[list(errors)] = math.nan
        return replace(value, score=score, errors=errors, aggregation="gated", gates=gate.step_scores)

    @classmethod
    def collect(
        cls, log_sums: list[float], n_steps: list[int], log_scores: list[Tensor], columns: list[Tensor], at: str,
        aggregation: str = "geometric_mean", sigmoid: bool = True, higher_is_better: bool = True,
    ) -> "TrajectoryScores":  # fmt: skip
        """From per-sequence sums and step logs (natural log); warns of steps whose features were not finite.

        Args:
            aggregation, sigmoid, higher_is_better: of the head.

        Raises:
            ValueError: see ``aggregate``.
        """
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
        found = cls(score, count, [step_scores(s, sigmoid) for s in log_scores], columns, errors)
        found.higher_is_better = higher_is_better
        if aggregation != "geometric_mean":
            found.score = torch.where(score.isnan(), score, found.aggregate(aggregation))
            found.aggregation = aggregation
        return found


def step_scores(log_scores: Tensor, sigmoid: bool) -> Tensor:
    """Scores [n] of steps, float32, of a head with a final ``sigmoid`` or without, from what the step log holds."""
    return log_scores.exp() if sigmoid else logit_of(log_scores)


def logit_of(log_score: Tensor) -> Tensor:
    """The logit of which ``log_score`` is the log-sigmoid, float32: exact to its rounding between -23 (the floor of log-scores) and 87
    (beyond which log-sigmoid is 0 in float32); what was outside is at that limit."""
    s = log_score.double()
    logit = s - torch.log(-torch.expm1(s))
    return logit.clamp(LOG_FLOOR, 87.0).where(~s.isnan(), s).float()
