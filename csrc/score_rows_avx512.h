// The float32 vector of the AVX-512 kernels. Included after a target pragma.
#pragma once

#include "score_rows_dot.h"

namespace reflective {
namespace {

struct Avx512 {
  using Sum = __m512;
  static constexpr int WIDTH = 16;
  static constexpr int64_t WIDEST = 16384;
  static constexpr int ROWS = 4;  // 4 x 4 sums, 4 rows and 1 weight are 21 of the 32 registers

  static __m512 zero() { return _mm512_setzero_ps(); }
  static __m512 load(const float* p) { return _mm512_loadu_ps(p); }
  static __m512 load_first(const float* p, int64_t n) { return _mm512_maskz_loadu_ps((1u << n) - 1, p); }
  static __m512 load(const bfloat16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static __m512 load_first(const bfloat16* p, int64_t n) { return widen(_mm256_maskz_loadu_epi16((1u << n) - 1, p)); }
  static __m512 widen(__m256i bits) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)); }
  static __m512 multiply_add(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }

  // Lanes i + (i + 8), then i + (i + 4), i + (i + 2), i + (i + 1), for four vectors at a time.
  static void store_sums(const __m512* s, float* out) {
    const __m512 ab = fold<0x44, 0xEE>(s[0], s[1]), cd = fold<0x44, 0xEE>(s[2], s[3]);
    __m512 v = fold<0x88, 0xDD>(ab, cd);  // 4 lanes of each
    v = _mm512_add_ps(v, _mm512_permute_ps(v, 0x4E));
    v = _mm512_add_ps(v, _mm512_permute_ps(v, 0xB1));
    _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, v)));
  }
  template <int LOW, int HIGH>
  static __m512 fold(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, LOW), _mm512_shuffle_f32x4(a, b, HIGH));
  }

  static float relu_dot(const float* z, const float* b1, const float* w2) {
    __m512 total = zero();
    for (int64_t u = 0; u < UNIT_BLOCK; u += WIDTH) {
      const __m512 v = _mm512_max_ps(zero(), _mm512_add_ps(load(z + u), load(b1 + u)));  // max(0, NaN) is NaN
      total = multiply_add(v, load(w2 + u), total);
    }
    return _mm512_reduce_add_ps(total);
  }
};

}  // namespace
}  // namespace reflective
