"""Pictures of trajectories, by matplotlib (extra ``plot``)."""

import math
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

from .scoring.scores import aggregate
from .utils.outputs import destination, replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Candidate(Protocol):
    """What of a ``search.results.Candidate`` is drawn."""

    text: str
    score: float
    step_scores: list[float]
    step_spans: list[tuple[int, int]]
    status: str


class Generation(Protocol):
    """What of a ``search.results.Generation`` is drawn."""

    candidates: Sequence[Candidate]
    best: Candidate
    strategy: str
    tokens: int
    alive: list[tuple[float, int]]
    aggregation: str


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
    path = image(path)
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
    draw(fig, path)


def plot_generation(generation: Generation, path: str | Path | None = None) -> "Figure":
    """Draw the running score of every candidate, the chosen one's on top, and how many were alive when.

    Args:
        path: image file; the suffix decides the format. None: only the figure, which a notebook shows.

    Raises:
        ImportError: matplotlib is missing.
    """
    plt = pyplot()
    fig, (scores, alive) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", width_ratios=(3, 2))
    colours = {"stop": "#4477aa", "length": "#ccbb44", "stopped": "#bbbbbb", "interrupted": "#bbbbbb"}
    for c in sorted(generation.candidates, key=lambda c: (c is generation.best, c.status != "stopped")):
        running = [aggregate(c.step_scores[:k], generation.aggregation) for k in range(1, len(c.step_scores) + 1)]
        colour = "#cc3311" if c is generation.best else colours[c.status]
        scores.plot(range(1, len(running) + 1), running, "-o", ms=3, color=colour, lw=2 if c is generation.best else 1)
    for label, colour in {"chosen": "#cc3311", **colours}.items():
        if label == "chosen" or any(c.status == label for c in generation.candidates):
            name = {"stop": "finished", "length": "cut at its length"}.get(label, label)
            scores.plot([], [], "-o", ms=3, color=colour, label=name)
    title = f"{generation.strategy}: {generation.tokens} tokens"
    scores.set(xlabel="step", ylabel=f"score ({generation.aggregation.replace('_', ' ')})", title=title)
    if all(0 <= s <= 1 for c in generation.candidates for s in c.step_scores):
        scores.set_ylim(0, 1)
    seconds, counts = zip(*generation.alive, strict=True) if generation.alive else ((), ())
    alive.step(seconds, counts, where="post", color="#4477aa")
    alive.set(xlabel="seconds", ylabel="candidates alive", ylim=(0, None))
    for ax in (scores, alive):
        ax.spines[["top", "right"]].set_visible(False)
        ax.xaxis.get_major_locator().set_params(integer=ax is scores)
    alive.yaxis.get_major_locator().set_params(integer=True)
    fig.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    if path is not None:
        draw(fig, path)
    plt.close(fig)
    return fig


def image(path: str | Path) -> Path:
    """``path`` with a suffix, which decides the format: ``.png`` where there is none.

    Raises:
        ValueError: a suffix that is no format. OSError: it cannot be written, see ``outputs.destination``.
        ImportError: matplotlib is missing.
    """
    path = Path(path)
    path = path if path.suffix else path.with_name(f"{path.name}.png")
    known = pyplot().Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise ValueError(f"plot: {path}: {path.suffix} is no format of pictures; give one of {', '.join(known)}")
    destination(path, what="plot")
    return path


def draw(fig: "Figure", path: str | Path, dpi: int = 150) -> None:
    """Draw a figure into ``image(path)``, as a whole, and close it."""
    path = image(path)
    with replacing(path, what="plot") as file:
        fig.savefig(file, format=path.suffix[1:].lower(), dpi=dpi)
    pyplot().close(fig)


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
