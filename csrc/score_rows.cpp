#include "score_rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "capability.h"
#include "layout.h"
#include "parallel.h"

namespace reflective {
namespace {

constexpr int64_t ROWS_PER_PASS = 256;  // one pass over W1; bounds the scratch
constexpr int64_t PASS_WIDTH = 8192;    // of wider rows fewer, lest packed ones grow beyond 8 MiB, but no fewer than a tile's
constexpr int64_t LEAST_ROWS = 32;
// Multiply-adds worth waking a thread for. One row at width 576 is 2.5 times as many: 35 us on one thread, 20 us on 2.
constexpr int64_t WORK_PER_THREAD = 256 * 1024;

bool is_finite(const float* row, int64_t width) {
  uint32_t largest = 0;
  for (int64_t h = 0; h < width; ++h) {
    uint32_t bits;
    std::memcpy(&bits, row + h, sizeof bits);
    largest = std::max(largest, bits & 0x7FFFFFFFu);
  }
  return largest < 0x7F800000u;
}

bool is_finite(const bfloat16* row, int64_t width) {
  uint16_t largest = 0;
  for (int64_t h = 0; h < width; ++h) largest = std::max<uint16_t>(largest, row[h] & 0x7FFF);
  return largest < 0x7F80;
}

bool is_finite(const Head& head, const Rows& rows, int64_t m) {
  return head.is_bfloat16() ? is_finite(static_cast<const bfloat16*>(rows.data) + m * rows.stride, head.width)
                          : is_finite(static_cast<const float*>(rows.data) + m * rows.stride, head.width);
}

double scalar(const void* data, bool is_bfloat16) {
  return is_bfloat16 ? to_float(*static_cast<const bfloat16*>(data)) : *static_cast<const float*>(data);
}

// finish(logit) is what goes into `out`.
template <class Finish>
void score_pass(const Head& head, const Rows& rows, const ScoreKernel& kernel, Finish finish, float* out) {
  // Grows to its largest use, then nothing is allocated.
  thread_local std::vector<float> partial;
  thread_local std::vector<char> packed;
  const int64_t blocks = unit_blocks(head.units);
  partial.resize(std::max<size_t>(partial.size(), rows.count * blocks));

  Rows input = rows;
  if (kernel.pack) {
    packed.resize(std::max(packed.size(), kernel.packed_bytes(rows.count, head.width)));
    kernel.pack(rows, head.width, packed.data());
    input = {packed.data(), head.width, rows.count};
  }
  float* const sums = partial.data();
  const int64_t work_per_block = std::max<int64_t>(rows.count * UNIT_BLOCK * head.width, 1);
  parallel_for(blocks, WORK_PER_THREAD / work_per_block + 1,
               [&](int64_t begin, int64_t end) { kernel.partial_sums(head, input, begin, end, sums); });

  const double b2 = head.b2 ? scalar(head.b2, head.is_bfloat16()) : 0;
  for (int64_t m = 0; m < rows.count; ++m) {
    double logit = 0;
    for (int64_t block = 0; block < blocks; ++block) logit += sums[m * blocks + block];
    out[m] = is_finite(head, rows, m) ? finish(logit + b2) : std::numeric_limits<float>::quiet_NaN();
  }
}

template <class Finish>
void score_passes(const Head& head, const Rows& rows, Finish finish, float* out) {
  const Capability& path = capability();
  const ScoreKernel& kernel = head.is_bfloat16() ? *path.bfloat16 : *path.float32;
  const int64_t row_bytes = rows.stride * (head.is_bfloat16() ? sizeof(bfloat16) : sizeof(float));
  const int64_t narrowed = ROWS_PER_PASS * PASS_WIDTH / std::max(head.width, PASS_WIDTH);
  const int64_t pass_rows = std::max(LEAST_ROWS, narrowed / LEAST_ROWS * LEAST_ROWS);
  for (int64_t m = 0; m < rows.count; m += pass_rows) {
    const Rows pass{static_cast<const char*>(rows.data) + m * row_bytes, rows.stride,
                    std::min(pass_rows, rows.count - m)};
    score_pass(head, pass, kernel, finish, out + m);
  }
}

}  // namespace

float log_score(double logit) {
  const double value = std::min(logit, 0.0) - std::log1p(std::exp(-std::abs(logit)));
  return static_cast<float>(value < LOG_FLOOR ? LOG_FLOOR : value);
}

void score_rows(const Head& head, const Rows& rows, float* out) { score_passes(head, rows, log_score, out); }

void logit_rows(const Head& head, const Rows& rows, float* out) {
  score_passes(head, rows, [](double logit) { return static_cast<float>(logit); }, out);
}

}  // namespace reflective
