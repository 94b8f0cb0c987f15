// Where each number of the stream's state and of the step automaton lives: the mirror of kernels/layout.py, which
// explains them. One constant a line; tests/test_build.py compares the two files.
#pragma once

#include <cstdint>

namespace reflective {

constexpr int64_t AUTOMATON = 0;
constexpr int64_t SEEN = 1;
constexpr int64_t PAD = 2;
constexpr int64_t START = 3;
constexpr int64_t N_THINK = 4;
constexpr int64_t N_END = 5;
constexpr int64_t HASH = 6;
constexpr int64_t N_STEPS = 7;
constexpr int64_t SEQ_FIELDS = 8;

constexpr int64_t COUNT = 0;
constexpr int64_t LOG_SUM = 1;
constexpr int64_t MIN = 2;
constexpr int64_t LAST = 3;
constexpr int64_t TALLY_FIELDS = 4;

constexpr int64_t AFTER_THINK = 1;
constexpr int64_t AFTER_END = 2;
constexpr int64_t N_REGIONS = 4;

constexpr int64_t OWNER_SEQUENCE = 0;
constexpr int64_t OWNER_STEP = 1;
constexpr int64_t OWNER_REGION = 2;
constexpr int64_t OWNER_FIELDS = 3;

constexpr int64_t NEXT_STATE = 0xFFFF;
constexpr int64_t STEP = 1 << 16;
constexpr int64_t THINK = 1 << 17;
constexpr int64_t END = 1 << 18;

constexpr int64_t WORKSPACE_HEADER = 64;
constexpr int64_t UNIT_GROUP = 16;

// Floats of workspace that scoring `rows` rows at once takes at most, for a head of `units` units.
inline int64_t workspace_size(int64_t rows, int64_t units) {
  return WORKSPACE_HEADER + rows * ((units + UNIT_GROUP - 1) / UNIT_GROUP + 4);
}

constexpr int64_t RELU = 0;
constexpr int64_t GELU = 1;
constexpr int64_t GELU_TANH = 2;
constexpr int64_t SILU = 3;

constexpr uint64_t HASH_FACTOR = 6364136223846793005;
constexpr double LOG_FLOOR = -23.025850929940457;  // ln 1e-10

}  // namespace reflective
