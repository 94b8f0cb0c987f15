"""Which strategy is worth what on long chains.

    python -m reflective.benchmarks.accuracy WORK [--stage NAME ...] [--family NAME ...] [--out benchmarks/results]

Stages, each of which goes on where it was interrupted: the policy; rollouts and heads; rules and the head that says whether an answer is ready; all
strategies on held-out questions; their seconds; tables and pictures. Families go side by side, a process each, until seconds are measured.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from reflective.benchmarks.record import RESULTS

from . import compare, learn, policy, rules, tables
from .families import FAMILIES

OF_A_FAMILY = {"heads": learn.learn, "rules": rules.calibrate, "exit": rules.learn_exit, "compare": compare.compare}
STAGES = ("policy", *OF_A_FAMILY, "seconds", "tables")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="directory for everything in between")
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=STAGES, help="only these")
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="only these; of all stages but the policy and the tables")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if "policy" in args.stage:
        _timed(args.work, "policy", "", lambda: policy.learn(args.work))
    if stages := [name for name in OF_A_FAMILY if name in args.stage]:
        threads = max(1, torch.get_num_threads() // len(args.family))
        with ProcessPoolExecutor(len(args.family), get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
            for done in [pool.submit(_family, args.work, family, stages) for family in args.family]:
                done.result()
    if "seconds" in args.stage:
        for family in args.family:
            _timed(args.work, "seconds", family, lambda family=family: compare.timed(args.work, [family]))
    if "tables" in args.stage:
        tables.make(args.work, args.out)


def _family(work: Path, family: str, stages: Sequence[str]) -> None:
    for name in stages:
        _timed(work, name, family, lambda name=name: OF_A_FAMILY[name](work, [family]))


def _timed(work: Path, stage: str, family: str, act: Callable[[], None]) -> None:
    """Do it, and add to what it has taken so far."""
    began = time.perf_counter()
    act()
    file, seconds = tables.seconds_file(work, stage, family), time.perf_counter() - began
    before = json.loads(file.read_text())["seconds"] if file.is_file() else 0
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"stage": stage, "family": family, "seconds": round(before + seconds, 1)}))
    print(f"{stage} {family}: {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
