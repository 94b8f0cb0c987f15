"""Every op of every backend once, at small sizes, for compute-sanitizer to watch.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python benchmarks/sanitize.py

Exit code 1 if a result is wrong.
"""

import argparse

import torch

from reflective.benchmarks import cases, suite
from reflective.benchmarks.cases import OURS

ROWS = (0, 1, 3, 9, 40)  # one row, few, and past the edge of each tile
WIDTHS = (208,)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", choices=OURS, action="append", help="only this one")
    parser.add_argument("--dtype", choices=suite.DTYPES, action="append", help="only this one")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtypes = tuple(suite.DTYPES[name] for name in args.dtype or suite.DTYPES)
    wrong = ran = 0
    for cell in cases.cells(tuple(cases.CASES), WIDTHS, ROWS, dtypes):
        case = cases.make(cell, device)
        case.gate_rows = 1  # a look at each result, no statistics: every call costs a second here
        for name in args.backend or OURS:
            if case.ours(name) is None:
                continue
            gate = case.check(name)
            ran += 1
            # One row may be luckier in one precision than in another; memory errors are not that small.
            if not gate.exact or not gate.error <= max(0.05, 10 * gate.definition):
                wrong += 1
                print(f"{name} {cell}: {gate}", flush=True)
    print(f"{ran} cells ran, {wrong} wrong", flush=True)
    raise SystemExit(wrong > 0 or ran == 0)


if __name__ == "__main__":
    main()
