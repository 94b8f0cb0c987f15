"""Pictures of a suite's rows: a roofline, and latency against rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reflective.benchmarks.suite import TIMES
from reflective.plot import draw as write
from reflective.plot import pyplot

COLORS = {
    "cuda": "#4477aa", "triton": "#228833", "cpu": "#4477aa",
    "expression": "#bbbbbb", "cublas": "#66ccee", "compile": "#ee6677", "published": "#ccbb44",
}  # fmt: skip
Row = dict[str, Any]


def draw(rows: Sequence[Row], folder: Path, name: str, dtype: str = "bfloat16") -> list[Path]:
    """``folder/name_roofline.png`` and ``folder/name_latency.png`` of the rows of ``dtype`` that have a time."""
    timed = [r for r in rows if r["dtype"] == dtype and r["flops"] and float(r["flops"]) and _time(r)]
    if not timed:
        return []
    return [_roofline(timed, folder / f"{name}_roofline.png"), _latency(timed, folder / f"{name}_latency.png")]


def _roofline(rows: Sequence[Row], path: Path) -> Path:
    """Arithmetic intensity against the rate achieved, under the ceilings measured in the same run."""
    plt = pyplot()
    fig, ax = plt.subplots(figsize=(7.5, 5), layout="constrained")
    copy, matmul = float(rows[0]["copy_GB_per_s"]), float(rows[0]["matmul_TFLOP_per_s"])
    intensity = [float(r["flops"]) / float(r["bytes"]) for r in rows]
    span = [min(intensity) / 2, max(*intensity, 2e3 * matmul / copy)]
    knee = 1e3 * matmul / copy
    ax.plot(
        [span[0], knee, span[1]], [span[0] * copy / 1e3, matmul, matmul], color="k", lw=1,
        label=f"measured: copy {copy:,.0f} GB/s, product {matmul:,.3g} TFLOP/s",
    )  # fmt: skip
    for implementation in _present(rows):
        mine = [(x, float(r["TFLOP_per_s"])) for x, r in zip(intensity, rows, strict=True)
                if r["implementation"] == implementation]  # fmt: skip
        ax.plot(*zip(*mine, strict=True), "o", ms=4, alpha=0.7, color=COLORS[implementation], label=implementation)
    ax.set(xscale="log", yscale="log", xlabel="FLOP per byte that must move", ylabel="TFLOP/s")
    ax.legend(frameon=False, fontsize=8)
    ax.set_title(f"{_where(rows[0])}, {rows[0]['dtype']}", fontsize=10)
    write(fig, path, dpi=120)
    return path


def _latency(rows: Sequence[Row], path: Path) -> Path:
    """One panel an op and a width: median microseconds against rows, the 20 to 80 % band behind."""
    plt = pyplot()
    names = list(dict.fromkeys((r["op"], r["variant"]) for r in rows))
    widths = sorted({int(r["H"]) for r in rows})
    fig, axes = plt.subplots(
        len(names), len(widths), figsize=(1 + 2.6 * len(widths), 1 + 2.1 * len(names)), squeeze=False,
        sharex=True, sharey="row", layout="constrained",
    )  # fmt: skip
    for (op, variant), line in zip(names, axes, strict=True):
        for H, ax in zip(widths, line, strict=True):
            here = [r for r in rows if (r["op"], r["variant"], int(r["H"])) == (op, variant, H)]
            for implementation in _present(here):
                mine = sorted((int(r["rows"]), *_time(r)) for r in here if r["implementation"] == implementation)
                n, low, middle, high = zip(*mine, strict=True)
                ax.fill_between(n, low, high, color=COLORS[implementation], alpha=0.2, lw=0)
                ax.plot(n, middle, "o-", ms=3, lw=1, color=COLORS[implementation], label=implementation)
            ax.set(xscale="log", yscale="log")
            ax.set_title(f"{op} {variant} H = {H}", fontsize=8)
    for ax in axes[-1]:
        ax.set_xlabel("rows", fontsize=8)
    for ax in axes[:, 0]:
        ax.set_ylabel("µs", fontsize=8)
    handles = {label: h for ax in axes.flat for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    fig.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8)
    fig.suptitle(f"{_where(rows[0])}, {rows[0]['dtype']}", fontsize=10)
    write(fig, path, dpi=120)
    return path


def _time(row: Row) -> tuple[float, float, float] | None:
    """The 20, 50 and 80 % quantiles of the most telling time, device before host."""
    for time in TIMES:
        if row[f"{time}_q50_us"]:
            return tuple(float(row[f"{time}_q{q}_us"]) for q in (20, 50, 80))
    return None


def _present(rows: Sequence[Row]) -> list[str]:
    there = {r["implementation"] for r in rows}
    return [name for name in COLORS if name in there]


def _where(row: Row) -> str:
    return "GPU, kernel time, cold L2 (host time where a way waits for the host)" if row["device"] == "cuda" else "CPU"
