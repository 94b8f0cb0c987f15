// The matrix-tile kernel for bfloat16, over a tile engine `T`: AMX, or its emulation in plain C++.
//
//     Z[u, m] = sum over h of W1[u, h] * rows[m, h]          a block of 32 units by 32 rows at a time
//     partial[m, block] = sum over u of act(Z[u, m] + b1[u]) * w2[u]
//
// W1 is the left operand as it lies in memory. The rows are packed once: pairs of features next to each other, 32 rows
// side by side, padded with zeros. Used for every number of rows, so that a row's bits do not depend on it.
#pragma once

#include <cstdint>
#include <cstring>

#include "score_rows.h"
#include "score_rows_curve.h"

namespace reflective {
namespace {

constexpr int64_t TILE_ROWS = 32;   // rows of one packed panel: two tiles of 16 columns
constexpr int64_t TILE_DEPTH = 32;  // features that one tile multiplication consumes
constexpr int64_t PANEL_STEP = TILE_ROWS * TILE_DEPTH;

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

inline size_t panel_bytes(int64_t count, int64_t width) {
  return round_up(count, TILE_ROWS) * round_up(width, TILE_DEPTH) * sizeof(bfloat16);
}

// packed[panel][h / 2][m % 32][h % 2]
inline void pack_panels(const Rows& rows, int64_t width, void* packed) {
  const auto* data = static_cast<const bfloat16*>(rows.data);
  auto* out = static_cast<bfloat16*>(packed);
  std::memset(packed, 0, panel_bytes(rows.count, width));
  const int64_t panel = TILE_ROWS * round_up(width, TILE_DEPTH);
  for (int64_t m = 0; m < rows.count; ++m) {
    bfloat16* column = out + m / TILE_ROWS * panel + m % TILE_ROWS * 2;
    for (int64_t h = 0; h < width; ++h) column[h / 2 * 2 * TILE_ROWS + h % 2] = data[m * rows.stride + h];
  }
}

template <class T>
void tile_partial_sums(const Head& head, const Rows& rows, int64_t begin, int64_t end, float* partial) {
  const auto* w1 = static_cast<const bfloat16*>(head.w1);
  const auto* b1 = static_cast<const bfloat16*>(head.b1);
  const auto* w2 = static_cast<const bfloat16*>(head.w2);
  const auto* packed = static_cast<const bfloat16*>(rows.data);
  const int64_t blocks = unit_blocks(head.units), depth = round_up(head.width, TILE_DEPTH);
  const Curve curve = head.activation == RELU ? Curve{} : curve_of(head.activation);
  T tiles;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * UNIT_BLOCK;
    const int64_t units = head.units - first < UNIT_BLOCK ? head.units - first : UNIT_BLOCK;
    for (int64_t m = 0; m < rows.count; m += TILE_ROWS) {
      const int64_t count = rows.count - m < TILE_ROWS ? rows.count - m : TILE_ROWS;
      const bfloat16* panel = packed + m * depth;
      tiles.clear();
      for (int64_t h = 0; h < depth; h += TILE_DEPTH, panel += PANEL_STEP) {
        const bfloat16* weights = w1 + first * head.width + h;
        int64_t stride = head.width;
        bfloat16 edge[UNIT_BLOCK * TILE_DEPTH];
        if (units < UNIT_BLOCK || h + TILE_DEPTH > head.width) {  // a tile load would leave W1
          const int64_t n = head.width - h < TILE_DEPTH ? head.width - h : TILE_DEPTH;
          std::memset(edge, 0, sizeof edge);
          for (int64_t u = 0; u < units; ++u) {
            std::memcpy(edge + u * TILE_DEPTH, weights + u * head.width, n * sizeof(bfloat16));
          }
          weights = edge;
          stride = TILE_DEPTH;
        }
        tiles.multiply_add(weights, stride, panel, count > TILE_ROWS / 2);
      }
      alignas(64) float z[UNIT_BLOCK][TILE_ROWS];
      tiles.store(&z[0][0]);
      float sums[TILE_ROWS] = {};
      for (int64_t u = 0; u < units; ++u) {
        const float bias = to_float(b1[first + u]), weight = to_float(w2[first + u]);
        if (head.activation != RELU) {
          for (int64_t r = 0; r < TILE_ROWS; ++r) sums[r] += activated(curve, z[u][r] + bias) * weight;
          continue;
        }
        for (int64_t r = 0; r < TILE_ROWS; ++r) {
          const float activation = z[u][r] + bias;
          sums[r] += (activation < 0 ? 0 : activation) * weight;  // a NaN is not below zero and stays
        }
      }
      for (int64_t r = 0; r < count; ++r) partial[(m + r) * blocks + block] = sums[r];
    }
  }
}

}  // namespace
}  // namespace reflective
