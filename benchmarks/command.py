"""``reflective bench``: runs the suite on this machine, keeps its files, shows its table."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from reflective.benchmarks import cases, plots, suite
from reflective.benchmarks.suite import DTYPES, Row, Settings
from reflective.utils.outputs import folder

SAVE_EVERY = 10  # seconds: what was measured survives an end by force


@dataclass
class Results:
    rows: list[Row]
    files: list[Path]

    @property
    def red(self) -> list[Row]:
        return suite.red(self.rows)

    def show(self, console: Console) -> None:
        table = Table(*suite.HEADINGS, box=None, pad_edge=False)
        for row in self.rows:
            if row["implementation"] in cases.OURS and row["status"] == "ok":
                table.add_row(*suite.line(row, self.rows))
        console.print(table)
        for row in self.rows:
            if row["status"] != "ok":
                console.print(" ".join(filter(None, suite.line(row, self.rows))), style="bold red", highlight=False)
        console.print("written: " + ", ".join(map(str, self.files)), soft_wrap=True, highlight=False)


def run(device: str | None, quick: bool, given: dict[str, Any], out: Path, bars: Progress) -> Results:
    """Measure, and write ``gpu_suite`` or ``suite_cpu`` into ``out``: CSV, and plots where matplotlib is installed.

    Raises:
        ValueError: an unknown device, op, dtype or implementation, or nothing to measure.
    """
    here = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    if device is not None and device not in here:
        raise ValueError(f"device={device!r}; this machine has {' and '.join(here)}")
    where = torch.device(device or here[0])
    known = {"ops": tuple(cases.CASES), "dtypes": tuple(DTYPES), "implementations": cases.OURS + cases.PEERS}
    for name, values in known.items():
        if unknown := set(given.get(name, ())) - set(values):
            raise ValueError(f"{name}: {', '.join(sorted(unknown))}; expected some of {', '.join(values)}")
    settings = (Settings.quick if quick else Settings.default)(where, **given)
    items = suite.plan(settings)
    if not items:
        raise ValueError("nothing to measure: no implementation asked for can run these cells here")
    out = folder(out, "out")  # before minutes of measuring
    name = "gpu_suite" if where.type == "cuda" else "suite_cpu"
    rows: list[Row] = []
    saved = time.monotonic()
    task = bars.add_task("cells", total=len(items))

    def report(found: list[Row]) -> None:
        nonlocal saved
        rows.extend(found)
        bars.update(task, advance=1, description=str(found[0]["op"]))
        if time.monotonic() - saved > SAVE_EVERY:
            suite.save(rows, out, name, where)
            saved = time.monotonic()

    suite.run(settings, report, items)
    if not rows:
        raise ValueError(f"budget={settings.budget} s was over before the first cell")
    files = [suite.save(rows, out, name, where)]
    try:
        files += plots.draw(rows, out, name, "bfloat16" if "bfloat16" in settings.dtypes else settings.dtypes[0])
    except ImportError as error:
        bars.console.print(str(error))
    return Results(rows, files)
