"""score_rows: the SPRM head on gathered rows. In Triton; the definition is ``score_rows.py``."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import layout

# Stated because the default is another from Triton 3.10 on, and with it the bits.
OPTIONS = {"enable_fp_fusion": True}

LOG_FLOOR = tl.constexpr(layout.LOG_FLOOR)
NAN_PROPAGATES = tl.constexpr(tl.PropagateNan.ALL)
BLOCK_P = tl.constexpr(32)  # lines of partial sums read at once
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def head_partials(
    program, n_programs, first, n, features, w1, b1, w2, sums, R, H, K,
    BLOCK_U: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """``sums[p, m] = sum_{u in block p} w2[u] relu(sum_h W1[u, h] f[m, h] + b1[u])`` for one block of units and the rows
    ``m`` in ``[first, min(first + BLOCK_M, n))``. Line ``n_programs`` of ``sums`` gets ``sum_h 0 f[m, h]``: 0, or NaN for
    a row that is not finite.

    features: [>= n, H], w1: [K, H], b1, w2: [K], the head's dtype; sums: [> n_programs, R] float32. All contiguous.
    """
    width, line = tl.cast(H, tl.int64), tl.cast(R, tl.int64)
    unit = program * BLOCK_U + tl.arange(0, BLOCK_U)
    row = first + tl.arange(0, BLOCK_M)
    h = tl.arange(0, BLOCK_H)
    w_ptr = w1 + unit[:, None] * width + h[None, :]  # [BLOCK_U, BLOCK_H]
    f_ptr = features + row[None, :] * width + h[:, None]  # [BLOCK_H, BLOCK_M]
    z = tl.zeros((BLOCK_U, BLOCK_M), tl.float32)
    for done in range(0, H, BLOCK_H):
        w = tl.load(w_ptr + done, mask=(unit[:, None] < K) & (h[None, :] < H - done), other=0.0)
        f = tl.load(f_ptr + done, mask=(row[None, :] < n) & (h[:, None] < H - done), other=0.0)
        if INTERPRETED:  # its dot takes bfloat16 for integers
            w, f = w.to(tl.float32), f.to(tl.float32)
        z = tl.dot(w, f, z, input_precision="ieee")
    z += tl.load(b1 + unit, mask=unit < K, other=0.0).to(tl.float32)[:, None]
    weight = tl.load(w2 + unit, mask=unit < K, other=0.0).to(tl.float32)[:, None]
    partial = tl.sum(weight * tl.maximum(z, 0.0, propagate_nan=NAN_PROPAGATES), 0)  # [BLOCK_M]
    tl.store(sums + program * line + row, partial, mask=row < n)

    # Rows are shared out among the programs: asking every tile of the product would cost each one a pass over it.
    for m in range(first + program, tl.minimum(first + BLOCK_M, n), n_programs):
        poison = tl.zeros((BLOCK_U * BLOCK_H,), tl.float32)
        for done in range(0, H, BLOCK_U * BLOCK_H):
            column = done + tl.arange(0, BLOCK_U * BLOCK_H)
            poison += tl.load(features + m * width + column, mask=column < H, other=0.0).to(tl.float32) * 0.0
        tl.store(sums + n_programs * line + m, tl.sum(poison, 0))


@triton.jit
def head_scores(row, n, n_programs, b2, sums, R, BLOCK_M: tl.constexpr):
    """``max(logsigmoid(sum_p sums[p, m] + b2), ln 1e-10)`` for the rows ``m = row``; ``p`` runs in a fixed order.

    row: [BLOCK_M], those from ``n`` on are undefined; sums: see ``head_partials``; b2: [1]. Returns [BLOCK_M] float32.
    """
    p = tl.arange(0, BLOCK_P)[:, None]
    line = tl.cast(R, tl.int64)
    logit = tl.zeros((BLOCK_M,), tl.float32)
    for done in range(0, n_programs + 1, BLOCK_P):
        inside = (p <= n_programs - done) & (row[None, :] < n)
        logit += tl.sum(tl.load(sums + (done + p) * line + row[None, :], mask=inside, other=0.0), 0)
    logit += tl.load(b2).to(tl.float32)
    # log1p(e) as log(u) e / (u - 1) with u = fl(1 + e): exact where log(1 + e) has lost every digit of e.
    e = tl.exp(-tl.abs(logit))
    u = 1.0 + e
    log1p = tl.where(u == 1.0, e, tl.div_rn(tl.log(u) * e, tl.where(u == 1.0, 1.0, u - 1.0)))
    log_sigmoid = tl.minimum(logit, 0.0, propagate_nan=NAN_PROPAGATES) - log1p
    return tl.maximum(log_sigmoid, LOG_FLOOR, propagate_nan=NAN_PROPAGATES)


@triton.jit
def _partials(
    features, w1, b1, w2, sums, M, H, K,
    BLOCK_U: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """``head_partials`` for the unit block and the row tile of this program."""
    head_partials(
        tl.program_id(0), tl.num_programs(0), tl.program_id(1) * BLOCK_M, M,
        features, w1, b1, w2, sums, M, H, K, BLOCK_U, BLOCK_M, BLOCK_H,
    )  # fmt: skip


@triton.jit
def _scores(out, b2, sums, M, n_programs, BLOCK_M: tl.constexpr):
    """``out[m] = head_scores(m)`` for one row tile. out: [M] float32."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(out + row, head_scores(row, M, n_programs, b2, sums, M, BLOCK_M), mask=row < M)


def head_tiles(K: int, dtype: torch.dtype) -> tuple[int, dict[str, int]]:
    """Number of unit blocks, and the tile of one program: a function of the head alone.

    Neither may depend on the number of rows: a row keeps its bits only while its sums keep their order.
    """
    if dtype == torch.float32:  # no tensor cores in IEEE float32: rows that are not there would cost time
        block_u, block_m, block_h = 32, 16, 32
    else:
        block_u, block_m, block_h = (16 if K <= 2048 else 32 if K <= 4096 else 64), 64, 64
    return triton.cdiv(K, block_u), {"BLOCK_U": block_u, "BLOCK_M": block_m, "BLOCK_H": block_h, "num_stages": 4}


def score_rows(features: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """``max(logsigmoid(w2 . relu(W1 f + b1) + b2), ln 1e-10)`` for every row ``f``; NaN for a row that is not finite.

    Activations and sums are float32 and never leave registers before the product with ``w2``; every sum has a fixed
    order, so a row's bits depend on nothing but the row. Arguments as in the definition, float32, bfloat16 or float16.
    """
    M, H = features.shape
    K = w1.shape[0]
    n_programs, tile = head_tiles(K, w1.dtype)
    features, w1 = features.contiguous(), w1.contiguous()
    out = torch.empty(M, dtype=torch.float32, device=features.device)
    sums = torch.empty(n_programs + 1, M, dtype=torch.float32, device=features.device)
    n_tiles = triton.cdiv(M, tile["BLOCK_M"])
    with torch.cuda.device_of(features):
        _partials[(n_programs, n_tiles)](features, w1, b1, w2, sums, M, H, K, **tile, **OPTIONS)
        _scores[(n_tiles,)](out, b2, sums, M, n_programs, BLOCK_M=tile["BLOCK_M"], **OPTIONS)
    return out
