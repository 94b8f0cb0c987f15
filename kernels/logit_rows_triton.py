"""logit_rows: a head of one hidden layer on gathered rows, before the sigmoid. In Triton; the definition is ``logit_rows.py``.

A row's bits depend on nothing but the row and the head. A unit's sum over ``h`` goes 16 columns at a time through the same
tensor-core instruction whatever the tile, because tiles of one head are either all 64 units or more (wgmma, tcgen05) or all
fewer (mma). Its bias comes last, also where a tile's loop has a single step. Units are then added 16 at a time, which no
tile splits between warps, and those sums in pairs, each product rounded before it is added. Partial sums lie row by row at
a distance which only the head sets, so that they are also read the same way for any number of rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import cuda_capability_geq

from . import layout
from .logit_rows import check_activation

# Of two products that are added the compiler may fuse either, in every tile another; dots in float32 stay fused.
OPTIONS = {"enable_fp_fusion": False}

NAN_PROPAGATES = tl.constexpr(tl.PropagateNan.ALL)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
UNIT_GROUP = tl.constexpr(layout.UNIT_GROUP)
RELU, GELU, GELU_TANH = map(tl.constexpr, (layout.RELU, layout.GELU, layout.GELU_TANH))
# Columns of float32 from which one chain of sums, a column after the other, would gather more rounding than a BLAS, and after
# how many the sum is then put aside.
CHAIN, FOLD = tl.constexpr(16384), tl.constexpr(1024)
BLOCK_R, BLOCK_P = tl.constexpr(16), tl.constexpr(256)  # rows, and partial sums of each, that are read at once


@triton.jit
def _weights(w, dtype: tl.constexpr):
    """``w``, of which uint8 are the bits of float8_e4m3fn, in ``dtype``, exactly."""
    if w.dtype == tl.uint8:
        if cuda_capability_geq(8, 9):
            w = w.to(tl.float8e4nv, bitcast=True)
        else:
            bits = w.to(tl.int32)
            magnitude = tl.where((bits & 0x7F) == 0x7F, 0x7FC00000, (bits & 0x7F) << 20)
            # Float32's exponent has another bias: 2^120 makes up for it, for subnormals too.
            w = (magnitude | (bits & 0x80) << 24).to(tl.float32, bitcast=True) * 1.329227995784916e36
    return w.to(dtype)


@triton.jit
def _activated(z, ACTIVATION: tl.constexpr):
    """``act(z)`` in float32, see the definition."""
    if ACTIVATION == RELU:
        a = tl.maximum(z, 0.0)
    elif ACTIVATION == GELU:
        a = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == GELU_TANH:  # (1 + tanh(y)) / 2 = 1 / (1 + exp(-2 y))
        a = z / (1.0 + tl.exp(-1.5957691216057308 * (z + 0.044715 * z * z * z)))
    else:
        a = z / (1.0 + tl.exp(-z))
    return a


@triton.jit
def head_partials(
    program, first, n, f_row, w1, b1, w2, sums,
    H: tl.constexpr, K: tl.constexpr, ACTIVATION: tl.constexpr, LINE: tl.constexpr,
    BLOCK_U: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``sums[m, p] = sum_{u in line p} w2[u] (act(z[u]) + 0 z[u])``, ``z[u] = sum_h W1[u, h] f[m, h] + b1[u]``, for one block
    of units and the rows ``m`` in ``[first, min(first + BLOCK_M, n))``; a line is ``LINE`` units.

    ``0 z`` because an activation would let minus infinity pass for an innocent 0: of a row that is not finite no ``z`` is, so every
    sum is NaN; of any other row it changes no bit.

    f_row: [BLOCK_M] pointers to the rows' ``f``, of the dtype in which products are taken; w1: [K, H] of the same, or
    of float8 (see ``_weights``); b1, w2: [K]; sums: [>= n, cdiv(K, LINE) + 2] float32, of which the last two columns are the
    caller's. All contiguous.
    """
    N_LINES: tl.constexpr = (K + LINE - 1) // LINE
    dtype: tl.constexpr = f_row.dtype.element_ty
    unit = program * BLOCK_U + tl.arange(0, BLOCK_U)
    row = first + tl.arange(0, BLOCK_M)
    h = tl.arange(0, BLOCK_H)
    w_ptr = w1 + unit.to(tl.int64)[:, None] * H + h[None, :]  # [BLOCK_U, BLOCK_H]
    f_ptr = f_row[None, :] + h[:, None]  # [BLOCK_H, BLOCK_M]
    z = tl.zeros((BLOCK_U, BLOCK_M), tl.float32)
    if H > CHAIN and dtype == tl.float32:
        for begin in range(0, H, FOLD):
            piece = tl.zeros((BLOCK_U, BLOCK_M), tl.float32)
            for done in tl.range(begin, min(begin + FOLD, H), BLOCK_H, num_stages=STAGES):
                w = tl.load(w_ptr + done, mask=(unit[:, None] < K) & (h[None, :] < H - done), other=0.0)
                f = tl.load(f_ptr + done, mask=(row[None, :] < n) & (h[:, None] < H - done), other=0.0)
                piece = tl.dot(w, f, piece, input_precision="ieee")
            z += piece
    else:
        for done in tl.range(0, H, BLOCK_H, num_stages=STAGES):
            w = tl.load(w_ptr + done, mask=(unit[:, None] < K) & (h[None, :] < H - done), other=0.0)
            f = tl.load(f_ptr + done, mask=(row[None, :] < n) & (h[:, None] < H - done), other=0.0)
            w = _weights(w, dtype)
            if INTERPRETED:  # its dot takes bfloat16 for integers
                w, f = w.to(tl.float32), f.to(tl.float32)
            z = tl.dot(w, f, z, input_precision="ieee")
    bias = tl.load(b1 + unit, mask=unit < K, other=0.0).to(tl.float32)[:, None]
    # z + bias, which the compiler would begin the product's sum with where the loop has a single step, and only there.
    z = tl.fma(z, 1.0, bias)
    weight = tl.load(w2 + unit, mask=unit < K, other=0.0).to(tl.float32)[:, None]
    product = weight * (_activated(z, ACTIVATION) + z * 0.0)
    partial = tl.sum(tl.reshape(product, (BLOCK_U // UNIT_GROUP, UNIT_GROUP, BLOCK_M)), 1)
    for i in tl.static_range(0 if LINE == UNIT_GROUP else 1 if LINE == 2 * UNIT_GROUP else 2):
        pairs = tl.reshape(partial, (BLOCK_U // UNIT_GROUP // 2 ** (i + 1), 2, BLOCK_M))
        even, odd = tl.split(tl.permute(pairs, (0, 2, 1)))
        partial = even + odd
    line = program * (BLOCK_U // LINE) + tl.arange(0, BLOCK_U // LINE)[:, None]
    out = sums + row.to(tl.int64)[None, :] * (N_LINES + 2) + line
    tl.store(out, partial, mask=(row[None, :] < n) & (line < N_LINES))


@triton.jit
def head_logits(row, n, b2, sums, N_LINES: tl.constexpr):
    """``sum_p sums[m, p] + b2`` of the rows ``m = row``. row: [BLOCK_R], those from ``n`` on are undefined; b2: [1] or None.
    Returns [BLOCK_R] float32.
    """
    p = tl.arange(0, BLOCK_P)
    logit = tl.zeros((BLOCK_R,), tl.float32)
    line_ptr = sums + row.to(tl.int64)[:, None] * (N_LINES + 2) + p[None, :]
    for done in range(0, N_LINES, BLOCK_P):
        inside = (row[:, None] < n) & (p[None, :] < N_LINES - done)
        logit += tl.sum(tl.load(line_ptr + done, mask=inside, other=0.0), 1)
    if b2 is not None:
        logit += tl.load(b2).to(tl.float32)
    return logit


@triton.jit(do_not_specialize=["M", "room"])
def _partials(
    features, w1, b1, w2, sums, n_slots, M, room,
    H: tl.constexpr, K: tl.constexpr, ACTIVATION: tl.constexpr, LINE: tl.constexpr,
    BLOCK_U: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``head_partials`` for the unit block and the row tile of this program, of ``M`` rows; or, with ``n_slots``, of the rows
    that wait if fewer than ``room`` of the ``M`` slots are free.

    features: [M, H]; sums: [M, cdiv(K, LINE) + 2] float32; n_slots: [1] int32 or None.
    """
    n = M if n_slots is None else tl.load(n_slots)
    first, program = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    if (n + room > M) & (first < n):
        f_row = features + (first + tl.arange(0, BLOCK_M)).to(tl.int64) * H
        head_partials(
            program, first, n, f_row, w1, b1, w2, sums, H, K, ACTIVATION, LINE, BLOCK_U, BLOCK_M, BLOCK_H, STAGES
        )


@triton.jit(do_not_specialize=["M"])
def _logits(out, b2, sums, M, N_LINES: tl.constexpr):
    """``out[m] = head_logits(m)`` for one row tile. out: [M] float32."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    tl.store(out + row, head_logits(row, M, b2, sums, N_LINES), mask=row < M)


def head_line(w1: Tensor) -> int:
    """Units to a line of partial sums: a function of the head alone, as every order of adding."""
    return 32 if w1.dtype == torch.float32 else 16 if len(w1) <= 4096 else 64


def head_tile(w1: Tensor, rows: int) -> dict[str, int]:
    """The tile of one program for ``rows`` rows. Few are bound by the bytes of ``w1``, of which a multiprocessor should have
    50 KB in flight; many by what the L2 cache delivers, which larger tiles ask less of.
    """
    K = len(w1)
    if w1.dtype == torch.float32:  # no tensor cores in IEEE float32: rows that are not there would cost time
        units, m, h, stages, warps = 32, 16, 16, 8, 4
    elif rows <= 16:
        units, m, h, warps = (16 if K <= 4096 else 64), 16, 128, 4
        stages = 6 if K <= 4096 or w1.element_size() == 1 else 4
    elif K <= 4096:
        units, m, h, stages, warps = 32, 64, 64, 4, 4
    elif rows <= 64:
        units, m, h, stages, warps = 64, 64, 64, 4, 4
    else:
        units, m, h, stages, warps = 128, 128, 64, 3, 8
    return {"BLOCK_U": units, "BLOCK_M": m, "BLOCK_H": h, "STAGES": stages, "num_warps": warps}


def weight_bits(w1: Tensor) -> Tensor:
    """``w1`` as the kernels take it: float8 as uint8, which any GPU can load."""
    w1 = w1.contiguous()
    return w1.view(torch.uint8) if w1.dtype == torch.float8_e4m3fn else w1


def partials(
    features: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, activation: int, sums: Tensor | None = None,
    n_slots: Tensor | None = None, room: int = 1,
) -> tuple[Tensor, int]:  # fmt: skip
    """Launch ``_partials``. Returns the sums and the number of lines of each row. Raises what ``check_activation`` does."""
    check_activation(activation, w1)
    M, H = features.shape
    K, line, tile = w1.shape[0], head_line(w1), head_tile(w1, M)
    lines = triton.cdiv(K, line)
    if sums is None:
        sums = torch.empty(M, lines + 2, dtype=torch.float32, device=features.device)
    grid = triton.cdiv(M, tile["BLOCK_M"]), triton.cdiv(K, tile["BLOCK_U"])
    _partials[grid](
        features.contiguous(), weight_bits(w1), b1, w2, sums, n_slots, M, room, H, K, activation, line, **tile, **OPTIONS
    )  # fmt: skip
    return sums, lines


def finished(
    finish: triton.JITFunction, features: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor | None, activation: int
) -> Tensor:
    """Launch ``_partials`` on ``features`` [M, H] and ``finish``, ``_logits`` or its like, on their sums. Returns what that
    writes, [M] float32.
    """
    check_activation(activation, w1)
    M = features.shape[0]
    out = torch.empty(M, dtype=torch.float32, device=features.device)
    if M:
        with torch.cuda.device_of(features):
            sums, lines = partials(features, w1, b1, w2, activation)
            finish[(triton.cdiv(M, BLOCK_R.value),)](out, b2, sums, M, lines, **OPTIONS)
    return out


def logit_rows(
    features: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor | None = None, activation: int = layout.RELU
) -> Tensor:
    """``w2 . act(W1 f + b1) + b2`` for every row ``f``; NaN for a row that is not finite. Arguments as in the definition.

    Activations and sums are float32 and never leave registers before the product with ``w2``.
    """
    return finished(_logits, features, w1, b1, w2, b2, activation)
