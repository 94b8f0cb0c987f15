"""Every op of every backend, at small sizes, for compute-sanitizer to watch; a line a cell, as it ends.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python benchmarks/sanitize.py --backend cuda

A launch takes a thousand times longer there, so inputs are drawn, and right results computed, on the CPU. CUDA's ops come
first, of each op the most rows first. Exit code 1 if a result is wrong.
"""

import argparse
import time
from collections.abc import Iterator

import torch

from reflective.benchmarks import cases, suite
from reflective.benchmarks.cases import OURS, Case, Cell

ROWS = (40, 3, 0)  # past the edge of each tile, few, none
WIDTHS = (208,)
CPU = torch.device("cpu")


def cells(dtypes: tuple[torch.dtype, ...]) -> Iterator[Cell]:
    for rows in ROWS:
        yield from cases.cells(tuple(cases.CASES), WIDTHS, (rows,), dtypes)


def prepared(cell: Cell, device: torch.device) -> Case:
    """The case, its yardstick in place."""
    case, reference = cases.make(cell, device), cases.make(cell, CPU)
    case.drawn_on = CPU
    case.gate_rows = reference.gate_rows = 1  # a look at each result, no statistics
    case.yardstick = tuple({key: t.to(device) for key, t in part.items()} for part in reference.yardstick)
    return case


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", choices=OURS, action="append", help="only this one")
    parser.add_argument("--dtype", choices=suite.DTYPES, action="append", help="only this one")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtypes = tuple(suite.DTYPES[name] for name in args.dtype or suite.DTYPES)
    wrong = ran = 0
    for name in args.backend or OURS:
        for cell in cells(dtypes):
            began = time.perf_counter()
            case = prepared(cell, device)
            if case.ours(name) is None:
                continue
            gate = case.check(name)
            ran += 1
            # One row may be luckier in one precision than in another; memory errors are not that small.
            right = gate.exact and gate.error <= max(0.05, 10 * gate.definition)
            wrong += not right
            verdict = "right" if right else f"WRONG: {gate}"
            print(f"{name} {cell}: {verdict}, {time.perf_counter() - began:.1f} s", flush=True)
    print(f"{ran} cells ran, {wrong} wrong", flush=True)
    raise SystemExit(int(wrong > 0 or ran == 0))


if __name__ == "__main__":
    main()
