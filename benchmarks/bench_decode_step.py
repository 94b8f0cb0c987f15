"""A decode step of 8 sequences on CPU, immediate schedule: the compiled op, the PyTorch expression, and torch.compile.

    pytest benchmarks/bench_decode_step.py --benchmark-group-by=group

``rows`` sequences end a step; 0 is the idle step. Every entry first passes the correctness gate; nothing is asserted
about time. A whole run writes ``results/decode_step.csv``.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peers import Expression
from record import write
from torch import Tensor

from reflective import kernels, ops
from reflective.kernels import layout
from reflective.state import StreamState

pytestmark = pytest.mark.skipif(ops.WHY_NO_EXTENSION is not None, reason=str(ops.WHY_NO_EXTENSION))

B, V = 8, 49152
# One state; token 1 ends a step, every other token does not.
TOKEN_CLASS = (torch.arange(V) == 1).int()
TRANSITION = torch.tensor([[0], [layout.STEP]], dtype=torch.int32)

Step = Callable[[Tensor, Tensor], None]
Tallies = Callable[[], tuple[Tensor, Tensor]]  # n_steps [B], log_sum [B]


def random_head(H: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    shapes = ((2 * H, H), H**-0.5), ((2 * H,), 0.1), ((1, 2 * H), H**-0.5), ((1,), 0.1)
    return tuple((torch.randn(shape, generator=g) * scale).to(dtype) for shape, scale in shapes)


def stream(op: Callable[..., None], head: tuple[Tensor, ...]) -> tuple[Step, Tallies]:
    H, dtype = head[0].shape[1], head[0].dtype
    state = StreamState.allocate(B, H, buffer_rows=64, max_steps=256, dtype=dtype, device=torch.device("cpu"))
    tensors = state.tensors()

    def step(ids: Tensor, hidden: Tensor) -> None:
        op(ids, hidden, TOKEN_CLASS, TRANSITION, *head, *tensors, True, True)

    def tallies() -> tuple[Tensor, Tensor]:
        sums = state.tally.sum(1)
        return sums[:, layout.COUNT].long(), sums[:, layout.LOG_SUM]

    return step, tallies


def expression(head: tuple[Tensor, ...], compiled: bool) -> tuple[Step, Tallies]:
    step = Expression(B, TOKEN_CLASS, TRANSITION, head, compiled=compiled)
    return step, lambda: (step.n_steps, step.log_sum)


IMPLEMENTATIONS = {
    "reflective": lambda head: stream(torch.ops.reflective.decode_step, head),
    "expression": lambda head: expression(head, compiled=False),
    "compile": lambda head: expression(head, compiled=True),
}


def inputs(rows: int, H: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    ids = (torch.arange(B) < rows).long()[:, None]
    return ids, torch.randn(B, 1, H, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(step: Step, tallies: Tallies, head: tuple[Tensor, ...]) -> None:
    """Against the definition in float64, over steps of 0 to 8 rows: at most twice the error of this dtype's."""
    H, dtype = head[0].shape[1], head[0].dtype
    same_step, same_tallies = stream(kernels.decode_step, head)
    true_step, true_tallies = stream(kernels.decode_step, tuple(t.double() for t in head))
    for seed, rows in enumerate((0, 2, 8, 0, 1, 4, 8)):
        ids, hidden = inputs(rows, H, dtype, seed)
        step(ids, hidden)
        same_step(ids, hidden)
        true_step(ids, hidden.double())
    (n_steps, log_sum), (n_same, same), (n_true, truth) = tallies(), same_tallies(), true_tallies()
    assert torch.equal(n_steps, n_true)
    assert torch.equal(n_same, n_true)
    error, allowed = (log_sum - truth).abs().max(), (same - truth).abs().max()
    assert error <= 2 * allowed + 4 * torch.finfo(torch.float32).eps * truth.abs().max()


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
    head = random_head(H, dtype)
    step, tallies = IMPLEMENTATIONS[name](head)
    check(step, tallies, head)
    ids, hidden = inputs(rows, H, dtype)
    benchmark.group = f"decode_step {dtype} H={H} rows={rows}"
    benchmark.pedantic(step, args=(ids, hidden), rounds=1000, iterations=5, warmup_rounds=20)
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
            "w1_bytes": head[0].nbytes,
            "w1_GB_per_s": round(head[0].nbytes / q50 / 1e3, 2) if rows else "",
        }
    )
