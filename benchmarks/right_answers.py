"""The README's second picture: what the score is worth, in right answers and in tokens, from recorded files.

python benchmarks/right_answers.py    # results/right_answers.png and right_answers_dark.png

Reads ``reproduction_shipped.csv`` (the embedded model on questions that chose nothing) and ``strategies.csv`` (long chains); measures nothing.
"""

from pathlib import Path
from typing import Any

from reflective.benchmarks.record import RESULTS, read
from reflective.benchmarks.second_pass import DECODE, OURS, PASS, main, title, written_in
from reflective.plot import draw, pyplot

NS = (1, 2, 4, 8, 16, 32)
LINES = {  # the rule, what a newcomer would call it
    "any": ("at least one is right", DECODE),
    "select": ("chosen by score\n(reflective)", OURS),
    "majority": ("majority vote", PASS),
}
BARS = (  # strategy, its candidates, what they do
    ("best_of_n", 16, "16 answers,\nall to their end"),
    ("prune, then select", 16, "16 answers, the\nhopeless stopped"),
    ("best_of_n", 8, "8 answers,\nall to their end"),
    ("auto", 8, "2 to 8 answers, as\nfirst scores ask"),
)
FAMILY = "chains"


def picture(path: Path, ground: str, ink: str, folder: Path = RESULTS) -> Path:
    """Right answers against answers drawn; tokens for as many right answers."""
    plt = pyplot()
    with written_in(ink):
        fig, (answers, tokens) = plt.subplots(1, 2, figsize=(11, 3.3), layout="constrained", width_ratios=(1.25, 1), facecolor=ground)
        _answers(answers, {r["measure"]: r for r in read("reproduction_shipped", folder)}, ink)
        _tokens(tokens, [r for r in read("strategies", folder) if r["family"] == FAMILY], ink)
        for ax in (answers, tokens):
            ax.set_facecolor(ground)
            ax.spines[["top", "right", "left"]].set_visible(False)
            ax.tick_params(length=0, labelsize=8.5)
        tokens.spines["bottom"].set_visible(False)
        fig.get_layout_engine().set(wspace=0.08)
        draw(fig, path, dpi=160)
    return path


def _answers(ax: Any, rows: dict[str, dict[str, str]], ink: str) -> None:
    for rule, (label, color) in LINES.items():
        at = [rows["pass@1" if n == 1 else f"{rule}@{n}"] for n in NS]
        value, low, high = ([100 * float(r[k]) for r in at] for k in ("value", "low", "high"))
        ours = color == OURS
        ax.plot(NS, value, "o--" if rule == "any" else "o-", color=color, lw=2.5 if ours else 1.5, ms=5 if ours else 3.5)
        if rule != "any":
            ax.fill_between(NS, low, high, color=color, alpha=0.15, lw=0)
        ax.text(36, value[-1], f"{value[-1]:.0f} %  {label}", va="center", fontsize=9.5, color=ink, fontweight="bold" if ours else "normal")
    one = 100 * float(rows["pass@1"]["value"])
    ax.text(0.85, one - 6, f"{one:.0f} %  one answer", va="top", fontsize=9.5, color=ink)
    ax.set_xscale("log", base=2)
    ax.set(xlim=(0.85, 150), xticks=NS, xticklabels=NS, yticks=[], ylim=(one - 14, None), xlabel="answers drawn to each question")
    ax.xaxis.set_label_coords(0.36, -0.12)
    title(ax, "More answers, and the score finds the right one", f"{rows['pass@1']['questions']} unseen sums, SmolLM2-135M; shaded: 95 % intervals")


def _tokens(ax: Any, rows: list[dict[str, str]], ink: str) -> None:
    there = [(next(r for r in rows if (r["strategy"], int(r["n"])) == (name, n)), label) for name, n, label in BARS]
    most = max(float(r["tokens"]) for r, _ in there)
    ticks = []
    for y, (r, label) in zip((3.4, 2.4, 1, 0), there, strict=True):
        ours, tokens = r["strategy"] != "best_of_n", float(r["tokens"])
        ax.barh(y, tokens, color=OURS if ours else DECODE, height=0.7)
        ax.text(tokens + most / 60, y + 0.14, f"{tokens:,.0f} tokens", va="center", fontsize=9.5, color=ink, fontweight="bold" if ours else "normal")
        ax.text(tokens + most / 60, y - 0.21, f"{100 * float(r['accuracy']):.0f} % right", va="center", fontsize=8, color=ink)
        ticks.append((y, label))
    ax.set_yticks(*zip(*ticks, strict=True))
    ax.set(xlim=(0, 1.3 * most), xticks=[])
    title(ax, "As many right, for fewer tokens", f"{there[0][0]['questions']} unseen chains of 8 to 10 steps; tokens a question")


if __name__ == "__main__":
    main(picture, "right_answers", __doc__)
