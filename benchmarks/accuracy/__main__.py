"""Which strategy is worth what on long chains.

    python -m reflective.benchmarks.accuracy WORK [--stage NAME ...] [--family NAME ...] [--out benchmarks/results]

Stages, each of which goes on where it was interrupted: the policy; rollouts and heads; rules and the head that says whether an answer is ready; all
strategies on held-out questions; their seconds; tables and pictures. Families go side by side, a process with its share of the threads each.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from reflective.benchmarks.record import RESULTS

from . import policy, tables
from .families import FAMILIES
from .stages import OF_A_FAMILY, of_a_family, timed

STAGES = ("policy", *OF_A_FAMILY, "tables")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="directory for everything in between")
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=STAGES, help="only these")
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="only these; of all stages but the policy and the tables")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if "policy" in args.stage:
        timed(args.work, "policy", "", lambda: policy.learn(args.work))
    if stages := [name for name in OF_A_FAMILY if name in args.stage]:
        threads = max(1, torch.get_num_threads() // len(args.family))
        with ProcessPoolExecutor(len(args.family), get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
            for done in [pool.submit(of_a_family, args.work, family, stages) for family in args.family]:
                done.result()
    if "tables" in args.stage:
        tables.make(args.work, args.out)


if __name__ == "__main__":
    main()
