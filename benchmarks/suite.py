"""The microbenchmark suite: every op x width x rows x dtype against its peers, each cell behind its correctness gate.

    reflective bench --help

On a GPU the kernel's own time comes from replays of CUDA graphs whose calls rotate among inputs and copies of the weights:
``cold`` among more than three times the L2 cache holds, ``warm`` always the same weights. Host time is that of eager calls,
queued back to back, to their end on the device. On CPU there is host time alone, and the weights stay where they are.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reflective.benchmarks import cases, clocks, record
from reflective.benchmarks.cases import FLOAT8, OURS, Case, Cell
from reflective.benchmarks.clocks import Graph, Quantiles

WIDTHS = (576, 1536, 3584, 5120, 8192)
ROWS = (0, 1, 2, 4, 8, 16, 64, 256, 1024)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float8_e4m3fn": FLOAT8}
IDLE_NODES = 50
LATE = {"triton": 1, "compile": 2}  # what compiles at first use
TIMES = ("cold", "warm", "host", "replay")  # replay: one graph of one call, from asking for it to its end
COLUMNS = (
    "op", "variant", "H", "rows", "dtype", "implementation", "status", "detail", "error", "definition_error", "dtype_error",
    *(f"{time}_q{q}_us" for time in TIMES for q in (20, 50, 80)), "samples", "bytes", "flops", "GB_per_s", "copy_GB_per_s",
    "percent_of_copy", "TFLOP_per_s", "matmul_TFLOP_per_s", "percent_of_matmul", "device",
)  # fmt: skip
Row = dict[str, Any]


@dataclass
class Settings:
    """What to run. ``seconds`` is spent on each measurement; after ``budget`` seconds no further cell is begun."""

    device: torch.device
    ops: tuple[str, ...] = tuple(cases.CASES)
    widths: tuple[int, ...] = WIDTHS
    form_widths: tuple[int, ...] = ()  # of decode_step with other heads; none: widths
    rows: tuple[int, ...] = ROWS
    dtypes: tuple[str, ...] = tuple(DTYPES)
    implementations: tuple[str, ...] = ()  # none: all that there are
    seconds: float = 0.05
    budget: float = math.inf
    ceiling_bytes: int = 1 << 32
    ceiling_matmul: int = 8192

    @classmethod
    def default(cls, device: torch.device, **given: Any) -> "Settings":
        """On CPU: the widths, rows and dtypes that a CPU decodes with."""
        forms = {} if "widths" in given else {"form_widths": cases.FORM_WIDTHS}
        if device.type == "cpu":
            on_cpu = {
                "widths": WIDTHS[:2], "rows": ROWS[:7], "dtypes": ("float32", "bfloat16"),
                "ceiling_bytes": 1 << 28, "ceiling_matmul": 1024,
            }  # fmt: skip
            given = on_cpu | given
        return cls(device, **forms | given)

    @classmethod
    def quick(cls, device: torch.device, **given: Any) -> "Settings":
        """Small sizes, few repetitions, nothing compiled: does everything work?"""
        small = {
            "widths": (64,), "rows": (0, 2, 16), "dtypes": ("float32", "bfloat16"), "seconds": 0.0,
            "implementations": ("cuda", "triton", "cpu", "expression", "cublas", "published") if device.type == "cuda"
            else ("cpu", "expression", "published"),
            "ceiling_bytes": 1 << 22, "ceiling_matmul": 128,
        }  # fmt: skip
        return cls(device, **(small | given))


@dataclass
class Ceilings:
    """What the machine can do, measured in this run: GB/s of a large copy, TFLOP/s of a large product by dtype."""

    copy: float
    matmul: dict[torch.dtype, float] = field(default_factory=dict)

    @classmethod
    def measure(cls, settings: Settings) -> "Ceilings":
        dtypes = {DTYPES[d] for d in settings.dtypes} - {FLOAT8} | {torch.bfloat16}
        rates = {d: clocks.matmul_rate(settings.device, settings.ceiling_matmul, d) for d in dtypes}
        size = settings.ceiling_bytes
        if settings.device.type == "cuda":
            size = min(size, torch.cuda.get_device_properties(settings.device).total_memory // 8)
        return cls(clocks.copy_rate(settings.device, size), rates)


@dataclass(frozen=True)
class Item:
    """A cell and the implementations to run in it."""

    cell: Cell
    implementations: tuple[str, ...]


def plan(settings: Settings) -> list[Item]:
    """What to run, the most telling first, so that a budget cuts off the least.

    On CPU all implementations of a cell take turns. On a GPU, whose state is steady, first come all cells of what is compiled
    already, with the peers that need no compiler; then Triton's, which take a second each; then ``torch.compile``, several.
    """
    dtypes = tuple(DTYPES[d] for d in settings.dtypes)
    chosen = tuple(cases.cells(settings.ops, settings.widths, settings.rows, dtypes, settings.form_widths))
    compiled_late = LATE if settings.device.type == "cuda" else {}
    ranked: list[tuple[int, int, int, Item]] = []
    for number, cell in enumerate(chosen):
        names = _implementations(cell, settings)
        for late in sorted({compiled_late.get(name, 0) for name in names}):
            part = tuple(name for name in names if compiled_late.get(name, 0) == late)
            ranked.append((late, _tier(cell), number, Item(cell, part)))
    return [item for *_, item in sorted(ranked, key=lambda r: r[:3])]


def _implementations(cell: Cell, settings: Settings) -> list[str]:
    """Those asked for; unasked, all that tell something here in a reasonable time."""
    names = cases.make(cell, settings.device).names()
    if settings.implementations:
        names = [n for n in names if n in settings.implementations]
    elif settings.device.type == "cpu":
        names = [n for n in names if n != "triton"]  # interpreted
        if cell.op != "score_rows" and (cell.op, cell.variant) != ("decode_step", "immediate"):
            names = [n for n in names if n != "compile"]  # seconds each
    asked_for_peers_alone = settings.implementations and not set(settings.implementations) & set(OURS)
    return names if set(names) & set(OURS) or asked_for_peers_alone else []


def _tier(cell: Cell) -> int:
    """0: what the targets are about; then bfloat16; then other dtypes; then very many rows."""
    bf16 = cell.dtype == torch.bfloat16
    if bf16 and cell.op == "decode_step" and (cell.rows == 0 or (cell.variant == "immediate" and cell.rows <= 16)):
        return 0
    if bf16 and cell.op in ("flush", "score_rows") and cell.rows in (1, 256):
        return 0
    if cell.rows > 256:
        return 4
    dtype_error = cell.op == "score_rows" and cell.rows == cases.GATE_ROWS
    return 1 if bf16 or not cell.H or dtype_error else 2


def run(
    settings: Settings,
    report: Callable[[list[Row]], None] = lambda rows: None,
    items: Iterable[Item] | None = None,
) -> list[Row]:
    """All rows. ``report`` is given each cell's as it is done.

    A red gate (``status`` "red") or a failure of one of ours ("failed") leaves the times of its row empty; the run goes on.
    """
    began = time.perf_counter()
    ceilings = Ceilings.measure(settings)
    rows: list[Row] = []
    for item in items or plan(settings):
        if time.perf_counter() - began > settings.budget:
            break
        found = [row | {"device": settings.device.type} for row in measure(item, settings, ceilings)]
        rows += found
        report(found)
        if _device_is_lost(settings.device):
            break
    return rows


def _device_is_lost(device: torch.device) -> bool:
    """After a fault in a kernel every further call fails: what was measured before is all that there will be."""
    try:
        clocks.synchronizer(device)()
    except RuntimeError:
        return True
    return False


def red(rows: Iterable[Row]) -> list[Row]:
    """The rows of ours that failed."""
    return [row for row in rows if row["status"] != "ok" and row["implementation"] in OURS]


def measure(item: Item, settings: Settings, ceilings: Ceilings) -> Iterator[Row]:
    """The gate of every implementation, then the times of those that passed it."""
    case = cases.make(item.cell, settings.device)
    rows = {name: _gated(case, name) for name in item.implementations}
    passed = [name for name in rows if rows[name]["status"] == "ok"]
    times: dict[str, dict[str, Quantiles]] = {}
    try:
        times = _times(case, passed, settings)
    except Exception as error:  # noqa: BLE001 (out of memory, say: the other cells must still run)
        for name in passed:
            rows[name] |= _failure(error)
    for name, row in rows.items():
        yield row | _numbers(case, times.get(name, {}), ceilings)


@torch.no_grad()
def _times(case: Case, names: list[str], settings: Settings) -> dict[str, dict[str, Quantiles]]:
    weights = case.weights(0)
    subjects = {name: case.bind(name, weights, 0) for name in names}
    times = {name: {"host": q} for name, q in clocks.host(subjects, settings.seconds, settings.device).items()}
    if settings.device.type == "cuda":
        for name in filter(case.capturable, names):
            times[name] |= _on_device(case, name, weights, settings.seconds)
    return times


def _failure(error: Exception) -> Row:
    return {"status": "failed", "detail": f"{type(error).__name__}: {error}".splitlines()[0][:300]}


def _gated(case: Case, name: str) -> Row:
    cell = case.cell
    row: Row = dict.fromkeys(COLUMNS, "") | {
        "op": cell.op, "variant": cell.variant, "H": cell.H, "rows": cell.rows,
        "dtype": str(cell.dtype).removeprefix("torch."), "implementation": name,
    }  # fmt: skip
    try:
        gate = case.check(name)
    except Exception as error:  # noqa: BLE001 (of any kind)
        return row | _failure(error)
    row |= {"error": f"{gate.error:.3g}", "definition_error": f"{gate.definition:.3g}"}
    if isinstance(case, cases.ScoreRows) and name in OURS and cell.rows == cases.GATE_ROWS:  # one cell is enough
        row["dtype_error"] = f"{case.dtype_error():.3g}"
    if gate.passed:
        return row | {"status": "ok"}
    return row | {"status": "red", "detail": "" if gate.exact else "integers differ from the definition's"}


def _on_device(case: Case, name: str, weights: tuple[Tensor, ...], seconds: float) -> dict[str, Quantiles]:
    """Device time, cold and warm, and one replay from host to host."""
    size = sum(w.nbytes for w in weights)
    copies = 3 * torch.cuda.get_device_properties(case.device).L2_cache_size // max(1, size) + 2
    idle = case.cell.rows == 0  # always the same state, as in a decode loop
    n, calls = (1, IDLE_NODES) if idle else (clocks.GRAPH_CALLS, clocks.GRAPH_CALLS)
    bound = [case.bind(name, weights, seed) for seed in range(n)]
    warm = Graph(bound, clocks.rounds(bound[0], n, calls))
    found = {"warm": warm.time(seconds), "replay": Graph(bound[:1], 1).replay_to_end(30)}
    if case.flops and not idle:
        heads = [weights, *(tuple(w.clone() for w in weights) for _ in range(copies - 1))]
        total = -(-n // copies) * copies
        rotated = [case.bind(name, heads[i % copies], i) for i in range(total)]
        found["cold"] = Graph(rotated, 1).time(seconds)
    return found


def _numbers(case: Case, times: dict[str, Quantiles], ceilings: Ceilings) -> Row:
    """Times, and the rates that follow from the most telling of them."""
    numbers: Row = {"bytes": case.bytes, "flops": case.flops}
    for name, q in times.items():
        numbers |= {f"{name}_q20_us": _round(q.q20), f"{name}_q50_us": _round(q.q50), f"{name}_q80_us": _round(q.q80)}
    telling = next((times[name] for name in TIMES if name in times), None)
    if telling is None:
        return numbers
    gb, tflop = case.bytes / telling.q50 / 1e3, case.flops / telling.q50 / 1e6
    matmul = ceilings.matmul.get(case.row_dtype, math.nan)
    numbers |= {"samples": telling.n, "GB_per_s": _round(gb), "copy_GB_per_s": _round(ceilings.copy)}
    numbers["percent_of_copy"] = _round(100 * gb / ceilings.copy)
    if case.flops:
        numbers |= {"TFLOP_per_s": _round(tflop), "matmul_TFLOP_per_s": _round(matmul)}
        numbers["percent_of_matmul"] = _round(100 * tflop / matmul)
    return numbers


def _round(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


def speedups(row: Row, rows: Iterable[Row]) -> dict[str, float]:
    """How many times faster than each peer one of ours is, over the times that both have; nothing where either gate is red."""
    key = ("op", "variant", "H", "rows", "dtype", "device")
    if row["status"] != "ok" or row["implementation"] not in OURS:
        return {}
    found = {}
    for other in rows:
        same = all(str(other[k]) == str(row[k]) for k in key)
        if same and other["implementation"] not in OURS and other["status"] == "ok":
            both = [f"{time}_q50_us" for time in TIMES[:3] if row[f"{time}_q50_us"] and other[f"{time}_q50_us"]]
            if both:
                found[other["implementation"]] = float(other[both[0]]) / float(row[both[0]])
    return found


def line(row: Row, rows: Iterable[Row]) -> tuple[str, ...]:
    """A row for people: the cell, the implementation, its times, its rate and its speed-ups; or what is wrong with it."""
    cell = " ".join(str(row[k]) for k in ("op", "variant") if row[k]), *(str(row[k]) for k in ("H", "rows", "dtype"))
    if row["status"] != "ok":
        error = f"error {row['error']}, definition {row['definition_error']}" if row["error"] else ""
        return *cell, row["implementation"], f"{row['status'].upper()} {error} {row['detail']}".rstrip(), "", "", "", ""
    times = (f"{float(v):.3g}" if (v := row[f"{time}_q50_us"]) else "" for time in TIMES[:3])
    share = f"{row['percent_of_copy']:.3g} %" if row["percent_of_copy"] != "" else ""
    faster = ", ".join(f"{ratio:.2f}x {peer}" for peer, ratio in speedups(row, rows).items())
    return *cell, row["implementation"], *times, share, faster


HEADINGS = ("op", "H", "rows", "dtype", "by", "cold µs", "warm µs", "host µs", "of copy", "faster than")


def save(rows: list[Row], folder: Path, name: str, device: torch.device) -> Path:
    """``folder/name.csv``."""
    return record.write(name, [{column: row[column] for column in COLUMNS} for row in rows], folder, device)
