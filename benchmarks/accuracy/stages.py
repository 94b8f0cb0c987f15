"""What is done with one family after another's, or beside it; and what that takes."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from reflective.benchmarks.record import add_seconds

from . import compare, learn, rules

OF_A_FAMILY = {
    "heads": learn.learn, "rules": rules.calibrate, "exit": rules.learn_exit, "compare": compare.compare, "seconds": compare.timed,
}  # fmt: skip


def of_a_family(work: Path, family: str, stages: Sequence[str]) -> None:
    for name in stages:
        timed(work, name, family, lambda name=name: OF_A_FAMILY[name](work, family))


def timed(work: Path, stage: str, family: str, act: Callable[[], None]) -> None:
    """Do it, and add to what it has taken so far; with no family it is done for both."""
    began = time.perf_counter()
    act()
    seconds = time.perf_counter() - began
    add_seconds(work / family, stage, seconds)
    print(f"{stage} {family}: {seconds:.0f} s", flush=True)
