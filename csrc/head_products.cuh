// Products of 16 units with 8 rows out of shared memory: on tensor cores, mma.m16n8k16 with the units as its rows and the
// features as its columns; in float32 by the threads.
#pragma once

#include "head_ring.cuh"

namespace reflective {

// 32 columns of 16 units, of 8 rows: two halves of 16 columns.
struct UnitFragment {
  uint32_t halves[2][4];
};

struct RowFragment {
  uint32_t halves[2][2];
};

// In float32 a thread has 8 columns of its own, of two units and of one row.
struct Wide {
  float values[8];
};

struct WideUnits {
  Wide low, high;
};

__device__ __forceinline__ Wide wide(unsigned char* rows, int row, int quad) {
  Wide wide;
  memcpy(wide.values, piece_at<float>(rows, row, 2 * quad), 16);
  memcpy(wide.values + 4, piece_at<float>(rows, row, 2 * quad + 1), 16);
  return wide;
}

// The 16 units at `weights`.
template <class W, class T>
__device__ __forceinline__ auto load_units(unsigned char* weights) {
  const int lane = threadIdx.x % WARP, quad = lane % 4;
  if constexpr (sizeof(W) == 4) {
    return WideUnits{wide(weights, lane / 4, quad), wide(weights, lane / 4 + 8, quad)};
  } else if constexpr (sizeof(W) == 2) {
    UnitFragment units;
    load_matrices(units.halves[0], piece_at<W>(weights, lane % 16, lane / 16));
    load_matrices(units.halves[1], piece_at<W>(weights, lane % 16, lane / 16 + 2));
    return units;
  } else {
    // Eight columns of two units: which of a product's 16 places a column takes is free, if the features agree.
    UnitFragment units;
#pragma unroll
    for (int unit = 0; unit < 2; ++unit) {
      const uint2 codes = *reinterpret_cast<const uint2*>(weights + (lane / 4 + 8 * unit) * QUAD_COLUMNS + quad * 8);
      uint32_t first[2], second[2];
      unpack_e4m3<T>(codes.x, first);
      unpack_e4m3<T>(codes.y, second);
      units.halves[0][unit] = first[0], units.halves[0][unit + 2] = first[1];
      units.halves[1][unit] = second[0], units.halves[1][unit + 2] = second[1];
    }
    return units;
  }
}

// The 8 rows at `features`, to go with units of W.
template <class W, class T>
__device__ __forceinline__ RowFragment load_features(unsigned char* features) {
  const int lane = threadIdx.x % WARP;
  if constexpr (sizeof(W) == 2) {
    uint32_t words[4];
    load_matrices(words, piece_at<T>(features, lane % 8, lane / 8));
    return {{{words[0], words[1]}, {words[2], words[3]}}};
  } else {
    const uint4 words = *reinterpret_cast<const uint4*>(piece_at<T>(features, lane / 4, lane % 4));
    return {{{words.x, words.y}, {words.z, words.w}}};
  }
}

// Sums of 16 units (this thread: unit lane / 4 and that + 8) with 8 rows. On tensor cores a thread has two of the rows,
// 2 quad and the next, [low, low, high, high]; else all 8, each over its own quarter of the columns, low ones first.
template <class T>
struct Products {
  static constexpr int ROWS = sizeof(T) == 2 ? 2 : 8;
  float sums[2 * ROWS];
};

// Eight columns by themselves, then to the sum.
__device__ __forceinline__ float dot(float sum, const Wide& a, const Wide& b) {
  float products = a.values[0] * b.values[0];
#pragma unroll
  for (int i = 1; i < 8; ++i) products = fmaf(a.values[i], b.values[i], products);
  return sum + products;
}

// products += the stage's weights times its features, of this warp's groups and tiles.
template <class H, class S>
__device__ __forceinline__ void TilePass<H, S>::multiply_stage(
    unsigned char* stage, Products<T> (&products)[S::WARP_GROUPS][S::TILES]) const {
#pragma unroll
  for (int slice = 0; slice < S::SLICES; ++slice) {
    unsigned char* const weights = stage + slice * weight_slice;
    unsigned char* const features = stage + S::SLICES * weight_slice + slice * FEATURE_SLICE;
    decltype(load_units<W, T>(weights)) units[S::WARP_GROUPS];
#pragma unroll
    for (int i = 0; i < S::WARP_GROUPS; ++i) {
      if (group_of(i) < head.groups) units[i] = load_units<W, T>(eighth_row<W>(weights, group_of(i) * GROUP));
    }
#pragma unroll
    for (int tile = 0; tile < S::TILES; ++tile) {
      if constexpr (H::TENSOR_CORES) {
        const RowFragment rows = load_features<W, T>(eighth_row<T>(features, row_of(tile)));
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // outside, so that a product need not wait for the one before
#pragma unroll
          for (int i = 0; i < S::WARP_GROUPS; ++i) {
            if (group_of(i) < head.groups) {
              mma_16x8x16<T>(products[i][tile].sums, units[i].halves[half], rows.halves[half]);
            }
          }
        }
      } else {
#pragma unroll
        for (int r = 0; r < 8; ++r) {
          const Wide row = wide(eighth_row<T>(features, row_of(tile)), r, threadIdx.x % 4);
#pragma unroll
          for (int i = 0; i < S::WARP_GROUPS; ++i) {
            if (group_of(i) < head.groups) {
              float* const sums = products[i][tile].sums;
              sums[r] = dot(sums[r], units[i].low, row);
              sums[r + 8] = dot(sums[r + 8], units[i].high, row);
            }
          }
        }
      }
    }
  }
}

}  // namespace reflective
