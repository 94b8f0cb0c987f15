"""Accuracy against tokens decoded for every strategy, on the embedded model's held-out questions.

    python benchmarks/strategies.py [--questions 32] [--seeds 3] [--n 8] [--work DIR] [--out benchmarks/results]

Sums of three numbers that its head was not trained on, nor its pruning rule calibrated; temperature 0.6, top-p 0.95, at most 64
tokens, the model in bfloat16. With a seed all strategies that begin with n candidates begin with the same ones, so differences are paired. A
strategy that only chooses at the end (best of N, the votes, RPC) is given the candidates of one run. An
interrupted run goes on where it stopped if ``--work`` names a directory.

The intervals are 95 %, bootstrapped over questions (each with all its seeds).
"""

import argparse
import itertools
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import reflective as rf
from reflective.benchmarks.record import RESULTS, environment, write
from reflective.benchmarks.reproduction import ship
from reflective.benchmarks.reproduction.families import FAMILIES
from reflective.benchmarks.reproduction.rollouts import questions as held_out
from reflective.benchmarks.reproduction.rollouts import trained
from reflective.checkpoints.default import HEAD
from reflective.plot import pyplot
from reflective.search.strategies import NAMES, Strategy, by_name, kind
from reflective.search.strategies.votes import same_answer
from reflective.tasks import Question

AT_A_TIME = 16  # questions in one call


def records(
    model: rf.ReflectiveModel, questions: list[Question], first: int, seed: int, n: int, choosers: list[Strategy]
) -> Iterator[dict[str, Any]]:
    """One record for each strategy and question. The first strategy decodes, every one chooses."""
    texts = [q.text for q in questions]
    found = model.generate(texts, strategy=choosers[0], seed=1_000_003 * seed + first, max_new_tokens=64)
    for i, (question, result) in enumerate(zip(questions, found, strict=True)):
        for strategy in choosers:
            pick = result.candidates[strategy.choose(result.candidates)]
            yield {
                "strategy": strategy.name, "n": n, "seed": seed, "question": first + i,
                "correct": pick.answer is not None and same_answer(pick.answer, question.answer),
                "tokens": result.tokens, "finished": sum(c.status in ("stop", "length") for c in result.candidates),
            }  # fmt: skip


def strategies(n: int) -> dict[str, list[Strategy]]:
    """By the name of the run that they share. Those for which the embedded head has no rule are left out."""
    made = [by_name(name, HEAD, n=n) for name in NAMES if getattr(kind(name), "lies_in", lambda home: True)(HEAD)]
    choosers = [s for s in made if type(s).observe is Strategy.observe]
    return {choosers[0].name: choosers} | {s.name: [s] for s in made if s not in choosers}


def summary(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each strategy and n, in the order of their accuracy."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for record in found:
        groups[record["strategy"], record["n"]].append(record)
    rng, rows = np.random.default_rng(0), []
    for (name, n), part in groups.items():
        by_question = defaultdict(list)
        for record in part:
            by_question[record["question"]].append(record["correct"])
        means = np.array([np.mean(v) for v in by_question.values()])
        draws = means[rng.integers(len(means), size=(10_000, len(means)))].mean(1)
        low, high = np.quantile(draws, [0.025, 0.975])
        rows.append(
            {
                "strategy": name, "n": n, "seeds": len({r["seed"] for r in part}), "questions": len(means),
                "accuracy": round(float(means.mean()), 4), "low": round(float(low), 4), "high": round(float(high), 4),
                "tokens": round(float(np.mean([r["tokens"] for r in part])), 1),
                "finished": round(float(np.mean([r["finished"] for r in part])), 2),
            }
        )  # fmt: skip
    return sorted(rows, key=lambda row: (row["n"], -row["accuracy"], row["tokens"]))


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against tokens a question, every point with its name; a line joins a strategy's sizes."""
    plt = pyplot()
    fig, ax = plt.subplots(figsize=(8, 4.8), layout="constrained")
    colors = dict(zip(NAMES, plt.get_cmap("tab20").colors, strict=False))
    for name in NAMES:
        part = sorted((row for row in rows if row["strategy"] == name), key=lambda row: row["n"])
        ax.plot([r["tokens"] for r in part], [r["accuracy"] for r in part], "o-", color=colors[name], ms=6, lw=1)
    lowest, highest = min(r["accuracy"] for r in rows), max(r["accuracy"] for r in rows)
    gap, label = max(highest - lowest, 0.1) / 16, float("inf")
    middle, sizes = float(np.median([r["tokens"] for r in rows])), {r["n"] for r in rows}
    for row in sorted(rows, key=lambda r: -r["accuracy"]):  # names below each other where points lie on each other
        label, left = min(row["accuracy"], label - gap), row["tokens"] < 0.9 * middle
        ax.annotate(
            row["strategy"] + (f", n = {row['n']}" if len(sizes) > 1 else ""), (row["tokens"], row["accuracy"]),
            (row["tokens"] * (0.94 if left else 1.06), row["accuracy"] if left else label), fontsize=8, va="center",
            ha="right" if left else "left", color=colors[row["strategy"]],
            arrowprops={"arrowstyle": "-", "lw": 0.4, "color": "0.6", "relpos": (1 if left else 0, 0.5)},
        )  # fmt: skip
        label = float("inf") if left and label == row["accuracy"] else label
    seeds, questions = rows[0]["seeds"], rows[0]["questions"]
    half = float(np.mean([(r["high"] - r["low"]) / 2 for r in rows]))
    ax.set(xlabel="tokens decoded a question", ylabel="accuracy", xlim=(0, 1.25 * max(r["tokens"] for r in rows)))
    ax.set_title(
        f"SmolLM2-135M-Instruct, {questions} held-out sums, {seeds} seeds, n = {sorted(sizes)}; 95 % intervals ± {half:.2f}",
        fontsize=10,
    )
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.3)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--n", type=int, nargs="+", default=[8])
    parser.add_argument("--work", type=Path, help="keep single records here, and go on from those that are there")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    # Not those of its training, and behind those that the pruning rule was calibrated on.
    questions = held_out(FAMILIES[ship.FAMILY])[1][ship.CALIBRATED :][: args.questions]
    model, found = trained(torch.bfloat16), []
    for n, seed, first in itertools.product(args.n, range(args.seeds), range(0, args.questions, AT_A_TIME)):
        for run, choosers in strategies(n).items():
            file = work / f"{run}-{n}-{seed}-{first}.jsonl"
            if not file.exists():
                part = questions[first : first + AT_A_TIME]
                lines = [json.dumps(r) for r in records(model, part, first, seed, n, choosers)]
                file.with_suffix(".part").write_text("\n".join(lines))
                file.with_suffix(".part").rename(file)
            found += map(json.loads, file.read_text().splitlines())
        print(f"n={n} seed={seed} questions to {first + AT_A_TIME}: {len(found)} records", flush=True)
    rows = summary(found)
    write("strategies", rows, args.out)
    draw(rows, args.out / "strategies.png")
    for row in rows:
        print({**row, "cpu": environment()["cpu"]})


if __name__ == "__main__":
    main()
