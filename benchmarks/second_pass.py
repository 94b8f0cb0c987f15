"""The README's first picture: scoring in the stream beside a second pass, from recorded files.

python benchmarks/second_pass.py    # results/second_pass.png and second_pass_dark.png

Reads ``in_vllm_best_of_n.csv`` (answers and scores, on a CPU) and ``gpu_best_of_n.csv`` (scoring alone, on a GPU); measures nothing.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reflective.benchmarks.record import RESULTS, read
from reflective.plot import draw, pyplot

OURS, PASS, DECODE = "#2f7fc1", "#e08214", "#9aa5b1"  # told apart by all readers, on white and on black
GROUNDS = {"": ("#ffffff", "#1f2933"), "_dark": ("#0d1117", "#e6edf3")}  # GitHub's own, and the writing on each
WAYS = {
    "reflective_vllm": "reflective\nin vLLM",
    "vllm_vllm": "vLLM, then a\nsecond vLLM",
    "vllm_published": "vLLM, then the\npublished way",
}


def picture(path: Path, ground: str, ink: str, folder: Path = RESULTS) -> Path:
    """Seconds of answers and scores; seconds and memory of the scoring alone."""
    plt = pyplot()
    with written_in(ink):
        fig, axes = plt.subplots(1, 3, figsize=(11, 3.1), layout="constrained", width_ratios=(1.25, 1, 1), facecolor=ground)
        _whole(axes[0], {r["way"]: r for r in read("in_vllm_best_of_n", folder)}, ink)
        found = [r for r in read("gpu_best_of_n", folder) if r["schedule"] == "deferred"]
        _alone(axes[1], found, ("scoring_s", "second_pass_s"), _seconds, ink)
        _alone(axes[2], found, ("scoring_MiB", "second_pass_MiB"), lambda value: f"{value:,.0f} MiB", ink)
        gpu, n, tokens = found[0]["gpu"].removeprefix("NVIDIA "), found[0]["n"], int(found[0]["tokens"])
        title(axes[1], "Scoring alone: time", f"{n} texts of {tokens:,} tokens, {gpu}")
        title(axes[2], "Scoring alone: extra memory", "the same runs")
        for ax in axes:
            ax.set_facecolor(ground)
            ax.spines[["top", "right", "bottom", "left"]].set_visible(False)
            ax.tick_params(length=0, labelsize=8.5)
            ax.set_xticks([])
        handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in (OURS, PASS, DECODE)]
        fig.legend(
            handles, ("scored while decoding (reflective)", "second pass over finished texts", "decoding"), loc="outside lower center", ncols=3,
            frameon=False, fontsize=9,
        )  # fmt: skip
        draw(fig, path, dpi=160)
        plt.close(fig)
    return path


def _whole(ax: Any, rows: dict[str, dict[str, str]], ink: str) -> None:
    there = [rows[way] for way in WAYS if way in rows]
    for y, r in enumerate(reversed(there)):
        decode, score, total = (float(r[k]) for k in ("generate_s", "score_s", "total_s"))
        ours = r["way"].startswith("reflective")
        ax.barh(y, decode, color=DECODE, height=0.6)
        ax.barh(y, score, left=decode, color=OURS if ours else PASS, height=0.6)
        ax.text(max(total, decode + score) + 1, y + 0.13, f"{total:.0f} s", va="center", fontsize=9.5, color=ink, fontweight="bold" if ours else "normal")
        ax.text(max(total, decode + score) + 1, y - 0.17, f"scoring {score:.2g} s", va="center", fontsize=8, color=ink)
    ax.set_yticks(range(len(there)), [WAYS[r["way"]] for r in reversed(there)])
    ax.set_xlim(0, 1.28 * max(float(r["total_s"]) for r in there))
    first = there[0]
    title(ax, f"Best of {first['n']}: answers and scores", f"SmolLM2-135M, {first['tokens']} tokens each, on a CPU")


def _alone(ax: Any, rows: list[dict[str, str]], columns: tuple[str, str], told: Any, ink: str) -> None:
    y, ticks, longest = 0.0, [], max(float(r[column]) for r in rows for column in columns)
    for r in reversed(rows):
        pair = [(float(r[column]), color) for column, color in zip(columns, (OURS, PASS), strict=True)]
        for value, color in reversed(pair):
            ax.barh(y, value, color=color, height=0.8)
            ax.text(value + longest / 50, y, told(value), va="center", fontsize=9.5, color=ink, fontweight="bold" if color == OURS else "normal")
            y += 0.85
        ticks.append((y - 1.275, f"{r['model']}\nmodel"))
        y += 0.6
    ax.set_yticks(*zip(*ticks, strict=True))
    ax.set_xlim(0, 1.35 * longest)


def written_in(ink: str) -> Any:
    """Matplotlib's settings for words and axes in one colour, as a context."""
    return pyplot().rc_context({"text.color": ink, "axes.labelcolor": ink, "xtick.color": ink, "ytick.color": ink, "axes.edgecolor": ink})


def title(ax: Any, what: str, of: str) -> None:
    """What an axis shows, and below it, smaller, of what."""
    ax.set_title(what, loc="left", fontsize=11, fontweight="bold", pad=20)
    ax.text(0, 1.03, of, transform=ax.transAxes, fontsize=8.5)


def _seconds(value: float) -> str:
    return f"{1e3 * value:.0f} ms" if value < 0.1 else f"{value:.2f} s"


def main(draw_one: Callable[[Path, str, str], Path] = picture, name: str = "second_pass", about: str | None = __doc__) -> None:
    """A README's picture on each of the ``GROUNDS``."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    out = parser.parse_args().out
    for end, (ground, ink) in GROUNDS.items():
        print(draw_one(out / f"{name}{end}.png", ground, ink))


if __name__ == "__main__":
    main()
