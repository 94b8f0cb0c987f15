"""Which hidden state the head reads, at full size: chosen on training questions, and measured on all that are held out.

Of each family one layer of ``CANDIDATES`` is chosen by ``reflective.train.layers.choose_layer``: heads learn from three quarters of the
training questions, and the AUC within the fourth quarter decides. Nothing of the evaluation has a part in it. Then heads of that layer
and of -2 (the recipe's main ones) learn from all of the training questions, with every seed. A second layer is chosen by heads that
learn a quarter as long.

Beside the recipe's measures there are AUCs of scores from which response length and difficulty are taken out, because a probe may
read nothing else. Covariates of a response are its tokens, its steps, and the share of right answers among its question's other draws.

======================  ================================================================================================
``auc_covariates``      what the covariates tell: AUC of a logistic regression of the outcome on them, fitted to the same
                        responses
``auc_beyond``          what the score tells beside them: the logit of the trajectory's score is fitted by least squares to
                        them, over all draws, and the AUC is that of what is left
``within_covariates``   within questions: AUC of a logistic regression of the outcome on tokens and steps, both less
                        their question's mean. Difficulty is the same for all draws of a question, so no pair that
                        this AUC counts differs in it
``within_beyond``       within questions: AUC of what is left of the logit when tokens and steps are taken out, the
                        question's mean taken from all three before
======================  ================================================================================================

Each covariate enters with its square. A share of 31 draws does not tell all of a question's difficulty: a score of nothing but difficulty
and length keeps an ``auc_beyond`` of 0.56 where it has 0.85 before (``tests/test_reproduction.py``); the AUCs within questions do not have
that fault. Scores are those of held-out questions; the fits have four to six coefficients for some 16,000 draws.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reflective.benchmarks.record import RESULTS, write
from reflective.train.data import Rollouts
from reflective.train.layers import choose_layer
from reflective.train.metrics import evaluate_seeds, log_scores, trajectory_scores

from . import heads, results, rollouts
from .families import FAMILIES

CANDIDATES = (-2, -8, -10, -12, -16)
# How a layer is chosen: among which, and by heads of which settings. They are narrow, which hardly matters, but have to learn as long as
# the main ones: what is learnt soonest from a layer is not what is learnt from it in the end.
CHOICES = {
    "chosen": (CANDIDATES, {"epochs": heads.MAIN.epochs, "lr": heads.LR, "width": 288}),
    "chosen early": (rollouts.LAYERS, {"epochs": heads.EPOCHS, "lr": heads.LR, "width": 288}),
}
MEASURES = (
    "pass@1", "majority@8", "best_of@8", "weighted_vote@8", "any@8", "majority@32", "best_of@32", "weighted_vote@32", "any@32",
    "auc_step", "auc_trajectory", "auc_within", "score_gap", "kept", "ece",
)  # fmt: skip
_CLAMP = 1e-10  # of scores and their complements, before a logit


def chosen(work: Path, family: str, how: str = "chosen") -> dict[str, Any]:
    """The layer of a family, and by layer the AUC within the questions held back from training by which it was chosen.

    Args:
        how: a name of ``CHOICES``.
    """
    file = work / "layers" / f"{family}, {how}.json"
    if not file.is_file():
        candidates, settings = CHOICES[how]
        tap, found = choose_layer(heads.train_rollouts(work, family, "layers", candidates), **settings)
        said = {"layer": tap.layers[0], "auc_within": {layer: [m.value, m.low, m.high] for layer, m in found.items()}}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(said))
    return json.loads(file.read_text())


def variants(work: Path, family: str) -> dict[str, heads.Variant]:
    """By name: the paper's layer, and those that were chosen."""
    found = {"-2": heads.MAIN}
    for how in CHOICES:
        layer = chosen(work, family, how)["layer"]
        if layer != -2:
            found[f"{layer}, {how}"] = replace(heads.MAIN, group="layers", name=str(layer), view="layers", layers=(layer,))
    return found


def done(work: Path, family: str) -> dict[str, heads.Variant]:
    """Those of ``variants`` whose heads are there, of every seed."""
    found = variants(work, family)
    return {
        name: v for name, v in found.items()
        if all(heads.head_file(work, family, v, s).is_file() for s in range(rollouts.SEEDS))
    }  # fmt: skip


def fit_all(work: Path, families: Sequence[str]) -> Iterator[str]:
    """Choose a layer for each family and fit its heads; yields names as they are done."""
    for family in families:
        for how in CHOICES:
            yield f"{family}: {how} {chosen(work, family, how)['layer']}"
        different = {v.file: v for v in variants(work, family).values()}
        tasks = [(work, family, v, s) for v in different.values() for s in range(rollouts.SEEDS)]
        yield from heads.fit_tasks(tasks)


# -- what length and difficulty tell -----------------------------------------------------------------------------------


def covariates(r: Rollouts) -> tuple[Tensor, Tensor]:
    """``([N, 2], [N, 1])`` float64: tokens and steps of every response; the share of right answers among its question's other draws."""
    steps = torch.bincount(r.trajectory, minlength=len(r))
    sizes = torch.stack([r.length - r.prompt_length, steps], 1).double()
    count, right = r.count.double(), (r.outcome > 0.5).double()
    question = r.question.unique(return_inverse=True)[1]
    drawn, hits = (torch.zeros(int(question.max()) + 1).double().index_add(0, question, x)[question] for x in (count, count * right))
    return sizes, ((hits - right) / (drawn - 1).clamp_min(1))[:, None]


def beyond(r: Rollouts, scores: Tensor, *, within: bool) -> tuple[Tensor, Tensor]:
    """``(what the covariates tell of the outcome, what the scores tell beside them)``, [N] float64 each, larger for right.

    Args:
        scores: log-scores of the steps [M].
        within: take a question's mean out of everything first, and leave difficulty to it.
    """
    sizes, difficulty = covariates(r)
    score = trajectory_scores(r, scores).nan_to_num(nan=0.0).clamp(_CLAMP, 1 - _CLAMP).logit()
    weight, outcome = r.count.double(), (r.outcome > 0.5).double()
    given = sizes if within else torch.cat([sizes, difficulty], 1)
    given = torch.cat([given, given**2], 1)
    if within:
        question = r.question.unique(return_inverse=True)[1]
        given, score = _centred(given, question, weight), _centred(score[:, None], question, weight)[:, 0]
    mean = (weight[:, None] * given).sum(0) / weight.sum()
    given = (given - mean) / ((weight[:, None] * (given - mean) ** 2).sum(0) / weight.sum()).sqrt().clamp_min(1e-9)
    given = torch.cat([torch.ones(len(given), 1).double(), given], 1)
    root = weight.sqrt()[:, None]
    fitted = torch.linalg.lstsq(root * given, root * score[:, None], driver="gelsd").solution
    return given @ _logistic(given, outcome, weight), score - (given @ fitted)[:, 0]


def _centred(x: Tensor, question: Tensor, weight: Tensor) -> Tensor:
    """``x`` [N, C] less the mean of its question's draws."""
    sums = torch.zeros(int(question.max()) + 1, x.shape[1] + 1).double()
    sums.index_add_(0, question, torch.cat([x, torch.ones(len(x), 1).double()], 1) * weight[:, None])
    return x - (sums[:, :-1] / sums[:, -1:])[question]


def _logistic(given: Tensor, outcome: Tensor, weight: Tensor) -> Tensor:
    """Coefficients [C] of a logistic regression by Newton's method, with a ridge of 1e-6 of the draws."""
    beta, ridge = torch.zeros(given.shape[1]).double(), 1e-6 * weight.sum() * torch.eye(given.shape[1]).double()
    for _ in range(50):
        p = (given @ beta).sigmoid()
        step = torch.linalg.solve(
            (given * (weight * p * (1 - p))[:, None]).T @ given + ridge, given.T @ (weight * (outcome - p)) - ridge @ beta
        )
        beta = beta + step
        if step.abs().max() < 1e-9:
            break
    return beta


def as_run(r: Rollouts, value: Tensor) -> tuple[Rollouts, Tensor]:
    """Rollouts of one step each whose scores are in the order of ``value`` [N], for ``evaluate_seeds``."""
    value = (value - value.mean()) / value.std().clamp_min(1e-12)
    one = torch.arange(len(r))
    return replace(r, features=None, trajectory=one, position=one), torch.nn.functional.logsigmoid(value)


# -- tables ------------------------------------------------------------------------------------------------------------


def rows(work: Path, family: str) -> list[dict[str, Any]]:
    """``table, family, variant, measure, value, low, high, seeds, questions`` of a family."""
    found: list[dict[str, Any]] = []

    def add(table: str, variant: str, metrics: dict[str, Any], seeds: int, questions: int) -> None:
        for name, m in metrics.items():
            value, low, high = (round(x, 4) for x in (m.value, m.low, m.high))
            found.append({
                "table": table, "family": family, "variant": variant, "measure": name, "value": value, "low": low, "high": high,
                "seeds": seeds, "questions": questions,
            })  # fmt: skip

    for how in CHOICES:
        for layer, numbers in chosen(work, family, how)["auc_within"].items():
            found.append({
                "table": how, "family": family, "variant": layer, "measure": "auc_within",
                **dict(zip(("value", "low", "high"), (round(x, 4) for x in numbers), strict=True)), "seeds": 1,
                "questions": rollouts.TRAIN // 4,
            })  # fmt: skip
    for name, v in done(work, family).items():
        r = heads.load(work / family / "eval", v.view, v.layers)
        questions = len(r.question.unique())
        scores = [log_scores(r, heads.head(work, family, v, s)) for s in range(rollouts.SEEDS)]
        bare = replace(r, features=None)
        metrics = evaluate_seeds([(bare, s) for s in scores], n=(8, 32))
        add("full size", name, {m: metrics[m] for m in MEASURES if m in metrics}, rollouts.SEEDS, questions)
        for within, measure, (told, left) in (
            (False, "auc_trajectory", ("auc_covariates", "auc_beyond")),
            (True, "auc_within", ("within_covariates", "within_beyond")),
        ):
            both = [beyond(bare, s, within=within) for s in scores]
            told_by = evaluate_seeds([as_run(bare, both[0][0])], n=())[measure]  # no head has a part in it
            left_in = evaluate_seeds([as_run(bare, value) for _, value in both], n=())[measure]
            add("full size", name, {told: told_by, left: left_in}, rollouts.SEEDS, questions)
    return found


def make(work: Path, out: Path = RESULTS) -> None:
    """Write the table of the families whose layer was chosen and whose heads of it are there, and the recorded one as text too."""
    families = [f for f in FAMILIES if all((work / "layers" / f"{f}, {how}.json").is_file() for how in CHOICES)]
    if found := [row for family in families if len(done(work, family)) > 1 for row in rows(work, family)]:
        write("reproduction_layers", found, out)
        if out == RESULTS:
            results.FILE.write_text(results.markdown(out), encoding="utf-8")
