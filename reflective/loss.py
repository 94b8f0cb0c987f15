"""The self-supervised process reward loss: step scores learnt from outcomes alone."""

from collections.abc import Callable

import torch
from torch import Tensor

from . import ops  # noqa: F401  registers torch.ops.reflective
from .kernels.sprm_loss import loss_terms
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
    """``sprm_loss(head(features).squeeze(-1), ...)`` as one op, its forward and its backward fused on a GPU.

    The head's own ``Dropout`` applies while ``head.training``, drawn from torch's generator of the device. On a CPU the
    definition answers, which is slower than ``sprm_loss`` of the head's logits.

    Args:
        features: [M, H] hidden states of the steps, cast to the head's dtype.
        feature_gradient_scale: factor on the gradient of ``features`` (the published training code uses 1e-4 where the
            policy trains with the head; it costs nothing where ``features`` requires none).
        all_reduce: adds up, in place, the float32 tensor [3] it is given over all processes, for instance
            ``torch.distributed.all_reduce``. The loss is then this process's share of the global batch's: gradients are to
            be summed over the processes, not averaged.

    Raises:
        ValueError: the features are not the head's size, or the head drops every unit.
    """
    w1, dropout = head[0].weight, float(head[2].p) if head.training else 0.0
    if features.shape[1:] != w1.shape[1:]:
        raise ValueError(f"features: shape {tuple(features.shape)}, expected [M, {head.hidden_size}]")
    if not 0 <= dropout < 1:
        raise ValueError(f"head: dropout {dropout} leaves no unit to learn with; expected at least 0 and below 1")
    seed = torch.randint(2**63 - 1, (1,), device=features.device) if dropout else None
    sums, counts, *_ = torch.ops.reflective.sprm_loss(
        features.to(w1.dtype), w1, head[0].bias, head[3].weight, head[3].bias,
        trajectory_index, _beside(features, outcomes), _beside(features, trajectory_weight),
        seed, dropout, feature_gradient_scale, dynamic,
    )  # fmt: skip
    if all_reduce is not None:
        all_reduce(counts)
    return _mean(sums, counts, class_balance)


def _beside(other: Tensor, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(other.device)


def _mean(sums: Tensor, counts: Tensor, class_balance: bool) -> Tensor:
    """The loss of the ``sums`` over steps with y = 0 and with y = 1; ``counts``: kept steps of each, judged trajectories."""
    trajectories = counts[2].clamp_min(1)
    if not class_balance:
        return sums.sum() / trajectories
    kept = counts[:2] + 1
    return torch.addcmul(sums[0] * kept[1], sums[1], kept[0], value=1.5) / (kept.sum() * trajectories)
