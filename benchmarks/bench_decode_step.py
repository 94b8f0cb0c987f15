"""A decode step of 8 sequences on CPU, immediate schedule: the compiled op, the PyTorch expression, and torch.compile.

    pytest benchmarks/bench_decode_step.py --benchmark-group-by=group

``rows`` sequences end a step; 0 is the idle step. Every entry first passes the suite's correctness gate; nothing is asserted
about time. A whole run writes ``results/decode_step.csv``.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from reflective.benchmarks import cases
from reflective.benchmarks.cases import Cell
from reflective.benchmarks.record import write
from reflective.scoring import ops

pytestmark = pytest.mark.skipif(ops.WHY_NO_EXTENSION is not None, reason=str(ops.WHY_NO_EXTENSION))

CPU = torch.device("cpu")
IMPLEMENTATIONS = {"reflective": "cpu", "expression": "expression", "compile": "compile"}


@pytest.fixture(scope="module")
def results() -> Iterator[list[dict[str, Any]]]:
    """Rows of the CSV; written when all entries have run."""
    rows: list[dict[str, Any]] = []
    yield rows
    if len(rows) == 2 * 2 * 5 * len(IMPLEMENTATIONS):
        write("decode_step", rows)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("H", [576, 1536])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_decode_step(benchmark, results, dtype: torch.dtype, H: int, rows: int, name: str) -> None:
    case = cases.make(Cell("decode_step", "immediate", H, rows, dtype), CPU)
    gate = case.check(IMPLEMENTATIONS[name])
    assert gate.passed, gate
    weights = case.weights(0)
    subject = case.bind(IMPLEMENTATIONS[name], weights, 0)
    benchmark.group = f"decode_step {dtype} H={H} rows={rows}"
    with torch.no_grad():
        benchmark.pedantic(subject.call, rounds=1000, iterations=5, warmup_rounds=20)
    if benchmark.stats is None:  # --benchmark-disable
        return
    microseconds = 1e6 * torch.tensor(benchmark.stats.stats.data)
    q20, q50, q80 = microseconds.quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    results.append(
        {
            "implementation": name,
            "dtype": str(dtype).removeprefix("torch."),
            "H": H,
            "rows": rows,
            "q20_us": round(q20, 2),
            "q50_us": round(q50, 2),
            "q80_us": round(q80, 2),
            "w1_bytes": weights[0].nbytes,
            "w1_GB_per_s": round(weights[0].nbytes / q50 / 1e3, 2) if rows else "",
        }
    )
