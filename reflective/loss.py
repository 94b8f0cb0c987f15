"""The self-supervised process reward loss: step scores learnt from outcomes alone."""

import torch
import torch.nn.functional as F
from torch import Tensor


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
    logits, y = step_logits.float(), outcomes.to(step_logits.device)[trajectory_index].float()
    judged = ~y.isnan()
    y = y.nan_to_num()
    keep = judged & (((logits > 0) == (y > 0.5)) & (logits != 0)) if dynamic else judged
    weight = keep.float()
    if class_balance:
        positive, negative = 1 + (weight * y).sum(), 1 + (weight * (1 - y)).sum()
        weight = weight * torch.where(y > 0.5, 1.5 * negative, positive) / (positive + negative)
    if trajectory_weight is not None:
        weight = weight * trajectory_weight.to(logits.device)[trajectory_index]
    loss = weight.detach() * F.binary_cross_entropy_with_logits(logits, y, reduction="none")

    n = len(outcomes)
    steps = torch.zeros(n, device=logits.device).index_add(0, trajectory_index, judged.float())
    total = torch.zeros(n, device=logits.device).index_add(0, trajectory_index, loss)
    return (total / steps.clamp_min(1)).sum() / (steps > 0).sum().clamp_min(1)
