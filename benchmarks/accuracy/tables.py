"""Tables and pictures of the comparison, from the records that its stages left."""

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from reflective.benchmarks.record import RESULTS, seconds_of, write
from reflective.benchmarks.reproduction.layers import as_run, beyond
from reflective.plot import pyplot
from reflective.search.selection import VoteRule, select
from reflective.search.strategies import by_name
from reflective.search.strategies.auto import sizes
from reflective.search.strategies.votes import same_answer
from reflective.train.data import Rollouts
from reflective.train.metrics import evaluate_seeds

from . import compare, learn, rules
from .families import FAMILIES

CURVE = (2, 4, 8, 16, 32)
RESAMPLES = 10_000
COLORS = {
    "best_of_n": "C0", "select": "C2", "majority": "C1", "prune": "C3", compare.PRUNE_SELECT: "C7", "replace": "C4", "step_beam": "C5", "particles": "C6", "auto": "C9", "dvts": "C8",
}  # fmt: skip
Record = dict[str, Any]


def records(work: Path, family: str) -> list[Record]:
    files = sorted((work / family).glob("compared, from *.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


# -- strategies --------------------------------------------------------------------------------------------------------


def strategies(work: Path) -> list[Record]:
    """A row for each family, strategy and n: accuracy and tokens, and both beside best of n with as many candidates, on the same questions with the
    same heads. Intervals are 95 %, bootstrapped over questions, each with all its seeds."""
    rows = []
    for family in FAMILIES:
        there = [r for r in records(work, family) if r["strategy"] != "auto"]
        found = _tables(there + list(_autos(work, family, there)))
        for (name, n), cell in found.items():
            correct, tokens = _columns(cell, cell)
            draws = _resampled(len(correct))
            row = {"family": family, "strategy": name, "n": n, "seeds": learn.SEEDS, "questions": len(correct)}
            row |= _interval("accuracy", correct, draws) | {"tokens": round(float(tokens.mean()), 1)}
            if name != "one":
                other = {"exit": ("one", 1)}.get(name, ("best_of_n", n))
                others, theirs = _columns(found[other], cell)
                row |= _interval("difference", correct - others, draws) | _ratio(tokens, theirs, draws)
            rows.append(row)
    keys = dict.fromkeys(key for row in rows for key in row)
    return [{key: row.get(key, "") for key in keys} for row in rows]


def _autos(work: Path, family: str, found: Iterable[Record]) -> Iterable[Record]:
    """What ``auto`` comes to: it draws candidates of best of n one after another, by the same random numbers, so that they are known."""
    for r in found:
        if "right" not in r:
            continue
        rule = by_name("auto", rules.home(work, family, r["seed"], rules.AUTO))
        for k in sizes(min(rule.first, rule.n), rule.n):
            if k == rule.n or max(r["scores"][:k]) >= rule.enough:
                break
        chosen = select(r["scores"][:k], r["right"][:k], r["answers"][:k], k, VoteRule(rule.exponent, rule.growth))["select"]
        yield {
            "strategy": "auto", "n": rule.n, "seed": r["seed"], "question": r["question"], "correct": float(chosen[0]), "tokens": sum(r["lengths"][:k]),
        }  # fmt: skip


Cell = dict[int, list[tuple[float, float]]]  # of each question, ``(correct, tokens)`` of every seed


def _tables(found: Iterable[Record]) -> dict[tuple[str, int], Cell]:
    """By strategy and n; ``one``: the first candidate of best of n alone."""
    cells: dict[tuple[str, int], Cell] = defaultdict(lambda: defaultdict(list))
    for r in found:
        cells[r["strategy"], r["n"]][r["question"]].append((r["correct"], r["tokens"]))
        if "right" in r:
            cells["one", 1][r["question"]].append((r["right"][0], r["lengths"][0]))
    return cells


def _columns(cell: Cell, of: Cell) -> NDArray[np.float64]:
    """[2, Q] of the questions that ``of`` has: correct and tokens, each a mean over seeds."""
    return np.array([np.mean(cell[q], 0) for q in sorted(of)]).T


def exits(work: Path) -> list[Record]:
    """How ``exit`` keeps what it states: the share of questions whose answer it changes, and the share of tokens that it saves."""
    rows = []
    for family in rules.EARLY:
        changed, saved = defaultdict(list), defaultdict(list)
        for r in (r for r in records(work, family) if r["strategy"] == "exit"):
            given, whole = r["answer"], r["whole_answer"]
            same = given == whole if given is None or whole is None else same_answer(given, whole)
            changed[r["question"]].append(not same)
            saved[r["question"]].append((r["tokens"], r["whole_tokens"]))
        share = np.array([np.mean(v) for v in changed.values()])
        tokens = np.array([np.mean(v, 0) for v in saved.values()])
        draws = _resampled(len(share))
        rows.append(
            {"family": family, "stated_risk": rules.EXIT_RISK, "seeds": learn.SEEDS, "questions": len(share)}
            | _interval("changed", share, draws)
            | _ratio(tokens[:, 0], tokens[:, 1], draws)
        )
    return rows


def _resampled(questions: int) -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(questions, size=(RESAMPLES, questions))


def _interval(name: str, values: NDArray[np.float64], draws: NDArray[np.int64]) -> dict[str, float]:
    low, high = np.quantile(values[draws].mean(1), [0.025, 0.975])
    return {name: round(float(values.mean()), 4), f"{name}_low": round(float(low), 4), f"{name}_high": round(float(high), 4)}


def _ratio(tokens: NDArray[np.float64], others: NDArray[np.float64], draws: NDArray[np.int64]) -> dict[str, float]:
    low, high = np.quantile(tokens[draws].sum(1) / others[draws].sum(1), [0.025, 0.975])
    value = tokens.sum() / others.sum()
    return {"tokens_kept": round(float(value), 4), "tokens_kept_low": round(float(low), 4), "tokens_kept_high": round(float(high), 4)}


# -- heads -------------------------------------------------------------------------------------------------------------


def heads(work: Path) -> list[Record]:
    """What choosing at the end is worth for every N; AUCs, also with length and difficulty taken out; right steps along the chain."""
    rows: list[Record] = []
    for family in FAMILIES:
        drawn = [r for r in records(work, family) if "right" in r]
        runs, votes = [], []
        for seed in range(learn.SEEDS):
            runs.append(_rollouts([r for r in drawn if r["seed"] == seed]))
            said = json.loads((rules.home(work, family, seed, max(rules.NS)) / "select.json").read_text())
            votes.append(VoteRule(said["exponent"], said["growth"]))
        found = evaluate_seeds(runs, n=CURVE, rules=votes, differences=[
            *((f"select@{n}", f"{other}@{n}") for n in CURVE for other in ("majority", "weighted_vote", "best_of")), ("best_of@32", "best_of@8"),
        ])  # fmt: skip
        left = [beyond(r, s, within=True)[1] for r, s in runs]
        told = beyond(*runs[0], within=True)[0]
        found["within_beyond"] = evaluate_seeds([as_run(r, x) for (r, _), x in zip(runs, left, strict=True)], n=())["auc_within"]
        found["within_covariates"] = evaluate_seeds([as_run(runs[0][0], told)], n=())["auc_within"]
        rows += [
            {"family": family, "measure": name, "value": round(m.value, 4), "low": round(m.low, 4), "high": round(m.high, 4)}
            for name, m in found.items()
        ]
        along = [k for r in drawn if r["seed"] == 0 for k in r["right_steps"]]
        rows += [
            {"family": family, "measure": f"right to step {k}", "value": round(float(np.mean([x >= k for x in along])), 4), "low": "", "high": ""}
            for k in range(1, 9)
        ]
    return rows


def _rollouts(found: list[Record]) -> tuple[Rollouts, torch.Tensor]:
    """Candidates as rollouts without tokens or features, and log-scores of their steps: each its trajectory's."""
    steps = torch.tensor([k for r in found for k in r["steps"]])
    lengths = torch.tensor([k for r in found for k in r["lengths"]])
    score = torch.tensor([s for r in found for s in r["scores"]], dtype=torch.float64)
    owner = torch.arange(len(steps)).repeat_interleave(steps)
    made = Rollouts(
        tokens=torch.zeros(int(lengths.sum()), dtype=torch.int32), length=lengths, prompt_length=torch.zeros_like(lengths),
        question=torch.tensor([r["question"] for r in found for _ in r["steps"]]),
        outcome=torch.tensor([float(x) for r in found for x in r["right"]]), answer=torch.tensor([a for r in found for a in r["answers"]]),
        count=torch.ones_like(lengths), trajectory=owner, position=torch.zeros_like(owner),
    )  # fmt: skip
    return made, score.clamp_min(1e-10).log()[owner].float()


# -- pictures ----------------------------------------------------------------------------------------------------------


def make(work: Path, out: Path = RESULTS) -> None:
    """Write what there are records for."""
    told = strategies(work)
    write("strategies", told, out)
    write("strategies_choosing", heads(work), out)
    write("strategies_exit", exits(work), out)
    seconds = [{"family": f, **json.loads(line)} for f in FAMILIES if (file := work / f / "timed.jsonl").is_file() for line in file.read_text().splitlines()]
    if seconds:
        write("strategies_seconds", [{k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in seconds], out)
    taken = [(stage, family, s) for family in ("", *FAMILIES) for stage, s in seconds_of(work / family).items()]
    if taken:
        write("strategies_stages", [{"stage": stage, "family": family, "seconds": round(s, 1)} for stage, family, s in taken], out)
    draw(told, seconds, out)


def draw(rows: list[Record], seconds: list[Record], out: Path = RESULTS) -> None:
    """``strategies.png``: accuracy against N, against tokens and against seconds, a row of pictures a family."""
    plt = pyplot()
    fig, axes = plt.subplots(len(FAMILIES), 3, figsize=(15, 4 * len(FAMILIES)), layout="constrained", squeeze=False)
    for (by_n, by_tokens, by_seconds), family in zip(axes, FAMILIES, strict=True):
        part = _beside([row for row in rows if row["family"] == family and row["strategy"].removesuffix(rules.THEN_SELECT) not in compare.FEW])
        for name in ("select", "replace", "replace, at random", "majority", "best_of_n", "prune", "prune, at random", compare.PRUNE_SELECT):
            color, control = COLORS[name.removesuffix(", at random")], name.endswith("random")
            own = sorted((row for row in part if row["strategy"] == name), key=lambda row: row["n"])
            if not own:
                continue
            n, value, low, high = zip(*((row["n"], row["accuracy"], row["accuracy_low"], row["accuracy_high"]) for row in own), strict=True)
            by_n.plot(n, value, "x--" if control else "o-", color=color, label=name, ms=4, lw=1)
            if not control:
                by_n.fill_between(n, low, high, color=color, alpha=0.08, lw=0)
        by_n.set_xscale("log", base=2)
        by_n.set(title=f"{family}: candidates", xlabel="n", ylabel="accuracy", xticks=rules.NS, xticklabels=rules.NS)
        _scatter(by_tokens, part, "tokens", f"{family}: tokens decoded a question")
        _seconds(by_seconds, part, [row for row in seconds if row["family"] == family], family)
    # One legend of all pictures: a strategy has one colour in all of them.
    shown = {label: line for ax in axes[:, :2].flat for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    fig.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=7, fontsize=8, frameon=False)
    fig.savefig(out / "strategies.png", dpi=150)
    plt.close(fig)


def _beside(rows: list[Record]) -> list[Record]:
    """With the accuracy that each would have on all the questions that best of n has had: best of n's there, and the paired difference on its own."""
    whole = {row["n"]: row["accuracy"] for row in rows if row["strategy"] == "best_of_n"}
    paired = ({**row, "moved": whole[row["n"]] + row["difference"] - row["accuracy"]} if row["n"] in whole else {**row, "moved": 0.0} for row in rows)
    return [row | {key: row[key] + row["moved"] for key in ("accuracy", "accuracy_low", "accuracy_high")} for row in paired]


def _scatter(ax: Any, part: list[Record], key: str, title: str) -> None:
    """A line a strategy through its sizes; its control, that does as much at random, dashed in the same colour."""
    for name, color in COLORS.items():
        for label, style in ((name, "o-"), (f"{name}, at random", "x--")):
            own = sorted((row for row in part if row["strategy"] == label), key=lambda row: row["n"])
            if own:
                x, y, low, high = zip(*((row[key], row["accuracy"], row["accuracy_low"], row["accuracy_high"]) for row in own), strict=True)
                ax.plot(x, y, style, color=color, ms=4, lw=1, label=label)
                if label == "best_of_n":
                    ax.fill_between(x, low, high, color=color, alpha=0.1, lw=0)
    ax.set_xscale("log", base=2)
    ticks = [200, 400, 800, 1600, 3200]
    ax.set(title=title, xlabel=key, ylabel="accuracy", xticks=ticks, xticklabels=ticks)


def _seconds(ax: Any, part: list[Record], timed: list[Record], family: str) -> None:
    """The accuracy of all questions against the seconds of those that were timed."""
    for row in timed:
        own = next((r for r in part if (r["strategy"], r["n"]) == (row["strategy"], row["n"])), None)
        if own is None:
            continue
        name = row["strategy"].removesuffix(", at random")
        error = [[own["accuracy"] - own["accuracy_low"]], [own["accuracy_high"] - own["accuracy"]]]
        ax.errorbar(row["seconds"], own["accuracy"], error, fmt="o" if name == row["strategy"] else "x", color=COLORS[name], ms=5, lw=1)
        ax.annotate(f"n = {row['n']}", (row["seconds"], own["accuracy"]), (5, 4), textcoords="offset points", fontsize=7, color=COLORS[name])
    ax.set(title=f"{family}: seconds, {compare.KV_TOKENS:,} tokens cached", xlabel="seconds a question", ylabel="accuracy")
    ax.margins(x=0.12)
