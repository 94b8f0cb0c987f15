"""Which strategy is worth what on long chains.

    python -m reflective.benchmarks.accuracy WORK [--stage NAME ...] [--family NAME ...] [--out benchmarks/results]

Stages, each of which goes on where it was interrupted: the policy; rollouts and heads; rules and the head that says whether an answer is ready; all
strategies on held-out questions; their seconds; tables and pictures.
"""

import argparse
import time
from pathlib import Path

from reflective.benchmarks.record import RESULTS

from . import compare, learn, policy, rules, tables
from .families import FAMILIES

STAGES = {
    "heads": learn.learn, "rules": rules.calibrate, "exit": rules.learn_exit, "compare": compare.compare, "seconds": compare.timed,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="directory for everything in between")
    parser.add_argument("--stage", nargs="+", choices=["policy", *STAGES, "tables"], help="only these")
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="only these; of all stages but the policy and the tables")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for name in args.stage or ("policy", *STAGES, "tables"):
        began = time.perf_counter()
        if name == "policy":
            policy.learn(args.work)
        elif name == "tables":
            tables.make(args.work, args.out)
        else:
            STAGES[name](args.work, args.family)
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
