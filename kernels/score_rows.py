"""score_rows: a head of one hidden layer on gathered rows. The definition."""

import torch.nn.functional as F
from torch import Tensor

from .layout import LOG_FLOOR, RELU
from .logit_rows import logit_rows


def score_rows(features: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: int = RELU) -> Tensor:
    """``max(logsigmoid(w2 . act(W1 f + b1) + b2), ln 1e-10)`` for every row ``f``; NaN for a row that is not finite.

    Args:
        features: [M, H].
        w1, b1, w2, b2: [K, H], [K], [1, K], [1], K = 2H in MetaStone-S1's heads; dtypes as in ``logit_rows``.
        activation: see ``logit_rows``, which also says what is raised.

    Returns:
        [M] log-scores, float32 (float64 for float64 inputs: what tests call the truth).
    """
    return log_score(logit_rows(features, w1, b1, w2, b2, activation))


def log_score(logits: Tensor) -> Tensor:
    """``max(logsigmoid(logit), ln 1e-10)``; NaN stays NaN."""
    return F.logsigmoid(logits).clamp_min(LOG_FLOOR)
