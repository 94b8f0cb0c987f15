"""logit_rows: the SPRM head on gathered rows, before the sigmoid. The definition."""

import torch
import torch.nn.functional as F
from torch import Tensor


def logit_rows(features: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor | None = None) -> Tensor:
    """``w2 . relu(W1 f + b1) + b2`` for every row ``f``; NaN for a row that is not finite.

    Without ``b2`` the units of ``w1`` may be a part of the head's: logits of disjoint parts add up, which is how a head is
    split over ranks.

    Args:
        features: [M, H].
        w1, b1, w2, b2: [K, H], [K], [1, K], [1], of the features' dtype. Or ``w1`` is float8_e4m3fn and the others are
            float32, with the scale of each row of ``w1`` folded into ``b1`` and ``w2`` (``reflective.scoring.sprm.quantize``).

    Returns:
        [M] logits, float32 (float64 for float64 inputs: what tests call the truth).
    """
    if w1.dtype != features.dtype:
        wide = torch.promote_types(features.dtype, torch.float32)
        features, w1, b1, w2 = (t.to(wide) for t in (features, w1, b1, w2))
        b2 = None if b2 is None else b2.to(wide)
    logit = F.linear(F.relu(F.linear(features, w1, b1)), w2, b2).squeeze(-1)  # [M]
    # ReLU can swallow an infinite input and a NaN compares false everywhere, so finiteness is asked of the row itself.
    logit = logit.masked_fill(~features.isfinite().all(-1), float("nan"))
    return logit.to(torch.promote_types(logit.dtype, torch.float32))
