"""sprm_loss against the formula written out step by step; sprm_loss_rows against sprm_loss of the head's logits."""

import math

import pytest
import torch

import reflective as rf
from reflective.kernels.sprm_loss import dropout_mask
from reflective.scoring import loss as losses
from reflective.scoring.loss import sprm_loss_rows

NAN = float("nan")


def written_out(logits, owner, outcomes, dynamic, balance):
    def kept(i):
        y = outcomes[owner[i]]
        return not math.isnan(y) and (not dynamic or (logits[i] > 0) == (y == 1) and logits[i] != 0)

    up = 1 + sum(kept(i) and outcomes[owner[i]] == 1 for i in range(len(logits)))
    down = 1 + sum(kept(i) and outcomes[owner[i]] == 0 for i in range(len(logits)))
    means = []
    for t, y in enumerate(outcomes):
        steps = [i for i in range(len(logits)) if owner[i] == t and not math.isnan(y)]
        if steps:
            balanced = (1.5 * down if y else up) / (up + down) if balance else 1.0
            bce = [-math.log(1 / (1 + math.exp(-logits[i] if y else logits[i]))) for i in steps]
            means.append(sum(balanced * kept(i) * b for i, b in zip(steps, bce, strict=True)) / len(steps))
    return sum(means) / len(means) if means else 0.0


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("balance", [False, True])
def test_formula(dynamic, balance):
    torch.manual_seed(0)
    outcomes = torch.tensor([1.0, 0.0, float("nan"), 1.0, 0.0, 0.0])  # trajectory 3 has no step
    owner = torch.tensor([0, 0, 0, 1, 1, 2, 2, 4, 5, 5, 5, 5])
    logits = (2 * torch.randn(12)).requires_grad_()
    with torch.no_grad():
        logits[3] = 0
    loss = rf.sprm_loss(logits, owner, outcomes, dynamic=dynamic, class_balance=balance)
    expected = written_out(logits.tolist(), owner.tolist(), outcomes.tolist(), dynamic, balance)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert (logits.grad[5:7] == 0).all(), "no verdict, no gradient"
    if dynamic:
        wrong = (logits > 0) != (outcomes[owner] == 1)
        assert (logits.grad[wrong] == 0).all(), "the steps on which the head disagrees are dropped"


def test_nothing_to_learn_from_is_zero():
    logits = torch.randn(3, requires_grad=True)
    loss = rf.sprm_loss(logits, torch.tensor([0, 0, 1]), torch.full((2,), float("nan")))
    loss.backward()
    assert float(loss) == 0 and (logits.grad == 0).all()
    assert float(rf.sprm_loss(torch.empty(0), torch.empty(0, dtype=torch.long), torch.ones(2))) == 0


def test_trajectory_weight_scales_each_trajectory():
    logits, owner, y = torch.tensor([0.3, -0.2, 1.0]), torch.tensor([0, 1, 1]), torch.tensor([1.0, 0.0])
    flags = {"dynamic": False, "class_balance": False}
    first, second = (
        rf.sprm_loss(logits, owner, y, trajectory_weight=torch.tensor(w), **flags) for w in ([1.0, 0.0], [0.0, 1.0])
    )
    both = rf.sprm_loss(logits, owner, y, trajectory_weight=torch.tensor([2.0, 3.0]), **flags)
    assert float(both) == pytest.approx(2 * float(first) + 3 * float(second))


def rows(M=40, H=24, K=40, N=9, dtype=torch.float64, seed=0):
    """A head in training mode, features, owners and outcomes."""
    torch.manual_seed(seed)
    head = rf.SPRM(H, K, dtype=dtype)
    torch.nn.init.normal_(head[3].weight)
    features = torch.randn(M, H, dtype=dtype, requires_grad=True)
    return head, features, torch.randint(N - 1, (M,)), torch.tensor([1.0, 0.0, NAN]).repeat(N)[:N]


@pytest.fixture(params=["plain", "fused"])
def either(request, monkeypatch):
    """sprm_loss_rows as on a CPU, and as on a GPU (the op's definition)."""
    monkeypatch.setattr(losses, "_plain", getattr(losses, f"_{request.param}"))


def gradients(loss, head, features):
    return torch.autograd.grad(loss, [features, *head.parameters()])


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_rows(dynamic, balance, weighted, either):
    head, features, owner, y = rows()
    flags = {
        "dynamic": dynamic,
        "class_balance": balance,
        "trajectory_weight": torch.rand(len(y)) if weighted else None,
    }
    head.eval()
    loss = sprm_loss_rows(head, features, owner, y, **flags)
    expected = rf.sprm_loss(head(features).squeeze(-1), owner, y, **flags)
    torch.testing.assert_close(loss, expected, check_dtype=False)
    ours, theirs = gradients(loss, head, features), gradients(expected, head, features)
    assert all(g.any() for g in ours)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)  # sprm_loss is float32


@pytest.mark.parametrize("p", [0.5, 0.1])
def test_dropout(p, monkeypatch):
    """Autograd through a head whose Dropout is the mask that the op draws."""
    monkeypatch.setattr(losses, "_plain", losses._fused)
    head, features, owner, y = rows()
    head.train()[2].p = p
    torch.manual_seed(3)
    loss = sprm_loss_rows(head, features, owner, y)
    torch.manual_seed(3)
    mask = dropout_mask(torch.empty(40, 40), torch.randint(2**63 - 1, (1,)), p)
    assert abs(mask.double().mean() - (1 - p)) < 0.05
    scale = 2**16 / (2**16 - round(p * 2**16))
    logits = head[3](head[0](features).relu() * mask * scale).squeeze(-1)
    expected = rf.sprm_loss(logits, owner, y)
    torch.testing.assert_close(loss, expected, check_dtype=False)
    torch.testing.assert_close(
        gradients(loss, head, features), gradients(expected, head, features), rtol=1e-5, atol=1e-7
    )
    assert sprm_loss_rows(head, features, owner, y) != loss, "another step, another mask"


def test_dropout_on_a_cpu_is_torchs():
    head, features, owner, y = rows()
    torch.manual_seed(3)
    loss = sprm_loss_rows(head.train(), features, owner, y)
    torch.manual_seed(3)
    expected = rf.sprm_loss(head(features).squeeze(-1), owner, y)
    torch.testing.assert_close(loss, expected, check_dtype=False)
    assert sprm_loss_rows(head, features, owner, y) != loss, "another step, another mask"


def test_dropout_is_philox():
    """The known answer of Philox-4x32-10 for counter 0 and key 0 (Random123, kat_vectors), 16 bits a unit, low half first."""
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    z, seed = torch.empty(1, 8), torch.zeros(1, dtype=torch.int64)
    for unit, half in enumerate(halves):
        assert dropout_mask(z, seed, half / 2**16)[0, unit]
        assert not dropout_mask(z, seed, (half + 1) / 2**16)[0, unit]


def test_dropout_of_neighbours_is_independent():
    """Rows, units and seeds: each pair agrees as often as chance would have it."""
    z = torch.empty(256, 512)
    mask = dropout_mask(z, torch.tensor([5]), 0.5)
    for a, b in (
        (mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1]), (mask[:, 8:], mask[:, :-8]),
        (mask, dropout_mask(z, torch.tensor([6]), 0.5)), (mask, dropout_mask(z, torch.tensor([5 + 2**32]), 0.5)),
    ):  # fmt: skip
        assert abs((a == b).double().mean() - 0.5) < 0.01


def test_feature_gradient_scale(either):
    """As the published ``f * s + f.detach() * (1 - s)``, with the head's own gradients untouched."""
    head, f, owner, y = rows()
    head.eval()
    published = sprm_loss_rows(head, f * 1e-4 + f.detach() * (1 - 1e-4), owner, y)
    ours = sprm_loss_rows(head, f, owner, y, feature_gradient_scale=1e-4)
    torch.testing.assert_close(gradients(ours, head, f), gradients(published, head, f))
    assert sprm_loss_rows(head, f.detach(), owner, y, feature_gradient_scale=1e-4) == ours


@pytest.mark.parametrize("balance", [False, True])
def test_shares_of_two_processes_add_up(balance, either):
    head, f, owner, y = rows()
    head.eval()
    parts = [owner % 2 == side for side in (0, 1)]
    counts = []
    for part in parts:
        sprm_loss_rows(head, f[part], owner[part], y, all_reduce=counts.append)
    assert all(len(c) == 3 and c[2] > 0 for c in counts)
    shares = [
        sprm_loss_rows(head, f[p], owner[p], y, class_balance=balance, all_reduce=lambda c: c.copy_(sum(counts)))
        for p in parts
    ]
    whole = sprm_loss_rows(head, f, owner, y, class_balance=balance)
    torch.testing.assert_close(sum(shares), whole)
    torch.testing.assert_close(gradients(sum(shares), head, f), gradients(whole, head, f))


def test_rows_and_head_of_other_dtypes(either):
    head, f, owner, y = rows(dtype=torch.float32)
    f = f.detach().bfloat16().requires_grad_()
    head.eval()
    expected = sprm_loss_rows(head, f.float(), owner, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = sprm_loss_rows(head, f, owner.int().long(), y.double())
    assert loss == expected, "computed in the head's dtype"
    loss.backward()
    assert f.grad.dtype == torch.bfloat16 and head[0].weight.grad.dtype == torch.float32


def test_no_rows(either):
    head, f, owner, y = rows(M=0)
    loss = sprm_loss_rows(head, f, owner, y)
    assert loss == 0 and not any(g.any() for g in gradients(loss, head, f))
    shared = sprm_loss_rows(head, f, owner, y, feature_gradient_scale=0.1, all_reduce=lambda counts: counts.add_(1))
    assert shared == 0 and not any(g.any() for g in gradients(shared, head, f))


def test_refused(either):
    head, f, owner, y = rows()
    with pytest.raises(ValueError, match=r"features: shape \(40, 23\), expected \[M, 24\]"):
        sprm_loss_rows(head, f[:, 1:], owner, y)
    head[2].p = 1.0
    with pytest.raises(ValueError, match="dropout 1.0"):
        sprm_loss_rows(head.train(), f, owner, y)


def op_arguments(device, *, dropout, weighted):
    head, f, owner, y = rows(dtype=torch.float32)
    weight, seed = (torch.rand(9) if weighted else None), (torch.tensor([7]) if dropout else None)
    tensors = f, head[0].weight, head[0].bias, head[3].weight, head[3].bias, owner, y, weight, seed
    moved = [t if t is None else t.detach().to(device).requires_grad_(t.requires_grad) for t in tensors]
    return *moved, dropout, 0.1, True


@pytest.mark.parametrize("dropout, weighted", [(0.0, False), (0.5, True)])
def test_opcheck(device, dropout, weighted):
    op, arguments = torch.ops.reflective, op_arguments(device, dropout=dropout, weighted=weighted)
    arguments[0].requires_grad_(weighted)  # with and without the gradient of the features
    torch.library.opcheck(op.sprm_loss.default, arguments)
    with torch.no_grad():
        sums, _, dlogit, alive = op.sprm_loss(*arguments)
        for features_too in (False, True):
            backward = sums, dlogit, alive, *arguments[:4], dropout, 0.1, features_too
            torch.library.opcheck(op.sprm_loss_backward.default, backward)


def test_compiled_without_a_graph_break(device, either):
    head, f, owner, y = rows(dtype=torch.float32)
    head, f, owner, y = head.train().to(device), f.detach().to(device).requires_grad_(), owner.to(device), y.to(device)

    def loss(features, owner, y):
        return sprm_loss_rows(head, features, owner, y, feature_gradient_scale=0.1)

    results = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(5)
        value = run(f, owner, y)
        results.append((value, *gradients(value, head, f)))
    torch.testing.assert_close(*results)
