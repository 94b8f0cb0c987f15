"""What is done with one family after another's, or beside it; and what that takes."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from . import compare, learn, rules, tables

OF_A_FAMILY = {
    "heads": learn.learn, "rules": rules.calibrate, "exit": rules.learn_exit, "compare": compare.compare, "seconds": compare.timed,
}  # fmt: skip


def of_a_family(work: Path, family: str, stages: Sequence[str]) -> None:
    for name in stages:
        timed(work, name, family, lambda name=name: OF_A_FAMILY[name](work, [family]))


def timed(work: Path, stage: str, family: str, act: Callable[[], None]) -> None:
    """Do it, and add to what it has taken so far."""
    began = time.perf_counter()
    act()
    file, seconds = tables.seconds_file(work, stage, family), time.perf_counter() - began
    before = json.loads(file.read_text())["seconds"] if file.is_file() else 0
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"stage": stage, "family": family, "seconds": round(before + seconds, 1)}))
    print(f"{stage} {family}: {seconds:.0f} s", flush=True)
