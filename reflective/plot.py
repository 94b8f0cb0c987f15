"""Pictures of trajectories, by matplotlib (extra ``plot``)."""

import math
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from .model import Candidate


def plot_trajectory(candidate: Candidate, path: str | Path, *, title: str = "") -> None:
    """Draw one trajectory's step scores, each step's text beside its bar, and their geometric mean.

    Args:
        candidate: with at least one step.
        path: image file; the suffix decides the format.

    Raises:
        ValueError: the candidate has no step.
        ImportError: matplotlib is missing.
    """
    if not candidate.step_scores:
        raise ValueError("candidate: it has no step to draw")
    plt = pyplot()
    steps = [" ".join(candidate.text[a:b].split()) for a, b in candidate.step_spans]
    rows = range(len(steps))
    fig, ax = plt.subplots(figsize=(7.5, 1.2 + 0.45 * len(steps)), layout="constrained")
    ax.barh(rows, candidate.step_scores, color="#4477aa", height=0.6)
    for row, score in zip(rows, candidate.step_scores, strict=True):
        inside = score > 0.15  # at the bar's base, where the mean's line seldom is
        ax.text(
            0.01 if inside else score + 0.01, row, f"{score:.2f}", va="center", color="w" if inside else "k", fontsize=9
        )
    ax.axvline(
        candidate.score, color="#cc3311", lw=1.5, label=f"trajectory score (geometric mean) {candidate.score:.3f}"
    )
    ax.set_yticks(rows, [s if len(s) <= 48 else s[:47] + "…" for s in steps])
    ax.set(xlim=(0, 1), xlabel="step score", title=title)
    ax.invert_yaxis()
    ax.spines[["top", "right"]].set_visible(False)
    fig.legend(loc="outside lower right", frameon=False, fontsize=9)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def sparkline(scores: Sequence[float]) -> str:
    """Scores in [0, 1] as one block character each."""
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * s))] if math.isfinite(s) else "?" for s in scores)


def pyplot() -> ModuleType:
    try:
        import matplotlib
    except ImportError:
        raise ImportError("drawing needs matplotlib: pip install 'reflective-kernels[plot]'") from None
    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    return plt
