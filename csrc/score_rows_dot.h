// The dot-product kernel, over the vectors `V` of one instruction set. Included once by each such file, after its
// target pragma: the anonymous namespace keeps one file's instructions out of another's code.
//
//     partial[m, block] = sum over the block's units k of act(W1[k] . rows[m] + b1[k]) * w2[k]
#pragma once

#include <cstdint>
#include <cstring>

#include "score_rows.h"
#include "score_rows_curve.h"

namespace reflective {
namespace {

// z[r, u] = rows[r] . w[u], R rows by U units at a time; U is a multiple of 4. What a dot product adds, and in which
// order, does not depend on R and U.
template <class V, int R, int U, class Row, class Weight>
inline void dots(const Row* rows, int64_t stride, const Weight* const* w, int64_t width, float* z) {
  typename V::Sum sum[R][U];
  decltype(V::load(rows)) x[R];
  for (int r = 0; r < R; ++r) {
    for (int u = 0; u < U; ++u) sum[r][u] = V::zero();
  }
  int64_t h = 0;
  for (; h + V::WIDTH <= width; h += V::WIDTH) {
    for (int r = 0; r < R; ++r) x[r] = V::load(rows + r * stride + h);
    for (int u = 0; u < U; ++u) {
      const auto weight = V::load(w[u] + h);
      for (int r = 0; r < R; ++r) sum[r][u] = V::multiply_add(x[r], weight, sum[r][u]);
    }
  }
  if (h < width) {
    for (int r = 0; r < R; ++r) x[r] = V::load_first(rows + r * stride + h, width - h);
    for (int u = 0; u < U; ++u) {
      const auto weight = V::load_first(w[u] + h, width - h);
      for (int r = 0; r < R; ++r) sum[r][u] = V::multiply_add(x[r], weight, sum[r][u]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int u = 0; u < U; u += 4) V::store_sums(sum[r] + u, z + r * UNIT_BLOCK + u);
  }
}

constexpr int UNITS_TOGETHER = 8;

// As many of `count` rows as fit, R at a time, then the rest by half as many.
template <class V, int R, class Row, class Weight>
inline void group_dots(const Row* rows, int64_t stride, int64_t count, const Weight* const* w, int64_t width,
                       float* z) {
  constexpr int U = R == 1 ? UNITS_TOGETHER : 4;
  for (; count >= R; count -= R, rows += R * stride, z += R * UNIT_BLOCK) {
    for (int u = 0; u < UNITS_TOGETHER; u += U) dots<V, R, U>(rows, stride, w + u, width, z + u);
  }
  if constexpr (R > 1) group_dots<V, R / 2>(rows, stride, count, w, width, z);
}

// Of wider rows than V::WIDEST one chain of sums a lane would gather more than twice the rounding of a BLAS. They are summed
// in pieces of so many columns.
template <class V>
inline int64_t piece_of(int64_t width) {
  constexpr int64_t STEPS = 128;
  return width > V::WIDEST ? STEPS * V::WIDTH : width;
}

template <class V, class Row, class Weight>
void dot_partial_sums(const Head& head, const Rows& rows, int64_t begin, int64_t end, float* partial) {
  constexpr int64_t ROW_TILE = 32;  // rows that stay in the second-level cache while a block of W1 passes
  const auto* data = static_cast<const Row*>(rows.data);
  const auto* w1 = static_cast<const Weight*>(head.w1);
  const int64_t blocks = unit_blocks(head.units);
  const int64_t piece = piece_of<V>(head.width);
  const Curve curve = head.activation == RELU ? Curve{} : curve_of(head.activation);
  for (int64_t block = begin; block < end; ++block) {
    const Weight* w[UNIT_BLOCK];
    float b1[UNIT_BLOCK], w2[UNIT_BLOCK];
    for (int64_t u = 0; u < UNIT_BLOCK; ++u) {
      const int64_t unit = block * UNIT_BLOCK + u;
      const bool exists = unit < head.units;
      w[u] = w1 + (exists ? unit : head.units - 1) * head.width;  // past the end: read the last one, use nothing of it
      b1[u] = exists ? to_float(static_cast<const Weight*>(head.b1)[unit]) : 0;
      w2[u] = exists ? to_float(static_cast<const Weight*>(head.w2)[unit]) : 0;
    }
    const int64_t units = head.units - block * UNIT_BLOCK;
    for (int64_t m = 0; m < rows.count; m += ROW_TILE) {
      const int64_t tile = rows.count - m < ROW_TILE ? rows.count - m : ROW_TILE;
      float z[ROW_TILE * UNIT_BLOCK], more[ROW_TILE * UNIT_BLOCK];
      for (int64_t u = 0; u < UNIT_BLOCK && u < units; u += UNITS_TOGETHER) {
        int64_t h = 0;
        do {
          const Weight* weights[UNITS_TOGETHER];
          for (int i = 0; i < UNITS_TOGETHER; ++i) weights[i] = w[u + i] + h;
          const int64_t width = head.width - h < piece ? head.width - h : piece;
          group_dots<V, V::ROWS>(data + m * rows.stride + h, rows.stride, tile, weights, width, h > 0 ? more : z + u);
          for (int64_t r = 0; h > 0 && r < tile; ++r) {
            for (int i = 0; i < UNITS_TOGETHER; ++i) z[r * UNIT_BLOCK + u + i] += more[r * UNIT_BLOCK + i];
          }
        } while ((h += piece) < head.width);
      }
      for (int64_t r = 0; r < tile; ++r) {
        for (int64_t u = units; u < UNIT_BLOCK; ++u) z[r * UNIT_BLOCK + u] = 0;
        const float* const of_row = z + r * UNIT_BLOCK;
        partial[(m + r) * blocks + block] =
            head.activation == RELU ? V::relu_dot(of_row, b1, w2) : curve_dot(curve, of_row, b1, w2);
      }
    }
  }
}

inline size_t float_bytes(int64_t count, int64_t width) { return count * width * sizeof(float); }

// bfloat16 rows as float32, exactly: they are read once for every unit.
inline void pack_as_float(const Rows& rows, int64_t width, void* packed) {
  const auto* data = static_cast<const bfloat16*>(rows.data);
  auto* out = static_cast<float*>(packed);
  for (int64_t m = 0; m < rows.count; ++m) {
    for (int64_t h = 0; h < width; ++h) out[m * width + h] = to_float(data[m * rows.stride + h]);
  }
}

}  // namespace
}  // namespace reflective
