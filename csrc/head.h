// A head of one hidden layer and the rows it is used on, as every kernel takes them.
#pragma once

#include <cstdint>

#include "layout.h"

namespace reflective {

// What W1 and, after an underscore, the features are made of. b1, w2 and b2 are float32 beside an e4m3 W1, else as W1.
enum class HeadType { float32, bfloat16, float16, e4m3_bfloat16, e4m3_float16 };

// W1 as nn.Linear stores it.
struct Head {
  const void* w1;  // [units, width]
  const void* b1;  // [units]
  const void* w2;  // [units]
  const void* b2;  // [1], or null for none
  int64_t units, width;
  HeadType type;
  int64_t activation = RELU;

  bool is_bfloat16() const { return type == HeadType::bfloat16; }
};

// [count, width] in the head's dtype, rows `stride` elements apart.
struct Rows {
  const void* data;
  int64_t stride, count;
};

}  // namespace reflective
