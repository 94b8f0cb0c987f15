"""How to fit the head: schedules of the self-supervised loss, compared on training questions held back from the fit.

    reflective train RUN
    python benchmarks/head_schedules.py RUN

Needs the rollouts that ``reflective train`` leaves in RUN; the questions of its evaluation stay untouched.
"""

import argparse
from pathlib import Path

import torch

from reflective.benchmarks.record import write
from reflective.train import Metric, Rollouts, evaluate, fit

# One line a question asked of the data.
VARIANTS = {
    "plain BCE, 24 epochs": {},
    "plain BCE, no balance": {"within_questions": False},
    "plain BCE, class balance too": {"class_balance": True},
    "plain BCE, class balance alone": {"within_questions": False, "class_balance": True},
    "dynamic weights from epoch 12": {"warmup": 12},
    "dynamic weights from epoch 8": {"warmup": 8},
    "dynamic weights from epoch 8, class balance alone": {
        "warmup": 8,
        "within_questions": False,
        "class_balance": True,
    },
    "dynamic weights from the start": {"warmup": 0},
    "plain BCE, 8 epochs": {"epochs": 8, "warmup": 8},
    "plain BCE, 16 epochs": {"epochs": 16, "warmup": 16},
    "plain BCE, 48 epochs": {"epochs": 48, "warmup": 48},
}


def of_questions(rollouts: Rollouts, questions: torch.Tensor) -> Rollouts:
    """The trajectories of ``questions`` alone."""
    keep = torch.isin(rollouts.question, questions)
    steps = keep[rollouts.trajectory]
    number = keep.cumsum(0) - 1
    return Rollouts(
        features=rollouts.features[steps],
        trajectory=number[rollouts.trajectory[steps]],
        **{k: getattr(rollouts, k)[keep] for k in ("outcome", "question", "answer", "tokens")},
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    files = sorted((args.run / "train").glob("*.safetensors"))
    rollouts = Rollouts.join([Rollouts.load(str(file)) for file in files])
    questions = torch.unique(rollouts.question)
    questions = questions[torch.randperm(len(questions), generator=torch.Generator().manual_seed(0))]
    cut = len(questions) * 4 // 5
    fitted_on, held_back = of_questions(rollouts, questions[:cut]), of_questions(rollouts, questions[cut:])
    rows = []
    for name, kwargs in VARIANTS.items():
        runs: list[dict[str, Metric]] = [
            evaluate(held_back, fit(fitted_on, seed=seed, **kwargs), resamples=2) for seed in range(args.seeds)
        ]
        means = {k: round(sum(run[k].value for run in runs) / len(runs), 3) for k in runs[0]}
        rows.append({"variant": name, "seeds": args.seeds, "questions": len(questions) - cut, **means})
        print(rows[-1], flush=True)
    print(write("head_schedules", rows))


if __name__ == "__main__":
    main()
