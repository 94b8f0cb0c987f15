"""logit_rows: a head of one hidden layer on gathered rows, before the sigmoid. The definition."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from . import layout

ACTIVATIONS = {
    layout.RELU: F.relu,
    layout.GELU: F.gelu,
    layout.GELU_TANH: functools.partial(F.gelu, approximate="tanh"),
    layout.SILU: F.silu,
}


def logit_rows(
    features: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor | None = None, activation: int = layout.RELU
) -> Tensor:
    """``w2 . act(W1 f + b1) + b2`` for every row ``f``; NaN for a row that is not finite.

    ``act(z)`` is ``max(z, 0)`` (RELU), ``z (1 + erf(z / sqrt 2)) / 2`` (GELU), ``z (1 + tanh(sqrt(2 / pi) (z + 0.044715
    z^3))) / 2`` (GELU_TANH) or ``z / (1 + exp(-z))`` (SILU).

    Without ``b2`` the units of ``w1`` may be a part of the head's: logits of disjoint parts add up, which is how a head is
    split over ranks.

    Args:
        features: [M, H].
        w1, b1, w2, b2: [K, H], [K], [1, K], [1], of the features' dtype. Or ``w1`` is float8_e4m3fn and the others are
            float32, with the scale of each row of ``w1`` folded into ``b1`` and ``w2`` (``reflective.scoring.sprm.quantize``),
            which ReLU alone allows.
        activation: ``layout.RELU``, ``GELU``, ``GELU_TANH`` or ``SILU``.

    Returns:
        [M] logits, float32 (float64 for float64 inputs: what tests call the truth).

    Raises:
        ValueError: another activation, or one that float8 weights cannot have; RuntimeError, where compiled.
    """
    check_activation(activation, w1)
    if w1.dtype != features.dtype:
        wide = torch.promote_types(features.dtype, torch.float32)
        features, w1, b1, w2 = (t.to(wide) for t in (features, w1, b1, w2))
        b2 = None if b2 is None else b2.to(wide)
    logit = F.linear(ACTIVATIONS[activation](F.linear(features, w1, b1)), w2, b2).squeeze(-1)  # [M]
    # An activation can swallow an infinite input and a NaN compares false everywhere, so finiteness is asked of the row.
    logit = logit.masked_fill(~features.isfinite().all(-1), float("nan"))
    return logit.to(torch.promote_types(logit.dtype, torch.float32))


def check_activation(activation: int, w1: Tensor) -> None:
    """Raise ValueError for an activation that there is not, or that a head whose first weights are ``w1`` cannot have."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation}: expected 0 (relu), 1 (gelu), 2 (gelu_tanh) or 3 (silu)")
    if activation != layout.RELU and w1.dtype == torch.float8_e4m3fn:
        raise ValueError(f"activation={activation}: the scales of w1 in float8_e4m3fn are folded in by relu (0) alone")
