"""The recipe's tables and pictures, from what its stages left in the work directory."""

import json
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from reflective.benchmarks.record import RESULTS, read, write
from reflective.plot import pyplot
from reflective.scoring.scores import AGGREGATIONS
from reflective.scoring.sprm import SPRM
from reflective.train.data import Rollouts
from reflective.train.head import fit
from reflective.train.metrics import Metric, evaluate, evaluate_seeds, log_scores, saturation

from . import heads, joint, results, settle
from .families import FAMILIES
from .rollouts import SEEDS, TRAIN_SAMPLES
from .separate import EVAL_SAMPLES

NS = (2, 8, 32)
CURVE = (1, 2, 4, 8, 16, 32)
AFTER = (("best_of@8", "majority@8"), ("weighted_vote@8", "majority@8"), ("best_of@32", "best_of@8"))  # what the score adds then
JOINT = "after joint training"
SHORT = (
    "pass@1", "majority@8", "weighted_vote@8", "best_of@8", "any@8", "auc_step", "auc_within", "score_gap", "kept", "ece",
)  # fmt: skip
DIVERGENCE = {
    "plain BCE": None,
    f"dynamic after {heads.EPOCHS // 2} epochs": heads.EPOCHS // 2,
    "dynamic from the start": 0,
}

DEFAULTS = {  # what the baseline is called in each group of ablations
    "weights": "plain BCE, balance within questions", "at": "predict", "layer": "-2", "width": "1152",
    "step rule": "full stop and blank line",
}  # fmt: skip
WATCHED = ("score_correct", "score_incorrect", "auc_within", "best_of@8", "kept")

Run = tuple[Rollouts, SPRM | Tensor]


class Tables:
    """Rows ``table, family, variant, measure, value, low, high, seeds, questions`` as they come."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.rows: list[dict[str, Any]] = []
        self.held_out = cache(lambda family, view, layers=(-2,): heads.load(work / family / "eval", view, layers))

    def add(
        self, table: str, family: str, variant: str, runs: Sequence[Run], measures: Iterable[str] | None = None, **how: Any
    ) -> dict[str, Metric]:  # fmt: skip
        """A row for each measure of ``runs``, one a seed."""
        found = evaluate_seeds(runs, **how)
        questions = len(torch.cat([r.question for r, _ in runs]).unique())
        for name in measures or found:
            if name in found:
                m = found[name]
                self.rows.append(
                    {
                        "table": table, "family": family, "variant": variant, "measure": name,
                        "value": round(m.value, 4), "low": round(m.low, 4), "high": round(m.high, 4),
                        "seeds": len(runs), "questions": questions,
                    }
                )  # fmt: skip
        return found

    def number(self, table: str, family: str, variant: str, measure: str, value: float) -> None:
        """A row for a number without an interval."""
        self.rows.append({
            "table": table, "family": family, "variant": variant, "measure": measure, "value": value,
            "low": "", "high": "", "seeds": "", "questions": "",
        })  # fmt: skip

    def runs(self, family: str, variant: heads.Variant, trained_on: str | None = None) -> list[Run]:
        """The seeds of a variant, each with its log-scores of the family's held-out responses."""
        rollouts = self.held_out(family, variant.view, variant.layers)
        return [
            (rollouts, log_scores(rollouts, heads.head(self.work, trained_on or family, variant, s)))
            for s in range(SEEDS)
        ]

    # -- tables ------------------------------------------------------------------------------------------------------

    def selection(self) -> None:
        """What choosing by score is worth before joint training; accuracy against N."""
        for family in FAMILIES:
            for name, trained_on in (("SPRM", family), ("SPRM of all families", heads.ALL)):
                runs = self.runs(family, heads.MAIN, trained_on)
                self.add("before joint training", family, name, runs, n=NS)
                if trained_on == family:
                    self._curve(family, runs)

    def jointly(self) -> None:
        """What it is worth after joint training."""
        for family in FAMILIES:
            if after := self.after(family):
                self.add(JOINT, family, "policy and SPRM", after, n=NS, differences=AFTER)
            if settled := self.settled(family):
                self.add(JOINT, family, "policy, its SPRM fitted again", settled, n=NS, differences=AFTER)

    def after(self, family: str) -> list[Run]:
        """A seed's own policy on its own share of the held-out questions, scored by its own head."""
        found = []
        for seed in range(SEEDS):
            place = joint.home(self.work, seed)
            if (place / family).is_dir():
                rollouts = heads.load(place / family, "steps")
                rollouts.question += seed * 10_000  # a question of one seed is none of another's
                found.append((rollouts, log_scores(rollouts, SPRM.from_pretrained(place))))
        return found

    def settled(self, family: str) -> list[Run]:
        """As ``after``, by the heads of ``settle``; none unless all seeds have one."""
        found = []
        for seed in range(SEEDS):
            if (own := settle.head(self.work, seed, family)) is not None:
                rollouts = heads.load(joint.home(self.work, seed) / family, "layers", own.tap.layers)
                rollouts.question += seed * 10_000
                found.append((rollouts, log_scores(rollouts, own)))
        return found if len(found) == SEEDS else []

    def _curve(self, family: str, runs: list[Run]) -> None:
        found = self.add(
            "accuracy against N", family, "SPRM", runs,
            [f"{how}@{n}" for how in ("majority", "weighted_vote", "best_of", "any") for n in CURVE[1:]] + ["pass@1"],
            n=CURVE[1:],
        )  # fmt: skip
        for how in ("majority", "weighted_vote", "best_of", "any"):
            fitted = saturation(CURVE, [found["pass@1"].value, *(found[f"{how}@{n}"].value for n in CURVE[1:])])
            for name in ("limit", "gain", "rate", "n95"):
                self.number("saturation", family, how, name, round(getattr(fitted, name), 4))

    def compared(self) -> None:
        """SPRM, outcome head and separate PRM: accuracy, parameters, seconds to score."""
        for family in FAMILIES:
            self.add("outcome head", family, "SPRM", self.runs(family, heads.MAIN), n=NS)
            self.add("outcome head", family, "outcome head", self.runs(family, heads.OUTCOME), n=NS)
            files = [self.work / "separate" / f"{family}, seed {s}.json" for s in range(SEEDS)]
            if not all(f.is_file() for f in files):
                continue
            judged = heads.thinned(self.held_out(family, "steps"), EVAL_SAMPLES, 0)
            small = [
                (judged, log_scores(judged, heads.head(self.work, family, heads.BASELINE, s))) for s in range(SEEDS)
            ]
            apart = [
                (
                    Rollouts.load(f.with_suffix(".rollouts.safetensors")),
                    safetensors.torch.load_file(f.with_suffix(".scores.safetensors"))["log_scores"],
                )
                for f in files
            ]
            self.add("separate PRM", family, f"SPRM, {heads.BASELINE.name}", small, n=(2, 8))
            self.add("separate PRM", family, f"separate PRM, {heads.BASELINE.name}", apart, n=(2, 8))
            for key in json.loads(files[0].read_text()):
                values = [json.loads(f.read_text())[key] for f in files]
                self.number("separate PRM", family, "cost", key, round(sorted(values)[len(values) // 2], 4))

    def ablations(self) -> None:
        """Everything that differs from the baseline in one thing."""
        for family in FAMILIES:
            main, baseline = self.runs(family, heads.MAIN), self.runs(family, heads.BASELINE)
            for how in AGGREGATIONS:
                measures = (*(f"best_of@{n}" for n in NS), "weighted_vote@8", "auc_within")
                self.add("aggregation", family, how, main, measures, n=NS, aggregation=how)
            for v in heads.variants():
                if v.group != "main":
                    self.add(v.group, family, v.name, self.runs(family, v), SHORT, n=(8,))
            for group, name in DEFAULTS.items():
                self.add(group, family, name, baseline, SHORT, n=(8,))
            self.add(
                "rollouts",
                family,
                f"{heads.MAIN.questions} questions x {TRAIN_SAMPLES}, 4 x the epochs",
                main,
                SHORT,
                n=(8,),
            )
            for other in (*FAMILIES, heads.ALL):
                self.add("transfer", family, f"trained on {other}", self.runs(family, heads.MAIN, other), SHORT, n=(8,))

    def divergence(self) -> list[dict[str, Any]]:
        """Scores of correct and incorrect held-out responses after every epoch: the paper's "aha moment"."""
        found = []
        for family in FAMILIES:
            rollouts = heads.part_of(heads.train_rollouts(self.work, family, "steps"), heads.BASELINE, 0)
            for name, warmup in DIVERGENCE.items():
                known = {"family": family, "weights": name}

                def note(epoch: int, loss: float, head: SPRM, known: dict[str, Any] = known) -> None:
                    m = evaluate(self.held_out(known["family"], "steps"), head, n=(8,), resamples=2)
                    found.append(known | {"epoch": epoch + 1} | {k: round(m[k].value, 4) for k in WATCHED})

                fit(rollouts, epochs=2 * heads.EPOCHS, lr=heads.LR, warmup=warmup, seed=0, on_epoch=note)
        return found

    def joint_log(self) -> list[dict[str, Any]]:
        """Reward and SPRM measures of every step of joint training."""
        keys = {"reward": "reward", "entropy": "entropy", "sprm/auc": "auc", "sprm/score_correct": "score_correct",
                "sprm/score_incorrect": "score_incorrect", "sprm/loss": "sprm_loss", "step_time": "step_time"}  # fmt: skip
        found = []
        for seed in range(SEEDS):
            file = joint.home(self.work, seed) / "trainer_state.json"
            if file.is_file():
                for entry in json.loads(file.read_text())["log_history"]:
                    if "reward" in entry:
                        found.append(
                            {"seed": seed, "step": entry["step"]} | {n: entry.get(k, "") for k, n in keys.items()}
                        )
        return found


def make(work: Path, out: Path = RESULTS) -> None:
    """Write every table that the work directory has the data for, and draw the pictures; the recorded ones as text too."""
    tables = Tables(work)
    for fill in (tables.selection, tables.jointly, tables.compared, tables.ablations):
        fill()
    _write(tables, tables.rows, out)
    file = work / "divergence.json"
    if not file.is_file():
        file.write_text(json.dumps(tables.divergence()))
    write("reproduction_divergence", json.loads(file.read_text()), out)
    draw(out)
    if out == RESULTS:
        results.FILE.write_text(results.markdown(out), encoding="utf-8")


def make_joint(work: Path, out: Path = RESULTS) -> None:
    """Write what joint training has led to, where the other stages' data are not at hand: the recorded rows of the other tables stay."""
    tables = Tables(work)
    tables.jointly()
    _write(tables, [row for row in read("reproduction", out) if row["table"] != JOINT] + tables.rows, out)
    if out == RESULTS:
        results.FILE.write_text(results.markdown(out), encoding="utf-8")


def _write(tables: Tables, rows: list[dict[str, Any]], out: Path) -> None:
    write("reproduction", rows, out)
    if log := tables.joint_log():
        write("reproduction_joint", log, out)


def draw(out: Path = RESULTS) -> None:
    """``reproduction.png``: accuracy against N for every family; scores of correct and incorrect responses over training."""
    rows, plt = read("reproduction", out), pyplot()
    fig, axes = plt.subplots(2, len(FAMILIES), figsize=(4.2 * len(FAMILIES), 7), layout="constrained")
    curve = [r for r in rows if r["table"] == "accuracy against N"]
    names = {
        "any": "one of N is right", "best_of": "best of N by score", "weighted_vote": "score-weighted vote", "majority": "majority",
    }  # fmt: skip
    for ax, family in zip(axes[0], FAMILIES, strict=True):
        at = {r["measure"]: [float(r[k]) for k in ("value", "low", "high")] for r in curve if r["family"] == family}
        for (how, label), color in zip(names.items(), ("0.6", "C0", "C2", "C1"), strict=True):
            value, low, high = zip(*(at["pass@1"] if n == 1 else at[f"{how}@{n}"] for n in CURVE), strict=True)
            ax.plot(CURVE, value, "o-", color=color, label=label, ms=4)
            ax.fill_between(CURVE, low, high, color=color, alpha=0.15, lw=0)
        ax.set_xscale("log", base=2)
        ax.set(title=family, xlabel="N", ylabel="accuracy", xticks=CURVE, xticklabels=CURVE)
    axes[0][0].legend(fontsize=8, frameon=False)
    steps = read("reproduction_divergence", out)
    for ax, family in zip(axes[1], FAMILIES, strict=True):
        for weights, color in zip(DIVERGENCE, ("C0", "C2", "C3"), strict=True):
            part = [r for r in steps if r["family"] == family and r["weights"] == weights]
            epochs = [int(r["epoch"]) for r in part]
            ax.plot(epochs, [float(r["score_correct"]) for r in part], color=color, label=weights)
            ax.plot(epochs, [float(r["score_incorrect"]) for r in part], "--", color=color)
        ax.set(xlabel="epoch", ylabel="mean score", ylim=(0, 1))
    axes[1][0].legend(fontsize=8, frameon=False, title="correct (line), incorrect (dashed)", title_fontsize=8)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.3)
    fig.savefig(out / "reproduction.png", dpi=130)
    plt.close(fig)
