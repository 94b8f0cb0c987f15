"""Where every recorded number comes from: results as CSV with hardware, versions and commit in each row."""

import csv
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers

import reflective

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, str]:
    """Hardware, versions and commit of this run."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=10"],
        capture_output=True,
        text=True,
        cwd=RESULTS,
        check=False,
    )
    return {
        "cpu": _cpu(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "reflective": reflective.__version__,
        "backend": reflective.backends()["cpu"].detail,
        "commit": git.stdout.strip(),
    }


def write(name: str, rows: list[dict[str, Any]]) -> Path:
    """Write ``results/name.csv``: the rows, each with the environment."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *(env := environment())], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **env} for row in rows)
    return path


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return f"{found.get('model name')} (family {found.get('cpu family')}, model {found.get('model')})"
