"""How good scores are at telling right from wrong, with intervals over questions."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.score_rows import score_rows
from ..scoring.scores import AGGREGATIONS, FLOOR
from ..scoring.sharded import ACTIVATIONS
from ..scoring.sprm import SPRM
from ..search.selection import Metric, VoteRule, fit_vote_rule, saturation, select  # noqa: F401 (saturation: imported from here)
from .data import Rollouts

_CALIBRATION_BINS = 10
_AUC_BINS = 512  # of equal mass, for the resamples only: the value itself is exact
_ROWS = 16_384  # features a pass through the head


def log_scores(rollouts: Rollouts, head: SPRM) -> Tensor:
    """``max(log sigmoid(head(features)), log 1e-10)``, [M] float32 on the CPU; the head as in scoring, without dropout.

    Of features of several layers those are taken that the head reads.

    Raises:
        ValueError: no features were recorded, or not those that the head reads.
    """
    if rollouts.features is None:
        raise ValueError("rollouts: no features were recorded; give the log-scores of their steps instead of a head")
    if rollouts.tap is not None:
        rollouts = rollouts.read(replace(rollouts.tap, layers=head.tap.layers))
    device, weights, activation = head[0].weight.device, head.weights(), ACTIVATIONS[head.activation]
    rows = [score_rows(f.to(device, head.dtype), *weights, activation).cpu() for f in rollouts.features.split(_ROWS)]
    return torch.cat(rows)


def trajectory_scores(rollouts: Rollouts, log_scores: Tensor, aggregation: str = "geometric_mean") -> Tensor:
    """[N] float64, ``scores.aggregate`` of the steps of every trajectory: 0 without a step, NaN where a step's score is.

    Args:
        log_scores: [M], natural logarithms.

    Raises:
        ValueError: unknown ``aggregation``, steps that were not recorded, or another number of scores, or scores above 0.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation={aggregation!r}; expected one of {', '.join(AGGREGATIONS)}")
    if rollouts.trajectory is None or log_scores.shape != rollouts.trajectory.shape:
        steps = "no" if rollouts.trajectory is None else len(rollouts.trajectory)
        raise ValueError(
            f"log_scores: shape {tuple(log_scores.shape)} for {steps} recorded steps; expected one for each"
        )
    if (log_scores > 0).any():
        raise ValueError("log_scores: found a value above 0; expected logarithms of scores")
    owner, n = rollouts.trajectory.cpu(), len(rollouts)
    log, steps = log_scores.detach().cpu().double(), torch.bincount(owner, minlength=n)
    zeros, floored = torch.zeros(n, dtype=torch.float64), log.clamp_min(math.log(FLOOR))
    if aggregation == "geometric_mean":
        score = (zeros.index_add(0, owner, floored) / steps).exp()
    elif aggregation == "product":
        score = zeros.index_add(0, owner, floored).exp()
    elif aggregation == "mean":
        score = zeros.index_add(0, owner, log.exp()) / steps
    elif aggregation == "min":
        score = zeros.scatter_reduce(0, owner, log, "amin").exp()  # no logarithm of a score is above the zeros
    elif aggregation == "max":
        score = zeros.scatter_reduce(0, owner, log, "amax", include_self=False).exp()
    else:
        score = zeros.scatter(0, owner[_ends(steps)], log[_ends(steps)].exp())
    score = torch.where(steps > 0, score, 0.0)
    return torch.where(torch.bincount(owner[log.isnan()], minlength=n) > 0, torch.nan, score)


def evaluate(
    rollouts: Rollouts,
    head_or_log_scores: SPRM | Tensor,
    *,
    n: Sequence[int] = (2, 8, 32),
    aggregation: str = "geometric_mean",
    rule: VoteRule | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Metric]:
    """What the scores of rollouts are worth, beside what needs no score.

    A question's draws are shuffled and cut into groups of ``n``, the rest left over; all groups weigh the same, and without
    one there is no ``@n``.

    ===================  =============================================================================================
    ``pass@1``           mean outcome of the draws
    ``majority@n``       outcome of the answer that most of a group give; of equally frequent ones the mean
    ``weighted_vote@n``  outcome of the answer with the largest sum of scores, where it scores highest
    ``select@n``         the same with the ``rule``'s powers of the scores; only with a rule
    ``best_of@n``        outcome of the highest score in a group; of equals the mean
    ``any@n``            whether one of a group is correct
    ``auc_step``         chance that a step of a correct draw outscores a step of an incorrect one, ties 1/2
    ``auc_trajectory``   the same for trajectory scores
    ``auc_within``       the same for two draws of one question, over all pairs of all questions
    ``score_correct``    mean trajectory score of correct draws
    ``score_incorrect``  mean trajectory score of incorrect draws
    ``score_gap``        their difference
    ``kept``             share of steps on which the head agrees with the outcome: what dynamic weights keep
    ``ece``              expected calibration error of trajectory scores, 10 bins of equal mass
    ``brier``            mean squared difference of trajectory score and outcome
    ===================  =============================================================================================

    Where nobody in a group answers, ``majority`` is its mean outcome and ``weighted_vote`` its best of n. Trajectories
    without a verdict are left out, and one without a valid score counts as scored 0.

    Args:
        head_or_log_scores: a head for the recorded features, or [M] log-scores of the recorded steps.
        rule: how votes are weighed, calibrated on other questions, see ``vote_rule``.
        resamples: of the questions, drawn with replacement, for the intervals.
        seed: of groups and resamples.

    Raises:
        ValueError: nothing was judged, or what ``trajectory_scores`` and ``log_scores`` refuse.
    """
    return evaluate_seeds(
        [(rollouts, head_or_log_scores)], n=n, aggregation=aggregation, rules=[rule], resamples=resamples, seed=seed
    )


def evaluate_seeds(
    runs: Sequence[tuple[Rollouts, SPRM | Tensor]],
    *,
    n: Sequence[int] = (2, 8, 32),
    aggregation: str = "geometric_mean",
    rules: Sequence[VoteRule | None] | None = None,
    differences: Sequence[tuple[str, str]] = (),
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Metric]:
    """``evaluate`` of several seeds: the mean over them, its interval from resampling both questions and seeds.

    A question that occurs in several runs, by its number, is drawn for all of them at once. Measures that a run lacks are
    left out.

    Args:
        rules: of each run.
        differences: pairs of measures; the first less the second is told as ``"FIRST - SECOND"``, with the interval of the difference: each
            resample takes both of the same questions and seeds.

    Raises:
        ValueError: see ``evaluate``; no run.
    """
    judged = [rollouts.question[~rollouts.outcome.isnan()] for rollouts, _ in runs]
    if not judged or not all(map(len, judged)):
        raise ValueError("rollouts: no trajectory has a verdict")
    questions = torch.cat(judged).unique()
    tables = [
        _measures(rollouts, scores, questions, n, aggregation, rule, torch.Generator().manual_seed(seed))
        for (rollouts, scores), rule in zip(runs, rules or [None] * len(runs), strict=True)
    ]
    generator = torch.Generator().manual_seed(seed)
    weight = _resampled(len(questions), resamples, generator)  # [R, Q]
    share = _resampled(len(runs), resamples, generator) / len(runs)  # [R, S]
    values, drawn = {}, {}
    for name in tables[0]:
        if all(name in table for table in tables):
            draws = torch.stack([table[name].resample(weight) for table in tables], 1)
            drawn[name] = torch.where(share > 0, share * draws, 0.0).sum(1)
            values[name] = sum(table[name].value for table in tables) / len(tables)
    for a, b in differences:
        if a in values and b in values:
            values[f"{a} - {b}"], drawn[f"{a} - {b}"] = values[a] - values[b], drawn[a] - drawn[b]
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    return {name: Metric(value, *drawn[name].nanquantile(ends).tolist()) for name, value in values.items()}


def vote_rule(
    rollouts: Rollouts, head_or_log_scores: SPRM | Tensor, *, aggregation: str = "geometric_mean", seed: int = 0
) -> VoteRule:
    """The rule of ``strategy="select"`` that is worth most on these rollouts, see ``fit_vote_rule``. They should be of questions that neither
    the head has learnt from nor anything is measured on.

    Raises:
        ValueError: see ``evaluate``; no question was answered twice.
    """
    return fit_vote_rule(*draws(rollouts, head_or_log_scores, aggregation=aggregation), seed=seed)


def draws(
    rollouts: Rollouts, head_or_log_scores: SPRM | Tensor, *, aggregation: str = "geometric_mean"
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """``(score, outcome, answer, question)`` of every draw with a verdict, as ``fit_vote_rule`` and ``Auto.fit`` take them.

    Raises:
        ValueError: see ``evaluate``.
    """
    kept = _Judged.of(rollouts, head_or_log_scores, aggregation, rollouts.question.unique())
    return tuple(t.repeat_interleave(kept.count).numpy() for t in (kept.score, kept.outcome, kept.answer, kept.question))


def calibration(
    rollouts: Rollouts, head_or_log_scores: SPRM | Tensor, *, bins: int = 10, aggregation: str = "geometric_mean"
) -> list[tuple[float, float, float]]:
    """``(mean score, share correct, share of the draws)`` of bins of about equal mass, in order: a reliability plot.

    Raises:
        ValueError: see ``evaluate``.
    """
    kept = _Judged.of(rollouts, head_or_log_scores, aggregation, rollouts.question.unique())
    bin = _bins(kept.score, kept.count, bins)
    each = torch.stack([kept.score, kept.outcome, torch.ones_like(kept.score)], 1) * kept.count[:, None]
    drawn = float(kept.count.sum())
    return [(s / m, y / m, m / drawn) for s, y, m in _sum(each, bin, bins).tolist() if m]


@dataclass(frozen=True)
class _Measure:
    """``value``; ``resample``: weights of the questions [R, Q] -> [R] values."""

    value: float
    resample: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Judged:
    """Trajectories with a verdict, float64 and int64 [N]; ``question`` counts through the Q of a list of questions.

    ``log_score``, ``owner`` [M]: of their steps with a valid score.
    """

    score: Tensor
    outcome: Tensor
    count: Tensor
    question: Tensor
    answer: Tensor
    log_score: Tensor
    owner: Tensor

    @classmethod
    def of(cls, rollouts: Rollouts, scores: SPRM | Tensor, aggregation: str, questions: Tensor) -> "_Judged":
        logs = scores.detach().cpu() if isinstance(scores, Tensor) else log_scores(rollouts, scores)
        score = trajectory_scores(rollouts, logs, aggregation).nan_to_num(nan=0.0)
        keep = ~rollouts.outcome.isnan()
        steps = keep[rollouts.trajectory] & ~logs.isnan()
        return cls(
            score=score[keep],
            outcome=(rollouts.outcome[keep] > 0.5).double(),
            count=rollouts.count[keep],
            question=torch.searchsorted(questions, rollouts.question[keep]),
            answer=rollouts.answer[keep],
            log_score=logs[steps],
            owner=(keep.cumsum(0) - 1)[rollouts.trajectory[steps]],
        )


def _measures(
    rollouts: Rollouts,
    scores: SPRM | Tensor,
    questions: Tensor,
    n: Sequence[int],
    aggregation: str,
    rule: VoteRule | None,
    generator: torch.Generator,
) -> dict[str, _Measure]:
    kept, size = _Judged.of(rollouts, scores, aggregation, questions), len(questions)
    count, right = kept.count.double(), kept.outcome

    def total(values: Tensor, question: Tensor = kept.question) -> Tensor:
        return _sum(values, question, size)

    def ratio(above: Tensor, below: Tensor) -> _Measure:
        return _measure(lambda w: (w @ above) / (w @ below), size)

    table = {"pass@1": ratio(total(count * right), total(count))}
    for group_size, group_question, outcomes in _groups(kept, n, rule, generator):
        groups = total(torch.ones(len(group_question), dtype=torch.float64), group_question)
        table |= {f"{k}@{group_size}": ratio(total(v, group_question), groups) for k, v in outcomes.items()}

    step_count, step_right, step_question = (t[kept.owner] for t in (count, right, kept.question))
    table["auc_step"] = _auc_measure(kept.log_score, step_right, step_count, step_question, size)
    table["auc_trajectory"] = _auc_measure(kept.score, right, count, kept.question, size)
    table["auc_within"] = ratio(*_pairs(kept, size))

    mean = {y: ratio(total(count * kept.score * (right == y)), total(count * (right == y))) for y in (1, 0)}
    table |= {"score_correct": mean[1], "score_incorrect": mean[0]}
    table["score_gap"] = _measure(lambda w: mean[1].resample(w) - mean[0].resample(w), size)

    half = torch.tensor(0.5, dtype=kept.log_score.dtype).log()  # rounded as a score of exactly one half is
    agrees = torch.where(step_right == 1, kept.log_score > half, kept.log_score < half)
    table["kept"] = ratio(total(step_count * agrees, step_question), total(step_count, step_question))

    bin = _bins(kept.score, kept.count, _CALIBRATION_BINS)
    excess = total(F.one_hot(bin, _CALIBRATION_BINS) * (count * (kept.score - right))[:, None])  # [Q, bins]
    draws = total(count)
    table["ece"] = _measure(lambda w: (w @ excess).abs().sum(1) / (w @ draws), size)
    table["brier"] = ratio(total(count * (kept.score - right).square()), draws)
    return table


def _measure(resample: Callable[[Tensor], Tensor], questions: int) -> _Measure:
    return _Measure(float(resample(torch.ones(1, questions, dtype=torch.float64))), resample)


def _groups(
    kept: _Judged, sizes: Sequence[int], rule: VoteRule | None, generator: torch.Generator
) -> list[tuple[int, Tensor, dict[str, Tensor]]]:
    """``(n, question [G], outcome [G] of every way to select)`` for every n for which there are groups."""
    draws = torch.arange(len(kept.count)).repeat_interleave(kept.count)
    draws = draws[torch.randperm(len(draws), generator=generator)]
    draws = draws[kept.question[draws].argsort(stable=True)]
    question = kept.question[draws]
    drawn = torch.bincount(question)
    rank = torch.arange(len(draws)) - (drawn.cumsum(0) - drawn)[question]
    found = []
    for n in sizes:
        used = draws[rank < (drawn // n * n)[question]]
        if len(used):
            outcomes = select(*(t[used].numpy() for t in (kept.score, kept.outcome, kept.answer)), n, rule)
            found.append((n, kept.question[used[::n]], {k: torch.from_numpy(v) for k, v in outcomes.items()}))
    return found


def _sum(value: Tensor, owner: Tensor, owners: int) -> Tensor:
    """[owners, ...] float64, sums of each one's ``value`` [N, ...]."""
    return torch.zeros(owners, *value.shape[1:], dtype=torch.float64).index_add(0, owner, value)


def _auc_measure(score: Tensor, right: Tensor, count: Tensor, question: Tensor, questions: int) -> _Measure:
    """AUC of scores weighted by ``count``: the value exact, the resamples with scores of a bin taken for equal."""
    distinct, rank = score.unique(return_inverse=True)
    sides = (count * right, count * (1 - right))  # [M] each
    value = _auc(*(_sum(side, rank, len(distinct))[None] for side in sides))
    cell = question * _AUC_BINS + _bins(score, count, _AUC_BINS)
    hits, misses = (_sum(side, cell, questions * _AUC_BINS).view(questions, _AUC_BINS) for side in sides)
    return _Measure(float(value), lambda w: _auc(w @ hits, w @ misses))


def _auc(hits: Tensor, misses: Tensor) -> Tensor:
    """[R] from the mass [R, K] of each outcome at K ascending scores; NaN where one outcome has none."""
    return (hits * (misses.cumsum(1) - misses / 2)).sum(1) / (hits.sum(1) * misses.sum(1))


def _pairs(kept: _Judged, questions: int) -> tuple[Tensor, Tensor]:
    """[Q] pairs of a correct and an incorrect draw won by the correct one, ties half, and all such pairs."""
    distinct, rank = kept.score.unique(return_inverse=True)
    cell, cell_of = (kept.question * len(distinct) + rank).unique(return_inverse=True)
    hits, misses = (_sum(kept.count * side, cell_of, len(cell)) for side in (kept.outcome, 1 - kept.outcome))
    owner = cell // len(distinct)
    right, wrong = (_sum(side, owner, questions) for side in (hits, misses))
    below = misses.cumsum(0) - misses / 2 - (wrong.cumsum(0) - wrong)[owner]
    return _sum(hits * below, owner, questions), right * wrong


def _bins(score: Tensor, count: Tensor, bins: int) -> Tensor:
    """Bin of every score: ``bins`` ascending ones of about equal mass, equal scores in one."""
    distinct, rank = score.unique(return_inverse=True)
    mass = _sum(count.double(), rank, len(distinct))
    return ((mass.cumsum(0) - mass / 2) / mass.sum() * bins).long()[rank]


def _ends(lengths: Tensor) -> Tensor:
    """Index of each segment's last element, empty segments left out."""
    return lengths.cumsum(0)[lengths > 0] - 1


def _resampled(size: int, resamples: int, generator: torch.Generator) -> Tensor:
    """[R, size] float64, how often each of ``size`` is among as many draws with replacement."""
    drawn = torch.randint(size, (resamples, size), generator=generator)
    return torch.zeros(resamples, size, dtype=torch.float64).scatter_add(
        1, drawn, torch.ones(1, dtype=torch.float64).expand_as(drawn)
    )
