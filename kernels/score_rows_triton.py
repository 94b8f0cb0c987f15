"""score_rows: a head of one hidden layer on gathered rows. In Triton; the definition is ``score_rows.py``."""

import triton
import triton.language as tl
from torch import Tensor

from . import layout
from .logit_rows_triton import BLOCK_R, INTERPRETED, NAN_PROPAGATES, OPTIONS, finished, head_logits

__all__ = ["INTERPRETED", "NAN_PROPAGATES", "OPTIONS", "log_score", "score_rows"]

LOG_FLOOR = tl.constexpr(layout.LOG_FLOOR)


@triton.jit
def log_score(logit):
    """``max(logsigmoid(logit), ln 1e-10)``; NaN stays NaN. float32."""
    # log1p(e) as log(u) + (e - (u - 1)) / u with u = fl(1 + e): exact where log(1 + e) has lost every digit of e.
    e = tl.exp(-tl.abs(logit))
    u = 1.0 + e
    log1p = tl.log(u) + (e - (u - 1.0)) / u
    log_sigmoid = tl.minimum(logit, 0.0, propagate_nan=NAN_PROPAGATES) - log1p
    return tl.maximum(log_sigmoid, LOG_FLOOR, propagate_nan=NAN_PROPAGATES)


@triton.jit(do_not_specialize=["M"])
def _scores(out, b2, sums, M, N_LINES: tl.constexpr):
    """``out[m] = log_score(head_logits(m))`` for one row tile. out: [M] float32."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    tl.store(out + row, log_score(head_logits(row, M, b2, sums, N_LINES)), mask=row < M)


def score_rows(
    features: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: int = layout.RELU
) -> Tensor:
    """``max(logsigmoid(w2 . act(W1 f + b1) + b2), ln 1e-10)`` for every row ``f``; NaN for a row that is not finite.

    Activations and sums are float32, and activations never leave registers; every sum has a fixed order, so a row's bits
    depend on nothing but the row. Arguments as in the definition.
    """
    return finished(_scores, features, w1, b1, w2, b2, activation)
