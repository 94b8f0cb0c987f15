"""sprm_loss: the self-supervised loss over gathered rows, and its gradients. The definition."""

import torch
import torch.nn.functional as F
from torch import Tensor

UINT32 = 0xFFFFFFFF
DROPOUT_LEVELS = 2**16  # eight decisions from one Philox call: 12 integer operations each instead of 100


def sprm_loss(
    features: Tensor,
    w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
    trajectory: Tensor, outcome: Tensor, trajectory_weight: Tensor | None,
    seed: Tensor | None, dropout: float, feature_scale: float, dynamic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``sums[c] = sum_i [class_i = c] w_i BCE(sigmoid(logit_i), y_i) / steps_i``,
    ``logit = w2 . (keep relu(W1 f + b1)) / (1 - p) + b2``, with ``w`` as in ``loss_terms``.

    The loss is ``sums`` times the weight of each class over the number of judged trajectories: both follow from ``counts``,
    which processes can add up first.

    Args:
        features: [M, H], the dtype of the head; its gradient is scaled by ``feature_scale``.
        w1, b1, w2, b2: [K, H], [K], [1, K], [1], K = 2H in published heads.
        trajectory: [M] int64 below N, the trajectory of each row.
        outcome: [N] float, 1 correct, 0 incorrect, NaN without a verdict.
        trajectory_weight: [N] float, or None for ones.
        seed: [1] int64, of the dropout; read only where ``dropout > 0``.
        dropout: chance that a unit is zeroed in training, see ``dropout_scale``.
        dynamic: weight 0 for a row on which the head disagrees with the outcome.

    Returns:
        ``sums`` [2]; ``counts`` [3]: rows kept with y = 0 and with y = 1, judged trajectories; for the backward ``dlogit``
        [2, M], ``d sums[c] / d logit[m]``, and ``alive`` [M, K] bool, the units that pass a gradient. float32 (float64 for
        float64 inputs: what tests call the truth). Only ``sums`` is differentiable.
    """
    if feature_scale != 1:
        features = torch.lerp(features.detach(), features, feature_scale)  # the value is exact: start + scale * 0
    z = F.linear(features, w1, b1)  # [M, K]
    keep = dropout_mask(z, seed, dropout) if dropout else torch.ones_like(z, dtype=torch.bool)
    logit = F.linear(F.relu(z) * keep * dropout_scale(dropout), w2, b2).squeeze(-1)  # [M]
    logit = logit.to(torch.promote_types(logit.dtype, torch.float32))
    sums, counts, weight, y = loss_terms(logit, trajectory, outcome, trajectory_weight, dynamic)
    return sums, counts, weight * (logit.sigmoid() - y), (z > 0) & keep


def loss_terms(
    logit: Tensor, trajectory: Tensor, outcome: Tensor, trajectory_weight: Tensor | None, dynamic: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``sums``, ``counts``, ``weight[c, m] = [class_m = c] w_m / steps_m`` [2, M] and ``y`` [M] for ``logit`` [M].

    ``w`` is 1 on judged rows, with ``dynamic`` on those with ``score > 0.5`` and ``y = 1`` or ``score < 0.5`` and ``y = 0``,
    times the trajectory's weight, else 0; ``steps_m`` is the number of rows of the row's trajectory.
    """
    y = outcome[trajectory].to(logit.dtype)
    judged = ~y.isnan()
    y = y.nan_to_num()
    right = y > 0.5
    keep = (judged & ((logit > 0) == right) & (logit != 0) if dynamic else judged).to(logit.dtype)
    steps = torch.zeros(len(outcome), dtype=logit.dtype, device=logit.device).index_add(0, trajectory, judged.to(logit))
    counts = torch.stack([(keep * (1 - y)).sum(), (keep * y).sum(), (steps > 0).sum()])
    weight = keep / steps.clamp_min(1)[trajectory]
    if trajectory_weight is not None:
        weight = weight * trajectory_weight[trajectory].to(logit.dtype)
    weight = torch.stack([~right, right]) * weight
    sums = (weight * F.binary_cross_entropy_with_logits(logit, y, reduction="none")).sum(1)
    return sums, counts, weight, y


def sprm_loss_backward(
    grad: Tensor, dlogit: Tensor, alive: Tensor, features: Tensor,
    w1: Tensor, b1: Tensor, w2: Tensor,
    dropout: float, feature_scale: float, features_too: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of ``features, w1, b1, w2, b2`` in their dtype, for ``grad`` [2], that of ``sums``.

    With ``a[m, u] = alive[m, u] d[m] / (1 - p)``, ``d = grad . dlogit``, ``G = a^T f`` and ``g = a^T 1``:
    ``dW1 = w2 G``, ``db1 = w2 g``, ``dw2[u] = W1[u] . G[u] + b1[u] g[u]``, ``db2 = sum d``, ``df = scale (w2 a) W1``.
    The gradient of ``w2`` by way of ``G`` is why no activation is kept or computed twice.

    Args:
        dlogit, alive: what ``sprm_loss`` returned; the other tensors, ``dropout`` and ``feature_scale``: what it was given.
        features_too: else the gradient of ``features`` is an empty tensor [0, H].
    """
    f, v1, c1, v2 = (t.to(dlogit.dtype) for t in (features, w1, b1, w2))
    d = (grad[:, None] * dlogit).sum(0)  # [M]
    a = alive * (d * dropout_scale(dropout))[:, None]  # [M, K]
    G, g = a.t() @ f, a.sum(0)  # [K, H], [K]
    df = feature_scale * ((a * v2) @ v1) if features_too else f.new_empty(0, f.shape[1])
    dw2 = ((v1 * G).sum(1) + c1 * g)[None]
    return tuple(t.to(w1.dtype) for t in (df, v2.t() * G, v2[0] * g, dw2, d.sum()[None]))


def dropout_threshold(dropout: float) -> int:
    """Of the ``DROPOUT_LEVELS`` equally likely values those below it drop a unit."""
    return min(round(dropout * DROPOUT_LEVELS), DROPOUT_LEVELS - 1)


def dropout_scale(dropout: float) -> float:
    """``1 / (1 - p)``, ``p`` being ``dropout`` rounded to a multiple of ``1 / DROPOUT_LEVELS``, which is what is drawn."""
    return DROPOUT_LEVELS / (DROPOUT_LEVELS - dropout_threshold(dropout))


def dropout_mask(z: Tensor, seed: Tensor, dropout: float) -> Tensor:
    """True where unit ``u`` of row ``m`` stays: a function of ``(seed, m, u)`` alone, so that any tiling draws the same.

    The 16 bits compared are half ``u % 2`` of word ``u // 2 % 4`` of Philox-4x32-10 at counter ``(m, u // 8, 0, 0)``.
    """
    M, K = z.shape
    row, octet = torch.arange(M, device=z.device), torch.arange((K + 7) // 8, device=z.device)
    c0, c1 = torch.broadcast_tensors(row[:, None], octet)
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = seed & UINT32, (seed >> 32) & UINT32
    for _ in range(10):
        b, a = c2 * 0xCD9E8D57, c0 * 0xD2511F53  # modulo 2^64 in int64: both halves of the product are there
        c0, c1, c2, c3 = ((b >> 32) & UINT32) ^ c1 ^ k0, b & UINT32, ((a >> 32) & UINT32) ^ c3 ^ k1, a & UINT32
        k0, k1 = (k0 + 0x9E3779B9) & UINT32, (k1 + 0xBB67AE85) & UINT32
    words = torch.stack([c0, c1, c2, c3], -1)  # [M, ceil(K / 8), 4]
    halves = torch.stack([words & 0xFFFF, words >> 16], -1)
    return halves.flatten(1)[:, :K] >= dropout_threshold(dropout)
