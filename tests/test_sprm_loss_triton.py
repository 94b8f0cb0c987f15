"""The Triton kernels of sprm_loss against autograd of the definition in float64.

Run as a program, this file compiles them ahead of time and prints what the assembler used as JSON, see test_triton_aot.
"""

import pytest
import test_triton_aot as aot
import torch
from cases import NAN, assert_2x, assert_identical, random_head, random_rows

from reflective import kernels
from reflective.kernels.sprm_loss import dropout_mask

triton = pytest.importorskip("triton")
from reflective.kernels import sprm_loss_triton

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GRAD = 0.7, -2.0  # of the two sums
NAMES = "sums", "df", "dw1", "db1", "dw2", "db2"
HEADS = [(1536, torch.float32, torch.float32), (1536, torch.bfloat16, torch.bfloat16)]  # as in test_triton_aot
KERNELS = {
    "_activate", "_logits", "_terms", "_dlogits", "_weight_gradients", "_unit_gradients", "_feature_gradients"
}  # fmt: skip


@pytest.fixture(autouse=True)
def poisoned_memory():
    """``torch.empty`` returns NaN, True and huge integers: outputs and workspaces are read only where written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def bfloat16_rounds_to_nearest(monkeypatch):
    """As on a GPU; the interpreter cuts the low half off."""
    if not torch.cuda.is_available():
        from triton.runtime import interpreter

        builder, language = interpreter.InterpreterBuilder, triton.language
        cut = builder.cast_impl

        def cast_impl(self, src, dst_type):
            if src.dtype.scalar == language.float32 and dst_type.scalar == language.bfloat16:
                rounded = torch.from_numpy(src.data.copy()).bfloat16().view(torch.uint16).numpy()
                return interpreter.TensorHandle(rounded, dst_type.scalar)
            return cut(self, src, dst_type)

        for name in ("create_fp_trunc", "cast_impl"):
            monkeypatch.setattr(builder, name, cast_impl)


def rows_and_head(device, dtype, M, H, K, *, dropout=0.0, weighted=False):
    """``features, w1, b1, w2, b2`` and the other arguments of the op up to ``dropout``.

    No logit is so near 0 that rounding could turn a decision of the dynamic weights around. Rows of a trajectory are
    scattered, some trajectories have none and every third no verdict.
    """
    g = torch.Generator().manual_seed(M)
    N = M // 4 + 4
    outcome = torch.tensor([1.0, 0.0, NAN]).repeat(N)[:N].to(device)
    trajectory = torch.randint(N - 1, (M,), generator=g).to(device)
    weight = torch.rand(N, generator=g).to(device) if weighted else None
    seed = torch.tensor([2**62 + 12345], device=device) if dropout else None
    head = random_head(H, K, dtype, device=device)
    for attempt in range(100):
        features = random_rows(M, H, dtype=dtype, seed=attempt, device=device)
        f, w1, b1, w2, b2 = (t.double() for t in (features, *head))
        z = torch.nn.functional.linear(f, w1, b1).relu()
        if dropout:
            z = z * dropout_mask(z, seed, dropout) / (1 - dropout)
        if (torch.nn.functional.linear(z, w2, b2).abs() > 0.02).all():
            return (features, *head), (trajectory, outcome, weight, seed, dropout)
    raise AssertionError("every draw had a logit near 0")


def by_autograd(tensors, rest, feature_scale, dynamic, dtype):
    """``sums`` and the gradients for ``GRAD`` by autograd of the definition in ``dtype``; and ``counts``."""
    tensors = [t.to(dtype).requires_grad_() for t in tensors]
    sums, counts, *_ = kernels.sprm_loss(*tensors, *rest, feature_scale, dynamic)
    grads = torch.autograd.grad(sums, tensors, torch.tensor(GRAD, dtype=sums.dtype, device=sums.device))
    return (sums.detach(), *grads), counts


def by_definition(tensors, rest, feature_scale, dynamic, dtype):
    """``by_autograd``'s results, each stacked over eight orders of the columns: a loss is one number, whose rounding in one order
    may be next to none by luck, and twice that is no bound.
    """
    features, w1, *others = tensors
    results = []
    for seed in range(8):
        order = torch.randperm(w1.shape[1], generator=torch.Generator().manual_seed(seed)).to(w1.device)
        permuted = features[:, order], w1[:, order], *others
        (sums, df, dw1, *more), _ = by_autograd(permuted, rest, feature_scale, dynamic, dtype)
        results.append((sums, df[:, order.argsort()], dw1[:, order.argsort()], *more))
    return [torch.stack(ts) for ts in zip(*results, strict=True)]


def by_triton(tensors, rest, feature_scale, dynamic):
    sums, counts, dlogit, alive = sprm_loss_triton.sprm_loss(*tensors, *rest, feature_scale, dynamic)
    grad = torch.tensor(GRAD, device=sums.device)
    dropout = rest[-1]
    grads = sprm_loss_triton.sprm_loss_backward(grad, dlogit, alive, *tensors[:4], dropout, feature_scale, True)
    return (sums, *grads), counts


def assert_close(ours, definition, truth):
    for name, *three in zip(NAMES, ours, definition, truth, strict=True):
        size = three[2].abs().max() if three[2].any() else 1.0
        try:
            assert_2x(*(t.double() / size for t in three))
        except AssertionError as e:
            raise AssertionError(f"{name}: {e}") from e


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M, H, K", [(0, 64, 128), (1, 64, 128), (17, 72, 150), (150, 136, 264), (17, 1, 3)])
@pytest.mark.parametrize(
    "dropout, dynamic, weighted, scale", [(0.0, True, False, 1.0), (0.5, False, True, 0.1), (0.1, True, True, 1e-4)]
)
def test_gradients(device, dtype, M, H, K, dropout, dynamic, weighted, scale):
    tensors, rest = rows_and_head(device, dtype, M, H, K, dropout=dropout, weighted=weighted)
    if dtype == torch.float16:
        scale = min(1.0, scale * 1e3)  # float16 has no room for 1e-4 of a gradient
    ours, counts = by_triton(tensors, rest, scale, dynamic)
    definition = by_definition(tensors, rest, scale, dynamic, dtype)
    truth, expected = by_autograd(tensors, rest, scale, dynamic, torch.float64)
    assert [t.dtype for t in ours] == [torch.float32] + [dtype] * 5
    assert [t.shape for t in ours] == [t.shape for t in truth]
    assert_identical(counts.double(), expected)
    assert not M > 1 or all(t.any() for t in truth), "nothing was tested"
    assert_close(ours, definition, truth)


@pytest.mark.parametrize("dtype", DTYPES)
def test_registered_op(device, dtype):
    """What torch.ops answers with on this device, autograd included, is as good; unwanted gradients are not computed."""
    tensors, rest = rows_and_head(device, dtype, 40, 72, 150, dropout=0.5)
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    sums, counts, dlogit, alive = torch.ops.reflective.sprm_loss(*leaves, *rest, 0.5, True)
    assert not (counts.requires_grad or dlogit.requires_grad or alive.requires_grad)
    sums.backward(torch.tensor(GRAD, device=device))
    assert_close(
        (sums.detach(), *(t.grad for t in leaves)),
        by_definition(tensors, rest, 0.5, True, dtype),
        by_autograd(tensors, rest, 0.5, True, torch.float64)[0],
    )
    sums, _, dlogit, alive = sprm_loss_triton.sprm_loss(*tensors, *rest, 0.5, True)
    grad = torch.tensor(GRAD, device=device)
    df, *weights = sprm_loss_triton.sprm_loss_backward(grad, dlogit, alive, *tensors[:4], 0.5, 0.5, False)
    with_features = sprm_loss_triton.sprm_loss_backward(grad, dlogit, alive, *tensors[:4], 0.5, 0.5, True)
    assert df.shape == (0, 72)
    for a, b in zip(weights, with_features[1:], strict=True):
        assert_identical(a, b)


@pytest.mark.parametrize("outcome", [NAN, 1.0])
def test_nothing_judged_and_one_class(device, outcome):
    tensors, (trajectory, y, *rest) = rows_and_head(device, torch.float32, 17, 64, 128)
    rest = trajectory, torch.full_like(y, outcome), *rest
    ours, counts = by_triton(tensors, rest, 1.0, True)
    assert_identical(counts.double(), by_autograd(tensors, rest, 1.0, True, torch.float64)[1])
    if outcome == 1.0:
        assert counts[0] == 0 and counts[1] > 0 and ours[0][0] == 0 and ours[0][1] > 0
    else:
        assert not any(t.any() for t in (*ours, counts))


@pytest.mark.parametrize("logit", [-200.0, -25.0, -1e-3, 1e-3, 16.0, 200.0])
def test_extreme_logits(device, logit):
    """Full relative precision of the loss and its derivative at both ends."""
    head = [torch.zeros(16, 8), torch.zeros(16), torch.zeros(1, 16), torch.tensor([logit])]
    tensors = [t.to(device) for t in (torch.ones(2, 8), *head)]
    rest = torch.arange(2, device=device), torch.tensor([0.0, 1.0], device=device), None, None, 0.0, 1.0, False
    sums, _, dlogit, _ = sprm_loss_triton.sprm_loss(*tensors, *rest)
    x = torch.tensor([logit, -logit], dtype=torch.float64)
    rtol = (3 + abs(logit)) * 2**-23  # exp is allowed the rounding of its argument, whose weight is |logit|
    torch.testing.assert_close(sums.double().cpu(), torch.nn.functional.softplus(x), rtol=rtol, atol=2**-126)
    # sigmoid(x) - 1 cannot be closer to 0 than float32 is to 1.
    slope = torch.diag(x.sigmoid() * torch.tensor([1.0, -1.0]))
    torch.testing.assert_close(dlogit.double().cpu(), slope, rtol=rtol, atol=2**-24)


def test_a_logit_of_zero_agrees_with_nothing(device):
    tensors = [t.to(device) for t in (torch.ones(2, 8), torch.zeros(16, 8), torch.zeros(16), torch.zeros(1, 16))]
    rest = torch.arange(2, device=device), torch.tensor([0.0, 1.0], device=device), None, None, 0.0, 1.0, True
    sums, counts, dlogit, _ = sprm_loss_triton.sprm_loss(*tensors, torch.zeros(1, device=device), *rest)
    assert counts.tolist() == [0, 0, 2] and not sums.any() and not dlogit.any()


def test_not_finite_is_not_silent(device):
    tensors, rest = rows_and_head(device, torch.float32, 17, 64, 128)
    tensors[0][3, 5] = NAN
    (sums, _, dw1, *_), _ = by_triton(tensors, rest, 1.0, False)
    assert sums.isnan().any() and dw1.isnan().any()


def test_float16_gradients_below_its_range(device):
    """A gradient of 8e-7 a row, where float16 moves in steps of 6e-8: only the sums over rows are rounded to it."""
    M, H, K = 600, 8, 16
    head = [torch.full((K, H), 0.25), torch.zeros(K), torch.full((1, K), 0.5), torch.zeros(1)]
    tensors = [t.to(device, torch.float16) for t in (torch.ones(M, H), *head)]
    owner, y = torch.zeros(M, dtype=torch.int64, device=device), torch.zeros(1, device=device)
    _, _, dlogit, alive = sprm_loss_triton.sprm_loss(*tensors, owner, y, None, None, 0.0, 1.0, False)
    grad = torch.full((2,), 5e-4, device=device)
    _, dw1, *_ = sprm_loss_triton.sprm_loss_backward(grad, dlogit, alive, *tensors[:4], 0.0, 1.0, False)
    truth = 5e-4 * 0.5 * torch.tensor(16.0).sigmoid()
    assert (dw1.float() / truth.to(device) - 1).abs().max() < 2**-10


@pytest.mark.parametrize("dropout", [0.5, 0.1, 1 - 1e-9])
def test_same_dropout_as_the_definition(device, dropout):
    """Every unit active: what is left of ``alive`` is the mask, in every tile."""
    M, H, K = 150, 8, 300
    head = [torch.zeros(K, H), torch.ones(K), torch.ones(1, K), torch.zeros(1)]
    tensors = [t.to(device) for t in (torch.ones(M, H), *head)]
    owner, y = torch.arange(M, device=device), torch.zeros(M, device=device)
    for seed in (0, 2**63 - 1, 2**40 + 7):
        seed = torch.tensor([seed], device=device)
        alive = sprm_loss_triton.sprm_loss(*tensors, owner, y, None, seed, dropout, 1.0, False)[3]
        assert_identical(alive, dropout_mask(alive, seed, dropout))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits(device, dtype, monkeypatch):
    """The same run after run; those of a row's logit, hence of its gradient, in any batch."""
    if not torch.cuda.is_available():  # a GPU's dot sums every row alike, the interpreter's BLAS product does not
        from triton.runtime import interpreter

        def create_dot(self, a, b, d, *_):
            return interpreter.TensorHandle((a.data[:, :, None] * b.data).sum(1) + d.data, d.dtype.scalar)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    M = 140
    tensors, (_, _, *rest) = rows_and_head(device, dtype, M, 40, 80)
    owner, y = torch.arange(M, device=device), (torch.arange(M, device=device) % 2).float()
    first, again = (by_triton(tensors, (owner, y, *rest), 1.0, False)[0] for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert_identical(a, b)
    features, *head = tensors
    dlogit = sprm_loss_triton.sprm_loss(*tensors, owner, y, *rest, 1.0, False)[2]
    for some in (torch.tensor([77]), torch.tensor([139, 0, 63, 64])):
        some = some.to(device)
        alone = sprm_loss_triton.sprm_loss(features[some], *head, owner[: len(some)], y[some], *rest, 1.0, False)[2]
        assert_identical(alone, dlogit[:, some])


def launch_all(H: int, dtype: torch.dtype, w1_dtype: torch.dtype) -> None:
    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    M, N, K = 1000, 64, 2 * H
    tensors = empty(M, H), empty(K, H), empty(K), empty(1, K), empty(1)
    trajectory, outcome = empty(M, dtype=torch.int64), empty(N, dtype=torch.float32)
    seed = empty(1, dtype=torch.int64)
    sums, _, dlogit, alive = sprm_loss_triton.sprm_loss(*tensors, trajectory, outcome, outcome, seed, 0.5, 1.0, True)
    sprm_loss_triton.sprm_loss_backward(sums, dlogit, alive, *tensors[:4], 0.5, 1.0, True)


def test_compiled_ahead_of_time(tmp_path, pytestconfig):
    """For every target, without spills and within the shared memory of the smallest."""
    pytest.importorskip("triton.backends.nvidia")
    rows = aot.compile_for_every_target(__file__, tmp_path, pytestconfig)
    for capability in aot.CAPABILITIES:
        for head in HEADS:
            here = {r["kernel"] for r in rows if (r["capability"], r["head"]) == (capability, str(head))}
            assert here == KERNELS
    assert not [r for r in rows if r["STACK"] or r["LOCAL"] or r["shared"] > aot.SHARED_LIMIT]


if __name__ == "__main__":
    aot.launch_all, aot.HEADS = launch_all, HEADS
    aot.main()
