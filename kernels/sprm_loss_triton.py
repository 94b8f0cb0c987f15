"""sprm_loss: the self-supervised loss over gathered rows, and its gradients. In Triton; the definition is ``sprm_loss.py``.

What the backward needs of the [M, K] activations is one bit a unit, ``alive``, kept as a byte: 3.1 MB for M = 1024, K = 3072.
With it the weights' gradients are one product, ``G = (alive d)^T f``: not computing the activations a second time saves
9.7 of 19.3 GFLOP at H = 1536, not keeping their gradient in bfloat16 saves 6.3 MB and its rounding.

No kernel is specialised on the number of rows or trajectories: every step of a training run has others.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .logit_rows_triton import INTERPRETED, NAN_PROPAGATES
from .sprm_loss import dropout_scale, dropout_threshold

# Fused, unlike in logit_rows: every sum here has one tile, and unfused `_terms` spills on sm_100 under Triton 3.7.1.
OPTIONS = {"enable_fp_fusion": True}

BLOCK_P = tl.constexpr(32)  # lines of partial sums read at once
SMALLEST = tl.constexpr(2.0**-100)  # its reciprocal is finite


@triton.jit
def _keep(seed, first, octet, threshold, BLOCK_M: tl.constexpr, BLOCK_U: tl.constexpr):
    """``dropout_mask`` of the definition for rows ``first ..`` and units ``8 octet ..``: [BLOCK_M, BLOCK_U]."""
    row = first + tl.arange(0, BLOCK_M)[:, None] + tl.zeros((1, BLOCK_U // 8), tl.int32)
    octet = octet + tl.arange(0, BLOCK_U // 8)[None, :] + tl.zeros((BLOCK_M, 1), tl.int32)
    zero = tl.zeros((BLOCK_M, BLOCK_U // 8), tl.int32)
    r0, r1, r2, r3 = tl.philox(tl.load(seed), row, octet, zero, zero)
    words = tl.join(tl.join(r0, r2), tl.join(r1, r3))  # the last axis runs fastest: r0 r1 r2 r3
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), (BLOCK_M, BLOCK_U)) >= threshold


@triton.jit(do_not_specialize=["M"])
def _activate(
    features, w1, b1, w2, seed, sums, alive, M, H, K, threshold,
    BLOCK_M: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """``sums[p, m] = sum_{u in block p} w2[u] keep[m, u] relu(z[m, u])`` and ``alive = keep and z > 0``,
    ``z[m, u] = sum_h f[m, h] W1[u, h] + b1[u]``, for the unit block and the row tile of this program.

    features: [M, H], w1: [K, H], b1, w2: [K], the head's dtype; seed: [1] int64 or None for no dropout; sums:
    [n_programs, M] float32; alive: [M, K] int8.
    """
    width, line = tl.cast(H, tl.int64), tl.cast(K, tl.int64)
    first, first_unit = tl.program_id(1) * BLOCK_M, tl.program_id(0) * BLOCK_U
    row, unit = first + tl.arange(0, BLOCK_M), first_unit + tl.arange(0, BLOCK_U)
    h = tl.arange(0, BLOCK_H)
    f_ptr = features + row[:, None] * width + h[None, :]  # [BLOCK_M, BLOCK_H]
    w_ptr = w1 + unit[None, :] * width + h[:, None]  # [BLOCK_H, BLOCK_U]
    z = tl.zeros((BLOCK_M, BLOCK_U), tl.float32)
    for done in range(0, H, BLOCK_H):
        f = tl.load(f_ptr + done, mask=(row[:, None] < M) & (h[None, :] < H - done), other=0.0)
        w = tl.load(w_ptr + done, mask=(unit[None, :] < K) & (h[:, None] < H - done), other=0.0)
        if INTERPRETED:  # its dot takes bfloat16 for integers
            f, w = f.to(tl.float32), w.to(tl.float32)
        z = tl.dot(f, w, z, input_precision="ieee")
    z += tl.load(b1 + unit, mask=unit < K, other=0.0).to(tl.float32)[None, :]
    weight = tl.load(w2 + unit, mask=unit < K, other=0.0).to(tl.float32)[None, :]
    active = z > 0.0
    a = tl.maximum(z, 0.0, propagate_nan=NAN_PROPAGATES)
    if seed is not None:
        keep = _keep(seed, first, first_unit // 8, threshold, BLOCK_M, BLOCK_U)
        active, a = active & keep, tl.where(keep, a, 0.0)
    tl.store(sums + tl.program_id(0) * tl.cast(M, tl.int64) + row, tl.sum(a * weight, 1), mask=row < M)
    inside = (row[:, None] < M) & (unit[None, :] < K)
    tl.store(alive + row[:, None] * line + unit[None, :], active.to(tl.int8), mask=inside)


@triton.jit(do_not_specialize=["M"])
def _logits(sums, b2, trajectory, outcome, logits, steps, M, n_programs, scale, BLOCK_M: tl.constexpr):
    """``logits[m] = scale sum_p sums[p, m] + b2``, ``p`` in a fixed order; ``steps[t] += 1`` for every row of a judged ``t``.

    sums: [n_programs, M] float32; b2: [1]; trajectory: [M] int64; outcome: [N]; logits: [M] float32; steps: [N] int32, 0.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    p = tl.arange(0, BLOCK_P)[:, None]
    line = tl.cast(M, tl.int64)
    logit = tl.zeros((BLOCK_M,), tl.float32)
    for done in range(0, n_programs, BLOCK_P):
        inside = (p < n_programs - done) & (row[None, :] < M)
        logit += tl.sum(tl.load(sums + (done + p) * line + row[None, :], mask=inside, other=0.0), 0)
    tl.store(logits + row, logit * scale + tl.load(b2).to(tl.float32), mask=row < M)
    t = tl.load(trajectory + row, mask=row < M, other=0)
    y = tl.load(outcome + t, mask=row < M, other=float("nan")).to(tl.float32)
    tl.atomic_add(steps + t, 1, mask=tl.abs(y) >= 0.0, sem="relaxed")  # not NaN; the order of integers does not show


@triton.jit(do_not_specialize=["M", "N"])
def _terms(
    logits, trajectory, outcome, trajectory_weight, steps, sums, counts, dlogit, M, N,
    DYNAMIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``loss_terms`` of the definition and ``dlogit[c, m] = weight[c, m] (sigmoid(logit_m) - y_m)``, all in one program: a few
    thousand rows are done before a second launch would have begun, and every sum has one order.

    logits: [M], steps: [N] int32: of ``_logits``; trajectory_weight: [N] or None; sums: [2], counts: [3], dlogit: [2, M]
    float32.
    """
    loss_wrong, loss_right = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    kept_wrong, kept_right = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for first in range(0, M, BLOCK):
        row = first + tl.arange(0, BLOCK)
        x = tl.load(logits + row, mask=row < M, other=0.0)
        t = tl.load(trajectory + row, mask=row < M, other=0)
        y = tl.load(outcome + t, mask=row < M, other=float("nan")).to(tl.float32)
        keep = tl.abs(y) >= 0.0  # not NaN
        y = tl.where(keep, y, 0.0)
        right = y > 0.5
        if DYNAMIC:
            keep = keep & ((x > 0.0) == right) & (x != 0.0)
        kept = keep.to(tl.float32)
        weight = tl.div_rn(kept, tl.maximum(tl.load(steps + t, mask=row < M, other=1), 1).to(tl.float32))
        if trajectory_weight is not None:
            weight *= tl.load(trajectory_weight + t, mask=row < M, other=0.0).to(tl.float32)
        # log1p(e) as log(u) e / (u - 1) with u = fl(1 + e): exact where log(1 + e) has lost every digit of e.
        e = tl.exp(-tl.abs(x))
        u = 1.0 + e
        log1p = tl.where(u == 1.0, e, tl.div_rn(tl.log(u) * e, tl.where(u == 1.0, 1.0, u - 1.0)))
        loss = weight * (tl.maximum(x, 0.0, propagate_nan=NAN_PROPAGATES) - x * y + log1p)
        d = weight * (tl.div_rn(tl.where(x < 0.0, e, 1.0), u) - y)
        loss_wrong += tl.where(right, 0.0, loss)
        loss_right += tl.where(right, loss, 0.0)
        kept_wrong += kept * (1.0 - y)
        kept_right += kept * y
        tl.store(dlogit + row, tl.where(right, 0.0, d), mask=row < M)
        tl.store(dlogit + M + row, tl.where(right, d, 0.0), mask=row < M)
    tl.store(sums, tl.sum(loss_wrong, 0))
    tl.store(sums + 1, tl.sum(loss_right, 0))
    tl.store(counts, tl.sum(kept_wrong, 0))
    tl.store(counts + 1, tl.sum(kept_right, 0))
    judged = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, N, BLOCK):
        t = first + tl.arange(0, BLOCK)
        judged += (tl.load(steps + t, mask=t < N, other=0) > 0).to(tl.int32)
    tl.store(counts + 2, tl.sum(judged, 0).to(tl.float32))


@triton.jit(do_not_specialize=["M"])
def _dlogits(grad, dlogit, d, d_max, db2, M, BLOCK: tl.constexpr):
    """``d[m] = grad . dlogit[:, m]``, ``d_max = max |d|``, ``db2 = sum d``, in one program.

    grad: [2], dlogit: [2, M], d: [M], d_max: [1] float32; db2: [1], the head's dtype.
    """
    wrong, right = tl.load(grad), tl.load(grad + 1)
    total, largest = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for first in range(0, M, BLOCK):
        row = first + tl.arange(0, BLOCK)
        both = tl.load(dlogit + row, mask=row < M, other=0.0) * wrong
        both += tl.load(dlogit + M + row, mask=row < M, other=0.0) * right
        both = tl.where(row < M, both, 0.0)
        tl.store(d + row, both, mask=row < M)
        total += both
        largest = tl.maximum(largest, tl.abs(both))
    tl.store(d_max, tl.maximum(tl.max(largest, 0), SMALLEST))
    tl.store(db2, tl.sum(total, 0).to(db2.dtype.element_ty))


@triton.jit(do_not_specialize=["M"])
def _weight_gradients(
    features, alive, d, d_max, w1, w2, dw1, dots, M, H, K, scale,
    BLOCK_M: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """``G[u, h] = scale sum_m alive[m, u] d[m] f[m, h]``, ``dw1 = w2 G`` and ``dots[p, u] = sum_{h in block p} W1[u, h] G[u, h]``
    for the unit block and the column block ``p`` of this program.

    ``d`` enters the product as ``d / d_max``: float16 has no room for the gradients of a mean over thousands of rows.

    features: [M, H], w1, dw1: [K, H], w2: [K], the head's dtype; alive: [M, K] int8; d: [M], d_max: [1], dots:
    [n_column_blocks, K] float32.
    """
    width, line = tl.cast(H, tl.int64), tl.cast(K, tl.int64)
    unit = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    m = tl.arange(0, BLOCK_M)
    largest = tl.load(d_max)
    G = tl.zeros((BLOCK_H, BLOCK_U), tl.float32)
    for first in range(0, M, BLOCK_M):
        row = first + m
        f = tl.load(features + row[None, :] * width + h[:, None], mask=(h[:, None] < H) & (row[None, :] < M), other=0.0)
        inside = (row[:, None] < M) & (unit[None, :] < K)
        bit = tl.load(alive + row[:, None] * line + unit[None, :], mask=inside, other=0)
        relative = tl.div_rn(tl.load(d + row, mask=row < M, other=0.0), largest)
        a = tl.where(bit != 0, relative[:, None], 0.0).to(f.dtype)  # [BLOCK_M, BLOCK_U]
        if INTERPRETED:  # its dot takes bfloat16 for integers
            f, a = f.to(tl.float32), a.to(tl.float32)
        G = tl.dot(f, a, G, input_precision="ieee")
    G *= largest * scale
    inside = (h[:, None] < H) & (unit[None, :] < K)
    at = unit[None, :] * width + h[:, None]
    weight = tl.load(w2 + unit, mask=unit < K, other=0.0).to(tl.float32)[None, :]
    tl.store(dw1 + at, (weight * G).to(dw1.dtype.element_ty), mask=inside)
    dot = tl.sum(tl.load(w1 + at, mask=inside, other=0.0).to(tl.float32) * G, 0)
    tl.store(dots + tl.program_id(1) * line + unit, dot, mask=unit < K)


@triton.jit(do_not_specialize=["M"])
def _unit_gradients(
    alive, d, dots, b1, w2, db1, dw2, M, K, n_column_blocks, scale, BLOCK_M: tl.constexpr, BLOCK_U: tl.constexpr
):
    """``db1 = w2 g`` and ``dw2 = sum_p dots[p] + b1 g`` with ``g[u] = scale sum_m alive[m, u] d[m]``, for one block of units.

    db1, dw2: [K], the head's dtype; others as in ``_weight_gradients``.
    """
    line = tl.cast(K, tl.int64)
    unit = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)[None, :]
    m = tl.arange(0, BLOCK_M)[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_U), tl.float32)
    for first in range(0, M, BLOCK_M):
        row = first + m
        bit = tl.load(alive + row * line + unit, mask=(row < M) & (unit < K), other=0)
        total += tl.where(bit != 0, tl.load(d + row, mask=row < M, other=0.0), 0.0)
    g = tl.sum(total, 0)[None, :] * scale
    total = tl.zeros((BLOCK_M, BLOCK_U), tl.float32)
    for first in range(0, n_column_blocks, BLOCK_M):
        p = first + m
        total += tl.load(dots + p * line + unit, mask=(p < n_column_blocks) & (unit < K), other=0.0)
    b = tl.load(b1 + unit, mask=unit < K, other=0.0).to(tl.float32)
    w = tl.load(w2 + unit, mask=unit < K, other=0.0).to(tl.float32)
    tl.store(db1 + unit, (w * g).to(db1.dtype.element_ty), mask=unit < K)
    tl.store(dw2 + unit, (tl.sum(total, 0)[None, :] + b * g).to(dw2.dtype.element_ty), mask=unit < K)


@triton.jit(do_not_specialize=["M"])
def _feature_gradients(
    alive, d, w1, w2, df, M, H, K, scale, BLOCK_M: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_H: tl.constexpr
):
    """``df[m, h] = scale d[m] sum_u alive[m, u] w2[u] W1[u, h]`` for the column block and the row tile of this program.

    Arguments as in ``_weight_gradients``; df: [M, H], the head's dtype.
    """
    width, line = tl.cast(H, tl.int64), tl.cast(K, tl.int64)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    u = tl.arange(0, BLOCK_U)
    acc = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    for first in range(0, K, BLOCK_U):
        unit = first + u
        inside = (row[:, None] < M) & (unit[None, :] < K)
        bit = tl.load(alive + row[:, None] * line + unit[None, :], mask=inside, other=0)
        weight = tl.load(w2 + unit, mask=unit < K, other=0.0)
        a = tl.where(bit != 0, weight[None, :], 0.0).to(weight.dtype)
        w = tl.load(w1 + unit[:, None] * width + h[None, :], mask=(unit[:, None] < K) & (h[None, :] < H), other=0.0)
        if INTERPRETED:  # its dot takes bfloat16 for integers
            a, w = a.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(a, w, acc, input_precision="ieee")
    acc *= tl.load(d + row, mask=row < M, other=0.0)[:, None] * scale
    inside = (row[:, None] < M) & (h[None, :] < H)
    tl.store(df + row[:, None] * width + h[None, :], acc.to(df.dtype.element_ty), mask=inside)


def _tile(dtype: torch.dtype) -> tuple[int, int, dict[str, int]]:
    """Side of a product's tile, length of a step along its sum, options: all of the head alone, for a row's logit to keep
    its bits in any batch.
    """
    if dtype == torch.float32:  # no tensor cores in IEEE float32
        return 64, 16, {"num_warps": 8, "num_stages": 3} | OPTIONS
    return 128, 64, {"num_warps": 8, "num_stages": 3} | OPTIONS


def sprm_loss(
    features: Tensor,
    w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
    trajectory: Tensor, outcome: Tensor, trajectory_weight: Tensor | None,
    seed: Tensor | None, dropout: float, feature_scale: float, dynamic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``sums``, ``counts``, ``dlogit`` and ``alive``; semantics and arguments as in the definition, float32, bfloat16 or float16.

    Three launches, nothing read back. Activations are float32 and never leave registers before the product with ``w2``;
    every sum of floats has a fixed order.
    """
    (M, H), K, N = features.shape, w1.shape[0], len(outcome)
    side, depth, options = _tile(w1.dtype)
    n_programs = triton.cdiv(K, side)
    features, w1, trajectory, outcome = (t.contiguous() for t in (features, w1, trajectory, outcome))
    weight = None if trajectory_weight is None else trajectory_weight.contiguous()

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=features.device)

    partial, logits, sums, counts, dlogit = floats(n_programs, M), floats(M), floats(2), floats(3), floats(2, M)
    steps = torch.zeros(N, dtype=torch.int32, device=features.device)
    alive = torch.empty(M, K, dtype=torch.bool, device=features.device)
    with torch.cuda.device_of(features):
        _activate[(n_programs, triton.cdiv(M, side))](
            features, w1, b1, w2, seed if dropout else None, partial, alive.view(torch.int8), M, H, K,
            dropout_threshold(dropout), BLOCK_M=side, BLOCK_U=side, BLOCK_H=depth, **options,
        )  # fmt: skip
        _logits[(triton.cdiv(M, 64),)](
            partial, b2, trajectory, outcome, logits, steps, M, n_programs, dropout_scale(dropout),
            BLOCK_M=64, **OPTIONS,
        )  # fmt: skip
        _terms[(1,)](
            logits, trajectory, outcome, weight, steps, sums, counts, dlogit, M, N,
            DYNAMIC=dynamic, BLOCK=2048, num_warps=8, **OPTIONS,
        )  # fmt: skip
    return sums, counts, dlogit, alive


def sprm_loss_backward(
    grad: Tensor, dlogit: Tensor, alive: Tensor, features: Tensor,
    w1: Tensor, b1: Tensor, w2: Tensor,
    dropout: float, feature_scale: float, features_too: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of ``features, w1, b1, w2, b2``; semantics and arguments as in the definition, float32, bfloat16 or float16.

    Three launches, four with ``features_too``. Sums are float32 in a fixed order, rounded once.
    """
    (M, H), K = features.shape, w1.shape[0]
    side, depth, options = _tile(w1.dtype)
    scale, n_columns = dropout_scale(dropout), triton.cdiv(H, side)
    grad, features, w1, alive = (t.contiguous() for t in (grad, features, w1, alive.view(torch.int8)))
    df = torch.empty_like(features if features_too else features[:0])
    dw1, db1, dw2, db2 = *map(torch.empty_like, (w1, b1, w2)), w2.new_empty(1)
    d, d_max, dots = dlogit.new_empty(M), dlogit.new_empty(1), dlogit.new_empty(n_columns, K)
    with torch.cuda.device_of(features):
        _dlogits[(1,)](grad, dlogit, d, d_max, db2, M, BLOCK=4096, num_warps=8, **OPTIONS)
        _weight_gradients[(triton.cdiv(K, side), n_columns)](
            features, alive, d, d_max, w1, w2, dw1, dots, M, H, K, scale,
            BLOCK_M=depth, BLOCK_U=side, BLOCK_H=side, **options,
        )  # fmt: skip
        _unit_gradients[(triton.cdiv(K, 32),)](
            alive, d, dots, b1, w2, db1, dw2, M, K, n_columns, scale, BLOCK_M=64, BLOCK_U=32, **OPTIONS
        )
        if features_too:
            _feature_gradients[(n_columns, triton.cdiv(M, side))](
                alive, d, w1, w2, df, M, H, K, scale * feature_scale,
                BLOCK_M=side, BLOCK_U=depth, BLOCK_H=side, **options,
            )  # fmt: skip
    return df, dw1, db1, dw2, db2
