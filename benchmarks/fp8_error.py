"""What a float8_e4m3fn W1 costs: errors of the embedded head's log-scores, and what they do to ranking.

    reflective train RUN
    python benchmarks/fp8_error.py RUN

Reads the features that ``reflective train`` recorded of the questions it evaluates on. The truth is the shipped head in
float64. Spearman: of the trajectories' scores with the truth's.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reflective import SPRM, TrajectoryScores, kernels
from reflective.benchmarks.record import write
from reflective.checkpoints.default import HEAD
from reflective.kernels.score_rows import log_score
from reflective.scoring.backend import choose_backend
from reflective.train import Rollouts, evaluate

CPU, FLOAT8 = torch.device("cpu"), torch.float8_e4m3fn
CASES = [  # dtypes of W1 and of the features, as they go together in use
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (FLOAT8, torch.float32),
    (FLOAT8, torch.bfloat16),
]


def logits_of(rollouts: Rollouts, w1_dtype: torch.dtype, dtype: torch.dtype) -> tuple[str, Tensor]:
    """Logits [M] of all steps, and the backend that computed them."""
    w1, b1, w2, b2 = SPRM.from_pretrained(HEAD, dtype=dtype).weights(w1_dtype)
    features = rollouts.features.to(dtype)
    if dtype == torch.float64:
        return "torch", kernels.logit_rows(features, w1, b1, w2, b2)
    backend = choose_backend(None, CPU, dtype, w1.dtype)
    return backend.name, backend.logit_rows(features, w1, b1, w2, b2)


def trajectory_scores(rollouts: Rollouts, log_scores: Tensor) -> Tensor:
    """[N] geometric means."""
    n = len(rollouts.outcome)
    log_sums = torch.zeros(n, dtype=torch.float64).index_add(0, rollouts.trajectory, log_scores)
    steps = torch.bincount(rollouts.trajectory, minlength=n)
    return TrajectoryScores.collect(log_sums.tolist(), steps.tolist(), [], [], "predict").score


def spearman(a: Tensor, b: Tensor) -> float:
    """The correlation of ranks; equal values share the mean of theirs."""

    def ranks(x: Tensor) -> Tensor:
        _, which, counts = x.unique(return_inverse=True, return_counts=True)
        return (counts.cumsum(0) - (counts - 1) / 2)[which]

    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]).double())[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    files = sorted((parser.parse_args().run / "eval").glob("*.safetensors"))
    rollouts = Rollouts.join([Rollouts.load(str(file)) for file in files])
    rows: list[dict[str, Any]] = []
    truth: tuple[Tensor, Tensor] | None = None
    for w1_dtype, dtype in CASES:
        implementation, logits = logits_of(rollouts, w1_dtype, dtype)
        log_scores = log_score(logits).double()
        scores = trajectory_scores(rollouts, log_scores)
        truth = truth or (log_scores, scores)
        error = (log_scores - truth[0]).abs()
        metrics = evaluate(replace(rollouts, features=logits[:, None]), nn.Identity())
        row = {
            "w1": str(w1_dtype).removeprefix("torch."),
            "features": str(dtype).removeprefix("torch."),
            "implementation": implementation,
            "steps": len(logits),
            "trajectories": len(scores),
            "max_abs_error": f"{error.max():.2e}",
            "mean_abs_error": f"{error.mean():.2e}",
            "spearman": f"{spearman(scores, truth[1]):.6f}",
        }
        for name, key in (("best_of_8", "best-of-n"), ("auc_within", "auc_within")):
            m = metrics[key]
            row |= {name: f"{m.value:.4f}", f"{name}_low": f"{m.low:.4f}", f"{name}_high": f"{m.high:.4f}"}
        rows.append(row)
        print(row, flush=True)
    print(write("fp8_error", rows))


if __name__ == "__main__":
    main()
