// Activations by their curve on a CPU, written so that the compiler makes vectors of it. Included after a target pragma, as
// score_rows_dot.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "curve.h"
#include "score_rows.h"

namespace reflective {
namespace {

// 2^x for x in [-126, 126], or for the nearer end beyond: by a polynomial whose own error is 2e-9 of it.
inline float power_of_two(float x) {
  constexpr float ROUND = 12582912;  // 1.5 * 2^23: a sum with it has x, rounded, in its lowest bits
  x = x < -126 ? -126 : x;
  x = x > 126 ? 126 : x;
  const float rounded = x + ROUND, part = x - (rounded - ROUND);
  float power = 1.5353361959569156e-4f;
  power = power * part + 1.3398875016719103e-3f;
  power = power * part + 9.61843691766262e-3f;
  power = power * part + 5.5503323674201965e-2f;
  power = power * part + 2.4022647738456726e-1f;
  power = power * part + 6.931471824645996e-1f;
  power = power * part + 1;
  uint32_t bits, exponent;
  std::memcpy(&bits, &power, sizeof bits);
  std::memcpy(&exponent, &rounded, sizeof exponent);
  bits += exponent << 23;
  std::memcpy(&power, &bits, sizeof power);
  return power;
}

// act(z); NaN for NaN, whatever becomes of it within.
inline float activated(const Curve& curve, float z) {
  float s = z * z;
  s = s > Curve::MOST ? Curve::MOST : s;
  float y = curve.p[Curve::DEGREE];
  for (int i = Curve::DEGREE; i-- > 0;) y = y * s + curve.p[i];
  return z / (1 + power_of_two(-z * y));
}

// sum over a block's units k of act(z[k] + b1[k]) * w2[k], in a fixed order.
inline float curve_dot(const Curve& curve, const float* z, const float* b1, const float* w2) {
  float products[UNIT_BLOCK];
  for (int64_t u = 0; u < UNIT_BLOCK; ++u) products[u] = activated(curve, z[u] + b1[u]) * w2[u];
  for (int64_t half = UNIT_BLOCK / 2; half > 0; half /= 2) {
    for (int64_t u = 0; u < half; ++u) products[u] += products[u + half];
  }
  return products[0];
}

}  // namespace
}  // namespace reflective
