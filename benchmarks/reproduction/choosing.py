"""Accuracy that rises with N: why the best of 32 fell below the best of 8, and what mends it.

Half of it is how the head learns. Beginning with the recipe's main head one thing is changed after the other (``variants``: dropout, layer,
questions). The other half is how an answer is chosen: ``strategy="select"``, whose rule is calibrated on
questions that nothing else is done with (``rollouts.further``). All of it is measured on the held-out questions, which chose nothing.

Differences are paired: of the same questions, the same draws and the same seeds.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reflective.benchmarks.record import RESULTS, write
from reflective.plot import pyplot
from reflective.scoring.sprm import SPRM
from reflective.search.selection import VoteRule
from reflective.train.data import Rollouts
from reflective.train.metrics import Metric, evaluate_seeds, log_scores, trajectory_scores, vote_rule

from . import heads, layers, results, rollouts
from .families import FAMILIES, Family

NS = (2, 8, 32)
CURVE = (1, 2, 4, 8, 16, 32)
RULES = ("majority", "weighted_vote", "select", "best_of")
DIFFERENCES = [
    *((f"select@{n}", f"{rule}@{n}") for n in NS for rule in RULES if rule != "select"),
    *((f"{rule}@{b}", f"{rule}@{a}") for rule in ("select", "best_of") for a, b in ((2, 8), (8, 32))),
]
MORE_SAMPLES = 12


def decode(model: Any, work: Path, family: Family) -> None:
    """Rollouts of the questions that ``rollouts.questions`` leaves."""
    more, calibration = rollouts.further(family)
    for part, asked, samples, seed in (
        ("calibration", calibration, rollouts.EVAL_SAMPLES, 8), ("more", more, MORE_SAMPLES, 7),
    ):  # fmt: skip
        rollouts.rollouts(model, family, asked, work / family.name / part, samples=samples, seed=seed, all_views=False)


def variants(work: Path, family: str) -> dict[str, heads.Variant]:
    """By name, in the order of the table."""
    layer = layers.chosen(work, family)["layer"]
    read = {"view": "layers", "layers": (layer,)}
    learns = {"dropout": 0.1}
    steps = {
        "the main head": heads.MAIN,
        "dropout 0.1": replace(heads.MAIN, settings=learns),
        "a layer chosen": replace(heads.MAIN, settings=learns, **read),
        # Half the epochs: as many steps as of half the questions.
        "twice the questions": replace(
            heads.MAIN, settings=learns, questions=rollouts.TRAIN + rollouts.MORE, epochs=heads.MAIN.epochs // 2, **read
        ),
    }
    return {
        name: replace(v, group="choosing", name=name) if v is not heads.MAIN else v for name, v in steps.items()
    }


BEST = "twice the questions"
TOGETHER = "three seeds together"


def fit_all(work: Path, families: Sequence[str]) -> Iterator[str]:
    """The heads of every variant; yields names as they are done."""
    for family in families:
        yield f"{family}: layer {layers.chosen(work, family)['layer']}"
        yield from heads.fit_tasks([
            (work, family, v, s) for v in variants(work, family).values() for s in range(rollouts.SEEDS)
        ])  # fmt: skip


def together(parts: Sequence[SPRM]) -> SPRM:
    """One head whose logit is the mean of those of ``parts``."""
    head = SPRM(parts[0].hidden_size, sum(p.width for p in parts)).requires_grad_(False).eval()
    head[0].weight.copy_(torch.cat([p[0].weight for p in parts]))
    head[0].bias.copy_(torch.cat([p[0].bias for p in parts]))
    head[3].weight.copy_(torch.cat([p[3].weight for p in parts], 1) / len(parts))
    head[3].bias.copy_(torch.stack([p[3].bias for p in parts]).mean(0))
    head.configure(parts[0].metadata())
    return head


def heads_of(work: Path, family: str, name: str) -> list[SPRM]:
    """Of every seed; of ``TOGETHER`` one."""
    found = [heads.head(work, family, variants(work, family)[BEST if name == TOGETHER else name], s) for s in range(rollouts.SEEDS)]
    return [together(found)] if name == TOGETHER else found


def rule_of(work: Path, family: str, v: heads.Variant, head: SPRM) -> VoteRule:
    """Calibrated on the questions that are there for it."""
    return vote_rule(heads.load(work / family / "calibration", v.view, v.layers), head)


def measured(work: Path, family: str, name: str, ns: Sequence[int] = NS) -> tuple[dict[str, Metric], list[VoteRule], int]:
    """``(measures, the rule of each seed, questions)`` of a variant on the held-out questions."""
    v = variants(work, family)[BEST if name == TOGETHER else name]
    held_out = heads.load(work / family / "eval", v.view, v.layers)
    found = heads_of(work, family, name)
    rules = [rule_of(work, family, v, head) for head in found]
    runs = [(replace(held_out, features=None), log_scores(held_out, head)) for head in found]
    metrics = evaluate_seeds(runs, n=ns, rules=rules, differences=DIFFERENCES)
    metrics |= _beyond([r for r, _ in runs], [s for _, s in runs])
    return metrics, rules, len(held_out.question.unique())


def _beyond(runs: list[Rollouts], scores: list[Tensor]) -> dict[str, Metric]:
    """AUC within questions with tokens and steps taken out of the score, see ``layers``."""
    left = [layers.beyond(r, s, within=True)[1] for r, s in zip(runs, scores, strict=True)]
    found = evaluate_seeds([layers.as_run(r, value) for r, value in zip(runs, left, strict=True)], n=())
    return {"within_beyond": found["auc_within"]}


def duplicates(r: Rollouts, scores: Tensor) -> dict[str, float]:
    """The share of draws that another draw of the question has been before; how many steps wrong answers have that score highest of their
    question's draws, and all wrong ones."""
    drawn, question = r.count.double(), r.question.unique(return_inverse=True)[1]
    again = float((drawn - 1).sum() / drawn.sum())
    steps = torch.bincount(r.trajectory, minlength=len(r)).double()
    score, wrong = trajectory_scores(r, scores).nan_to_num(nan=0.0), r.outcome < 0.5
    top = torch.full((int(question.max()) + 1,), -1.0).double().scatter_reduce(0, question, score, "amax")
    misled = wrong & (score == top[question])
    return {
        "candidates drawn again": again,
        "steps of wrong answers that score highest": float(steps[misled].mean()),
        "steps of wrong answers": float((steps * drawn)[wrong].sum() / drawn[wrong].sum()),
    }


def rows(work: Path, family: str) -> list[dict[str, Any]]:
    """``table, family, variant, measure, value, low, high, seeds, questions``."""
    found: list[dict[str, Any]] = []

    def add(table: str, variant: str, measure: str, value: float, low: Any = "", high: Any = "", seeds: Any = "", questions: Any = "") -> None:
        numbers = {"value": value, "low": low, "high": high}
        numbers = {k: round(x, 4) if isinstance(x, float) else x for k, x in numbers.items()}
        found.append({"table": table, "family": family, "variant": variant, "measure": measure, **numbers, "seeds": seeds, "questions": questions})

    add("layer", BEST, "layer", layers.chosen(work, family)["layer"])
    for name in (*variants(work, family), TOGETHER):
        metrics, rules, questions = measured(work, family, name)
        for measure, m in metrics.items():
            add("learning", name, measure, *asdict(m).values(), seeds=len(rules), questions=questions)
        for seed, rule in enumerate(rules):
            add("rule", name, f"exponent, seed {seed}", rule.exponent)
            add("rule", name, f"growth, seed {seed}", rule.growth)
    metrics, rules, questions = measured(work, family, BEST, CURVE[1:])
    for measure, m in metrics.items():
        if measure == "pass@1" or measure.partition("@")[0] in (*RULES, "any") and " - " not in measure:
            add("accuracy against N", BEST, measure, *asdict(m).values(), seeds=len(rules), questions=questions)
    v = variants(work, family)[BEST]
    held_out = heads.load(work / family / "eval", v.view, v.layers)
    for measure, value in duplicates(held_out, log_scores(held_out, heads_of(work, family, BEST)[0])).items():
        add("causes", BEST, measure, value)
    return found


def done(work: Path) -> list[str]:
    """Families whose heads are all there."""
    return [
        f for f in FAMILIES
        if (work / f / "calibration").is_dir() and (work / "layers" / f"{f}, chosen.json").is_file()
        and all(heads.head_file(work, f, v, s).is_file() for v in variants(work, f).values() for s in range(rollouts.SEEDS))
    ]  # fmt: skip


def make(work: Path, out: Path = RESULTS) -> None:
    """The table and the picture of the families whose heads are there."""
    families = done(work)
    if not families:
        return
    kept = work / "choosing.json"
    known = json.loads(kept.read_text()) if kept.is_file() else {}
    for family in families:
        if family not in known:
            known[family] = rows(work, family)
            kept.write_text(json.dumps(known))
    found = [row for family in families for row in known[family]]
    write("reproduction_choosing", found, out)
    draw(found, out / "reproduction_choosing.png")
    if out == RESULTS:
        results.FILE.write_text(results.markdown(out), encoding="utf-8")


def draw(found: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy against N of every rule, a family beside the other."""
    plt = pyplot()
    families = list(dict.fromkeys(r["family"] for r in found))
    fig, axes = plt.subplots(1, len(families), figsize=(4.2 * len(families), 3.8), layout="constrained", squeeze=False)
    names = {
        "any": ("one of N is right", "0.6"), "select": ("select (calibrated vote)", "C2"), "best_of": ("best of N by score", "C0"),
        "weighted_vote": ("score-weighted vote", "C4"), "majority": ("majority", "C1"),
    }  # fmt: skip
    for ax, family in zip(axes[0], families, strict=True):
        at = {
            r["measure"]: [float(r[k]) for k in ("value", "low", "high")]
            for r in found if r["table"] == "accuracy against N" and r["family"] == family
        }  # fmt: skip
        for how, (label, color) in names.items():
            value, low, high = zip(*(at["pass@1"] if n == 1 else at[f"{how}@{n}"] for n in CURVE), strict=True)
            ax.plot(CURVE, value, "o-", color=color, label=label, ms=4)
            ax.fill_between(CURVE, low, high, color=color, alpha=0.12, lw=0)
        ax.set_xscale("log", base=2)
        ax.set(title=family, xlabel="N", ylabel="accuracy", xticks=CURVE, xticklabels=CURVE)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8, frameon=False)
    fig.savefig(path, dpi=130)
    plt.close(fig)
