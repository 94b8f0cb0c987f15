// The activations that are not ReLU, as one curve of seven numbers, so that a kernel compiled once has all of them:
//
//     act(z) = z / (1 + 2^-y),   y = z P(min(z^2, MOST)),   P(s) = p[0] + p[1] s + ... + p[6] s^6
//
// SiLU is that with a constant P, GELU by tanh with a linear one: (1 + tanh(y)) / 2 = 1 / (1 + e^-2y). The exact GELU is z
// Phi(z), of the normal distribution; the logarithm of Phi(z) / Phi(-z) is odd, and z times the polynomial below, which was
// fitted to it in float64 with the least greatest error of act(z) / z: 2.9e-8, half of what float32 rounds 1 by. MOST = 5.5^2:
// beyond, either GELU is z in float32, or on the other side of 0 no more than 4e-8 away from its own value.
#pragma once

#include <cstdint>

#include "layout.h"

namespace reflective {

struct Curve {
  static constexpr int DEGREE = 6;
  static constexpr float MOST = 30.25f;

  float p[DEGREE + 1];
};

// Of a head's `activation`, which is not RELU.
inline Curve curve_of(int64_t activation) {
  switch (activation) {
    case GELU:
      return {2.3022093772888184f,     0.10483512282371521f,     -9.4049253675621e-05f,  -0.00015957992582116276f,
              1.1439832633186597e-05f, -3.8163125282153487e-07f, 5.067236408251574e-09f};
    case GELU_TANH: return {2.302208185195923f, 0.10294324159622192f};  // 2 log2(e) sqrt(2 / pi) (1, 0.044715)
    default: return {1.4426950408889634f};                              // log2(e)
  }
}

}  // namespace reflective
