// From products to a row's score: w2 act(z + b1) over 16 units, over a tile's groups, over the tiles, then b2 and the
// logarithm of the sigmoid. The order of every sum is fixed, see head.cuh.
#pragma once

#include <cmath>

#include "head_products.cuh"

namespace reflective {

// -- over a tile -----------------------------------------------------------------------------------------------------

// act(z), see curve.h.
__device__ __forceinline__ float activated(const Curve& curve, float z) {
  float s = z * z;
  if (s > Curve::MOST) s = Curve::MOST;  // not fminf, which turns a NaN into MOST
  float y = curve.p[Curve::DEGREE];
#pragma unroll
  for (int i = Curve::DEGREE - 1; i >= 0; --i) y = fmaf(y, s, curve.p[i]);
  return quotient(z, 1 + power_of_two(-z * y));
}

// sum over a group's 16 units of w2 act(z + b1), in every thread of the quad column that has the row.
template <class H>
__device__ __forceinline__ float group_sum(const H& head, float low, float high, float b1_low, float b1_high, float w2_low,
                                           float w2_high) {
  if constexpr (!H::TENSOR_CORES) {
#pragma unroll
    for (int mask = 1; mask < 4; mask *= 2) {
      low += __shfl_xor_sync(~0u, low, mask);
      high += __shfl_xor_sync(~0u, high, mask);
    }
  }
  low += b1_low, high += b1_high;
  float sum;
  if constexpr (H::CURVED) {
    sum = fmaf(w2_high, activated(head.curve, high), w2_low * activated(head.curve, low));
  } else {  // not fmaxf, which turns a NaN into 0
    sum = fmaf(w2_high, high < 0 ? 0 : high, w2_low * (low < 0 ? 0 : low));
  }
  sum = fmaf(low, 0.0f, sum);  // a feature that is not finite makes every product so, also those that it swallows
#pragma unroll
  for (int mask = 4; mask < WARP; mask *= 2) sum += __shfl_xor_sync(~0u, sum, mask);
  return sum;
}

// The end of an item: partial sums of its rows, to `sums`; to `group_sums` where its groups are in several warps.
template <class H, class S>
__device__ __forceinline__ void TilePass<H, S>::reduce(
    const Walk<H, S>& at, const Products<T> (&products)[S::WARP_GROUPS][S::TILES], float* group_sums) const {
  constexpr int ROWS = Products<T>::ROWS;
  const int lane = threadIdx.x % WARP, quad = lane % 4;
  float totals[S::TILES][ROWS] = {};
#pragma unroll
  for (int i = 0; i < S::WARP_GROUPS; ++i) {
    if (group_of(i) < head.groups) {
      const int unit = (at.unit_tile * head.groups + group_of(i)) * GROUP + lane / 4;
      const float b1_low = bias_at(head.b1, unit), b1_high = bias_at(head.b1, unit + 8);
      const float w2_low = bias_at(head.w2, unit), w2_high = bias_at(head.w2, unit + 8);
#pragma unroll
      for (int tile = 0; tile < S::TILES; ++tile) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          const float sum = group_sum(head, products[i][tile].sums[r], products[i][tile].sums[r + ROWS], b1_low, b1_high,
                                      w2_low, w2_high);
          if constexpr (S::SPLIT_UNITS) {
            const int row = row_of(tile) + (H::TENSOR_CORES ? 2 * quad + r : r);
            if (lane < 4) group_sums[group_of(i) * MAX_SPLIT_ROWS + row] = sum;
          } else {
            totals[tile][r] += sum;
          }
        }
      }
    }
  }
  if constexpr (!S::SPLIT_UNITS) {
#pragma unroll
    for (int tile = 0; tile < S::TILES; ++tile) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const int row = at.row0 + row_of(tile) + (H::TENSOR_CORES ? 2 * quad + r : r);
        if (lane < 4 && row < count) sums[static_cast<int64_t>(row) * head.line() + at.unit_tile] = totals[tile][r];
      }
    }
  }
}

// The groups' sums of a split item, once a barrier has made them visible, to `sums`.
template <class H, class S>
__device__ __forceinline__ void TilePass<H, S>::gather(int unit_tile, int row0, const float* group_sums) const {
  const int row = row0 + threadIdx.x;
  if (threadIdx.x < S::ROWS && row < count) {
    float total = 0;
    for (int group = 0; group < head.groups; ++group) total += group_sums[group * MAX_SPLIT_ROWS + threadIdx.x];
    sums[static_cast<int64_t>(row) * head.line() + unit_tile] = total;
  }
}

// -- over the tiles --------------------------------------------------------------------------------------------------

template <class H>
__device__ __forceinline__ float bias_of(const H& head) {
  return head.b2 ? to_float(*head.b2) : 0.0f;
}

// b2 + sum over the tiles of sums[row], in a fixed order by one warp, for the rows first + i * stride < count; in lane
// i. BATCH rows and PARTS times 128 tiles at once: one after the other, each would wait for the second-level cache.
template <int BATCH, int PARTS, class H>
__device__ __forceinline__ float row_logits(const H& head, float b2, const float* sums, int first, int stride, int count) {
  const int lane = threadIdx.x % WARP;
  float totals[BATCH] = {};
  constexpr int PART = 4 * WARP;
  for (int begin = 4 * lane; begin < head.line(); begin += PARTS * PART) {
    float4 fours[PARTS][BATCH];
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        const int row = first + i * stride, place = begin + part * PART;
        fours[part][i] = float4{0, 0, 0, 0};
        if (row < count && place < head.line()) {
          fours[part][i] = load_fresh(reinterpret_cast<const float4*>(sums + static_cast<int64_t>(row) * head.line() + place));
        }
      }
    }
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      const int left = head.tiles - begin - part * PART;  // what lies behind the last tile was never written
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        const float4 four = fours[part][i];
        const float sum = (four.x + (left > 1 ? four.y : 0)) + ((left > 2 ? four.z : 0) + (left > 3 ? four.w : 0));
        if (left > 0) totals[i] += sum;
      }
    }
  }
  float mine = 0;
#pragma unroll
  for (int i = 0; i < BATCH; ++i) {
#pragma unroll
    for (int mask = WARP / 2; mask > 0; mask /= 2) totals[i] += __shfl_xor_sync(~0u, totals[i], mask);
    if (lane == i) mine = totals[i];
  }
  return mine + b2;
}

// max(logsigmoid(logit), ln 1e-10); a NaN stays one.
__device__ __forceinline__ float device_log_score(float logit) {
  const float value = (logit < 0 ? logit : 0) - log1pf(expf(-fabsf(logit)));
  return value < static_cast<float>(LOG_FLOOR) ? static_cast<float>(LOG_FLOOR) : value;
}

}  // namespace reflective
