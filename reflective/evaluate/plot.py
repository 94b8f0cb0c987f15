"""The report as a picture, by matplotlib (extra ``plot``)."""

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..plot import draw, pyplot
from .measures import CHOICES, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STYLE = {"best_of": "-", "weighted_vote": "--", "majority": ":", "any": "-."}


def plot_report(results: Sequence[str], rows: Sequence[Row], path: str | Path) -> None:
    """Draw accuracy against N, with what it tends to, and against tokens decoded, where the files tell them.

    Of several aggregations the first is drawn. A hollow mark stands for fewer questions than others of its line.

    Args:
        results: their names, the keys of ``Report.counts``. rows: of the report.
        path: image file; the suffix decides the format.

    Raises:
        ImportError: matplotlib is missing.
    """
    plt = pyplot()
    first = next((row.aggregation for row in rows if row.aggregation), None)
    rows = [row for row in rows if row.aggregation in (None, first)]
    told = not all(math.isnan(row.tokens) for row in rows)
    fig, axes = plt.subplots(1, 1 + told, figsize=(5.2 * (1 + told), 4.4), layout="constrained", squeeze=False)
    keys = list(results) if len(results) > 1 else list(CHOICES)
    colours = dict(zip(keys, itertools.cycle(plt.get_cmap("tab10").colors), strict=False))
    for result, metric in itertools.product(results, CHOICES):
        mine = [row for row in rows if row.result == result and row.metric in ("pass", metric)]
        if len(mine) < 2:
            continue
        alone = len(results) == 1
        look = {"color": colours[metric if alone else result], "linestyle": _STYLE[metric]}
        _line(axes[0, 0], mine, [row.n for row in mine], metric if alone else f"{result}, {metric}", look)
        fitted = {row.metric: row.value for row in rows if row.result == result}
        if f"{metric} limit" in fitted:
            axes[0, 0].axhline(fitted[f"{metric} limit"], lw=0.6, alpha=0.6, **look)
            axes[0, 0].plot(fitted[f"{metric} n95"], fitted[f"{metric} limit"], "|", ms=12, color=look["color"])
        if not math.isnan(mine[0].tokens):
            _line(axes[0, 1], mine, [row.tokens for row in mine], None, look)
    for row in rows:
        if row.metric == "chosen" and not math.isnan(row.tokens):
            spread = np.abs(np.array([[row.low], [row.high]]) - row.value)
            axes[0, 1].errorbar(
                row.tokens, row.value, spread, fmt="*", ms=11, capsize=2, label=f"{row.result}, chosen",
                color=colours.get(row.result, "k"),
            )  # fmt: skip
    most = max((row.n for row in rows if row.n), default=1)
    axes[0, 0].set(xlabel="candidates N", ylabel="accuracy", xscale="log", xlim=(0.9, 1.12 * most))
    axes[0, 0].set_xticks(*[sorted({row.n for row in rows if row.n})] * 2)
    axes[0, 0].minorticks_off()
    if told:
        axes[0, 1].set(xlabel="tokens decoded a question", ylabel="accuracy", xscale="log")
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.3)
    fig.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    draw(fig, path)


def _line(ax: "Axes", rows: Sequence[Row], at: Iterable[float], label: str | None, look: dict[str, Any]) -> None:
    at, values = list(at), [row.value for row in rows]
    ax.plot(at, values, marker="o", ms=4, lw=1.2, label=label, **look)
    fewer = [i for i, row in enumerate(rows) if row.questions < rows[0].questions]
    ax.plot([at[i] for i in fewer], [values[i] for i in fewer], "o", ms=4, color=look["color"], mfc="w", ls="")
    ax.fill_between(at, [row.low for row in rows], [row.high for row in rows], color=look["color"], alpha=0.12, lw=0)
