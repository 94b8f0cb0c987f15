"""Where every recorded number comes from: results as CSV with hardware, versions and commit in each row."""

import csv
import functools
import importlib.metadata
import io
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import reflective
from reflective.utils import outputs

RESULTS = Path(__file__).parent / "results"


@functools.cache
def environment(device: torch.device | str = "cpu") -> dict[str, str]:
    """Hardware, versions and commit of this run; with a CUDA ``device`` the GPU's too."""
    found = {
        "cpu": _cpu(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "reflective": reflective.__version__,
        "backend": reflective.backends()["cpu"].detail,
        "commit": _commit(),
    }
    if torch.device(device).type != "cuda":
        return found
    gpu = torch.cuda.get_device_properties(device)
    backends = reflective.backends()
    return found | {
        "backend": "; ".join(f"{name}: {backends[name].detail}" for name in ("cuda", "triton")),
        "gpu": gpu.name,
        "sm": f"{gpu.multi_processor_count} x sm_{gpu.major}{gpu.minor}",
        "l2_MiB": str(gpu.L2_cache_size >> 20),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        "cuda": str(torch.version.cuda),
        "triton": version("triton"),
    }


def write(name: str, rows: list[dict[str, Any]], folder: Path = RESULTS, device: torch.device | str = "cpu") -> Path:
    """Write ``folder/name.csv``: the rows, each with the environment; one that was recorded before keeps its own."""
    path, text = outputs.folder(folder, "out") / f"{name}.csv", io.StringIO(newline="")
    writer = csv.DictWriter(text, dict.fromkeys([*rows[0], *(env := environment(device))]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({**env, **row} for row in rows)
    outputs.write_text(path, text.getvalue(), "out")
    return path


def read(name: str, folder: Path = RESULTS) -> list[dict[str, str]]:
    """The rows of ``folder/name.csv``; none if there is no such file."""
    path = folder / f"{name}.csv"
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def add_seconds(folder: Path, stage: str, seconds: float) -> None:
    """Add to what ``stage`` of a recipe has taken so far, in ``folder/seconds.json``."""
    taken = seconds_of(folder)
    taken[stage] = taken.get(stage, 0) + seconds
    (folder / "seconds.json").write_text(json.dumps(taken))


def seconds_of(folder: Path) -> dict[str, float]:
    """By stage, what ``add_seconds`` has kept there."""
    file = folder / "seconds.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def _commit() -> str:
    """Of the checkout this lies in; a copy of one without its history is told by ``REFLECTIVE_COMMIT``."""
    root = Path(__file__).parents[1]
    found = _output("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=10")
    in_checkout = (root / "pyproject.toml").exists()
    return (found if in_checkout else "") or os.environ.get("REFLECTIVE_COMMIT", "unknown")


def _output(*command: str) -> str:
    """What ``command`` prints; nothing if it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return f"{found.get('model name')} (family {found.get('cpu family')}, model {found.get('model')})"
