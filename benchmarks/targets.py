"""The targets, and whether the recorded rows meet them.

python benchmarks/targets.py [RESULTS]
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reflective.benchmarks.cases import OURS
from reflective.benchmarks.record import RESULTS, read
from reflective.benchmarks.suite import red, speedups

Row = dict[str, Any]
NOT_MEASURED = "not measured"


class Verdict(NamedTuple):
    case: str
    target: str
    measured: str
    met: str


def verdicts(folder: Path = RESULTS) -> list[Verdict]:
    """One line a target, from the suites' files and those of decoding, generating and best of n."""
    gpu, cpu, decode = (read(name, folder) for name in ("gpu_suite", "suite_cpu", "gpu_decode_overhead"))
    best_of_n, generate = read("gpu_best_of_n", folder), read("gpu_generate", folder)
    few = (1, 2, 4, 8, 16)
    return [
        _verdict("GPU, a decode step with no step-token, replayed", "<= 3 us", _slowest(gpu, (), (0,), "warm"), 3, "us"),
        _verdict("GPU, immediate, 1-16 rows, H = 1536, cold", "<= 8 us", _slowest(gpu, (1536,), few, "cold"), 8, "us"),
        _verdict("GPU, immediate, 1-16 rows, H = 3584, cold", ">= 72 % of copy", _share(gpu, 3584, few), 72, "%"),
        _verdict("GPU, immediate, 1-16 rows, H = 5120, cold", ">= 85 % of copy", _share(gpu, 5120, few), 85, "%"),
        _verdict("GPU, immediate, 1-16 rows, H = 8192, cold", ">= 90 % of copy", _share(gpu, 8192, few), 90, "%"),
        _verdict("GPU, flush of 256 rows, H = 5120", "<= 60 us", _slowest(gpu, (5120,), (256,), "cold", "flush"), 60, "us"),
        _verdict("GPU, the same against cuBLAS", "no slower", _against_cublas(gpu, 5120, 256), 1, "x"),
        _verdict(
            "GPU, decoding in CUDA graphs, 1.5B and 7B, 1, 8 and 64 sequences", ">= 99.7 % of its tokens/s",
            _least(100 * float(r["throughput_kept"]) for r in decode if r["throughput_kept"]), 99.7, "%",
        ),
        _verdict(
            "GPU, ReflectiveModel.generate, 32 candidates", ">= 95 % of compiled generate's tokens/s",
            _of_compiled(generate), 95, "%",
        ),
        _verdict(
            "GPU, time against the second pass, best of 32", ">= 50 times less",
            _least(float(r["second_pass_s"]) / float(r["scoring_s"]) for r in best_of_n if r["schedule"] == "deferred"),
            50, "x",
        ),
        _verdict(
            "GPU, memory against the second pass, best of 32", "< 1 % of its extra",
            _most(100 * float(r["scoring_MiB"]) / float(r["second_pass_MiB"]) for r in best_of_n), 1, "%",
        ),
        *_cpu_best_of_n(read("best_of_n", folder)),
        _verdict(
            "CPU, H = 576 and 1536, 1-8 rows", ">= 3x plain PyTorch",
            _least(s["expression"] for s in _cpu_speedups(cpu) if "expression" in s), 3, "x",
        ),
        _verdict("CPU, a decode step with no step-token", "<= 5 us", _slowest(cpu, (576, 1536), (0,), "host"), 5, "us"),
        _gates(gpu, "GPU"),
        _gates(cpu, "CPU"),
    ]  # fmt: skip


def markdown(found: Iterable[Verdict]) -> str:
    lines = ["| case | target | measured | met |", "|---|---|---|---|"]
    return "\n".join([*lines, *("| " + " | ".join(v) + " |" for v in found), ""])


def _verdict(case: str, target: str, value: float | None, limit: float, unit: str) -> Verdict:
    if value is None:
        return Verdict(case, target, NOT_MEASURED, "-")
    met = value < limit or ("=" in target and value == limit) if target.startswith("<") else value >= limit
    return Verdict(case, target, f"{value:,.3g} {unit}", "yes" if met else "no")


def _best(rows: Sequence[Row], column: str, best: Callable[[list[float]], float]) -> dict[tuple[str, ...], float]:
    """For each cell the best of our implementations."""
    found: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        if row["implementation"] in OURS and row["status"] == "ok" and row[column]:
            found.setdefault(tuple(str(row[k]) for k in ("variant", "H", "rows", "dtype")), []).append(
                float(row[column])
            )
    return {key: best(values) for key, values in found.items()}


def _slowest(
    rows: Sequence[Row], widths: tuple[int, ...], of_rows: tuple[int, ...], time: str, op: str = "decode_step"
) -> float | None:
    """The slowest cell's median, in bfloat16; decode steps with rows are immediate ones."""
    here = [
        r for r in rows
        if r["op"] == op and r["dtype"] == "bfloat16" and int(r["rows"]) in of_rows
        and (not widths or int(r["H"]) in widths) and (op != "decode_step" or r["variant"] == "immediate" or of_rows == (0,))
    ]  # fmt: skip
    return _most(_best(here, f"{time}_q50_us", min).values())


def _share(rows: Sequence[Row], H: int, of_rows: tuple[int, ...]) -> float | None:
    here = [
        r for r in rows
        if r["op"] == "decode_step" and r["variant"] == "immediate" and r["dtype"] == "bfloat16"
        and int(r["H"]) == H and int(r["rows"]) in of_rows and r["cold_q50_us"]
    ]  # fmt: skip
    return _least(_best(here, "percent_of_copy", max).values())


def _against_cublas(rows: Sequence[Row], H: int, n: int) -> float | None:
    """How many times less than PyTorch's products, with cuBLAS's own epilogues where that is faster, the flush takes."""
    here = [
        r for r in rows
        if r["op"] == "flush" and r["dtype"] == "bfloat16" and int(r["H"]) == H and int(r["rows"]) == n
        and r["status"] == "ok" and r["cold_q50_us"]
    ]  # fmt: skip
    ours = _least(float(r["cold_q50_us"]) for r in here if r["implementation"] in OURS)
    theirs = _least(float(r["cold_q50_us"]) for r in here if r["implementation"] in ("expression", "cublas"))
    return None if ours is None or theirs is None else theirs / ours


def _of_compiled(rows: Sequence[Row]) -> float | None:
    rate = {r["way"]: float(r["tokens_per_s"]) for r in rows}
    return 100 * rate["reflective"] / rate["compiled"] if {"reflective", "compiled"} <= rate.keys() else None


def _cpu_best_of_n(rows: Sequence[Row]) -> list[Verdict]:
    ways = {r["way"]: r for r in rows}
    ours, theirs = ways.get("reflective"), ways.get("published")
    times = float(theirs["score_s"]) / float(ours["score_s"]) if ours and theirs else None
    memory = 100 * float(ours["score_MiB"]) / float(theirs["score_MiB"]) if ours and theirs else None
    return [
        _verdict("CPU, time against the second pass, best of 32", ">= 500 times less", times, 500, "x"),
        _verdict("CPU, memory against the second pass, best of 32", "< 1 % of its extra", memory, 1, "%"),
    ]


def _cpu_speedups(rows: Sequence[Row]) -> list[dict[str, float]]:
    return [
        speedups(r, rows) for r in rows
        if r["op"] == "decode_step" and r["variant"] == "immediate" and int(r["rows"]) in (1, 2, 4, 8)
        and int(r["H"]) in (576, 1536)
    ]  # fmt: skip


def _gates(rows: Sequence[Row], where: str) -> Verdict:
    ours = [r for r in rows if r["implementation"] in OURS]
    case, target = f"{where}, error against float64", "<= 2x that of PyTorch, everywhere"
    if not ours:
        return Verdict(case, target, NOT_MEASURED, "-")
    failed = len(red(ours))
    return Verdict(case, target, f"{len(ours) - failed} of {len(ours)} cells", "no" if failed else "yes")


def _least(values: Iterable[float]) -> float | None:
    return min(values, default=None)


def _most(values: Iterable[float]) -> float | None:
    return max(values, default=None)


if __name__ == "__main__":
    print(markdown(verdicts(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS)))
