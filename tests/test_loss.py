"""sprm_loss against the formula written out step by step."""

import math

import pytest
import torch

import reflective as rf


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
