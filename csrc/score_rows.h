#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "head.h"

namespace reflective {

using bfloat16 = uint16_t;  // the bits

inline float to_float(float x) { return x; }

inline float to_float(bfloat16 x) {
  const uint32_t bits = uint32_t{x} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// out[m] = max(logsigmoid(w2 . act(W1 rows[m] + b1) + b2), LOG_FLOOR); NaN for a row that is not finite.
//
// The order of every sum is fixed by the row alone: a row has the same bits in any batch, at any place, on any number
// of threads. Each (row, unit) dot product walks the width once in its own vector of lanes; UNIT_BLOCK units give one
// partial sum of act(z) * w2; partial sums are added in block order in float64.
void score_rows(const Head& head, const Rows& rows, float* out);

// out[m] = w2 . act(W1 rows[m] + b1) + b2, the latter if there is one; NaN for a row that is not finite.
void logit_rows(const Head& head, const Rows& rows, float* out);

// max(logsigmoid(logit), LOG_FLOOR); a NaN stays one.
float log_score(double logit);

constexpr int64_t UNIT_BLOCK = 32;

inline int64_t unit_blocks(int64_t units) { return (units + UNIT_BLOCK - 1) / UNIT_BLOCK; }

// One way to compute the partial sums. A kernel that wants the rows in another form packs them once per call.
struct ScoreKernel {
  size_t (*packed_bytes)(int64_t count, int64_t width);  // null: reads the rows where they are
  void (*pack)(const Rows& rows, int64_t width, void* packed);
  // partial[m * unit_blocks(units) + block] for blocks [begin, end); `rows` as packed.
  void (*partial_sums)(const Head& head, const Rows& rows, int64_t begin, int64_t end, float* partial);
};

}  // namespace reflective
