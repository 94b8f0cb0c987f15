"""score_rows: the SPRM head on gathered rows. The definition."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import LOG_FLOOR


def score_rows(features: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """``max(logsigmoid(w2 . relu(W1 f + b1) + b2), ln 1e-10)`` for every row ``f``; NaN for a row that is not finite.

    Args:
        features: [M, H], the dtype of the head.
        w1, b1, w2, b2: [K, H], [K], [1, K], [1], K = 2H in published heads.

    Returns:
        [M] log-scores, float32 (float64 for float64 inputs: what tests call the truth).
    """
    logit = F.linear(F.relu(F.linear(features, w1, b1)), w2, b2).squeeze(-1)  # [M]
    logit = logit.to(torch.promote_types(logit.dtype, torch.float32))
    log_score = F.logsigmoid(logit).clamp_min(LOG_FLOOR)
    # ReLU can swallow an infinite input and a NaN compares false everywhere, so finiteness is asked of the row itself.
    return log_score.masked_fill(~features.isfinite().all(-1), float("nan"))
