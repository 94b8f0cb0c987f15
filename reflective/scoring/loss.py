"""The self-supervised process reward loss: step scores learnt from outcomes alone."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels.sprm_loss import loss_terms
from .heads import Head
from .ops import op
from .sprm import SPRM


def sprm_loss(
    step_logits: Tensor,
    trajectory_index: Tensor,
    outcomes: Tensor,
    *,
    dynamic: bool = True,
    class_balance: bool = True,
    trajectory_weight: Tensor | None = None,
) -> Tensor:
    """``mean over trajectories of mean_i w_i * BCE(sigmoid(logit_i), y)`` over the steps ``i`` of each trajectory.

    ``w_i`` is 1 where the head agrees with the outcome (score > 0.5 and y = 1, or score < 0.5 and y = 0), else 0
    (``dynamic``; source: arXiv 2507.01951, section 3.3). ``class_balance`` multiplies the steps kept by
    ``1.5 n-/(n+ + n-)`` where y = 1 and ``n+/(n+ + n-)`` where y = 0, counts started at 1 (the published training code).

    Args:
        step_logits: [M] logits of the head, any float dtype; computed in float32.
        trajectory_index: [M] int64, which of the N trajectories each step belongs to.
        outcomes: [N] float, 1 correct, 0 incorrect, NaN without a verdict (its steps carry no loss).
        dynamic: drop the steps on which the head disagrees with the outcome. Needs a warm start: from a random head it
            locks in noise.
        class_balance: weigh the two outcomes against each other.
        trajectory_weight: [N] float, a further weight for all steps of a trajectory.

    Returns:
        The loss, float32 scalar; 0 where no trajectory has both a verdict and a step.
    """
    logits, weight = step_logits.float(), _beside(step_logits, trajectory_weight)
    sums, counts, *_ = loss_terms(logits, trajectory_index, _beside(logits, outcomes), weight, dynamic)
    return _mean(sums, counts, class_balance)


def sprm_loss_rows(
    head: SPRM,
    features: Tensor,
    trajectory_index: Tensor,
    outcomes: Tensor,
    *,
    dynamic: bool = True,
    class_balance: bool = True,
    trajectory_weight: Tensor | None = None,
    feature_gradient_scale: float = 1.0,
    all_reduce: Callable[[Tensor], object] | None = None,
) -> Tensor:
    """``sprm_loss(head(features).squeeze(-1), ...)``; on a GPU one op, its forward and its backward fused.

    The head's own ``Dropout`` applies while ``head.training``, drawn from torch's generator of the device. Autocast has no
    say: the head computes in its own dtype.

    Args:
        features: [M, H] hidden states of the steps, cast to the head's dtype. Without any (M = 0) the loss is 0, and every
            weight of the head still has a gradient.
        feature_gradient_scale: factor on the gradient of ``features`` (the published training code uses 1e-4 where the
            policy trains with the head; it costs nothing where ``features`` requires none).
        all_reduce: adds up, in place, the float32 tensor [3] it is given over all processes, for instance
            ``torch.distributed.all_reduce``. The loss is then this process's share of the global batch's: gradients are to
            be summed over the processes, not averaged.

    Raises:
        ValueError: the features are not the head's size, or the head drops every unit; see ``check_trainable``.
    """
    check_trainable(head)
    dropout = float(head[2].p) if head.training else 0.0
    if features.shape[1:] != head[0].weight.shape[1:]:
        raise ValueError(f"features: shape {tuple(features.shape)}, expected [M, {head.hidden_size}]")
    if not 0 <= dropout < 1:
        raise ValueError(f"head: dropout {dropout} leaves no unit to learn with; expected at least 0 and below 1")
    # On a CPU the op's definition would spend most of its time on dropout: 100 integer operations for eight units.
    terms = _plain if features.device.type == "cpu" else _fused
    weight = _beside(features, trajectory_weight)
    with torch.autocast(features.device.type, enabled=False):
        sums, counts = terms(
            head, features.to(head.dtype), feature_gradient_scale, trajectory_index, _beside(features, outcomes), weight,
            dynamic,
        )  # fmt: skip
    if all_reduce is not None:
        all_reduce(counts)
    return _mean(sums, counts, class_balance)


def check_trainable(head: Head, name: str = "head") -> None:
    """Raise ValueError for a head that the op ``sprm_loss`` does not know: no MLP, another activation than ReLU, no biases, no sigmoid."""
    if not isinstance(head, SPRM) or head.activation != "relu" or head[0].bias is None or not head.sigmoid:
        raise ValueError(
            f"{name}: a {head.form} head ({type(head).__name__}, {head.activation}) scores, but is not trained here; trained are MLPs with ReLU "
            "and biases whose score is a sigmoid, so begin with a new head"
        )


def _fused(head: SPRM, features: Tensor, scale: float, *labels: Any) -> tuple[Tensor, Tensor]:
    """``sums`` [2] and ``counts`` [3] of ``torch.ops.reflective.sprm_loss``; labels: as for ``loss_terms``."""
    *labels, dynamic = labels
    dropout = float(head[2].p) if head.training else 0.0
    seed = torch.randint(2**63 - 1, (1,), device=features.device) if dropout else None
    weights = head[0].weight, head[0].bias, head[3].weight, head[3].bias
    sums, counts, *_ = op.sprm_loss(features, *weights, *labels, seed, dropout, scale, dynamic)
    return sums, counts


def _plain(head: SPRM, features: Tensor, scale: float, *labels: Any) -> tuple[Tensor, Tensor]:
    """The same, dropout drawn by torch."""
    if scale != 1:
        features = torch.lerp(features.detach(), features, scale)  # the value is exact: start + scale * 0
    logit = head(features).squeeze(-1)
    sums, counts, *_ = loss_terms(logit.to(torch.promote_types(logit.dtype, torch.float32)), *labels)
    return sums, counts


def _beside(other: Tensor, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(other.device)


def _mean(sums: Tensor, counts: Tensor, class_balance: bool) -> Tensor:
    """The loss of the ``sums`` over steps with y = 0 and with y = 1; ``counts``: kept steps of each, judged trajectories."""
    trajectories = counts[2].clamp_min(1)
    if not class_balance:
        return sums.sum() / trajectories
    kept = counts[:2] + 1
    return torch.addcmul(sums[0] * kept[1], sums[1], kept[0], value=1.5) / (kept.sum() * trajectories)
