#include "capability.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "target.h"
REFLECTIVE_TARGET("avx2,fma")
#include "score_rows_dot.h"

namespace reflective {
namespace {

struct Avx2 {
  using Sum = __m256;
  static constexpr int WIDTH = 8;
  static constexpr int64_t WIDEST = 8192;
  static constexpr int ROWS = 2;  // 2 x 4 sums, 2 rows and 1 weight are 11 of the 16 registers

  static __m256 zero() { return _mm256_setzero_ps(); }
  static __m256 load(const float* p) { return _mm256_loadu_ps(p); }
  static __m256 load(const bfloat16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  template <class T>
  static __m256 load_first(const T* p, int64_t n) {
    T padded[WIDTH] = {};
    std::memcpy(padded, p, n * sizeof(T));
    return load(padded);
  }
  static __m256 multiply_add(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
  // Lanes i + (i + 4), then i + (i + 2), then i + (i + 1), for four vectors at a time.
  static void store_sums(const __m256* s, float* out) {
    __m128 half[4];
    for (int u = 0; u < 4; ++u) half[u] = _mm_add_ps(_mm256_castps256_ps128(s[u]), _mm256_extractf128_ps(s[u], 1));
    const __m128 ab = _mm_add_ps(_mm_unpacklo_ps(half[0], half[1]), _mm_unpackhi_ps(half[0], half[1]));
    const __m128 cd = _mm_add_ps(_mm_unpacklo_ps(half[2], half[3]), _mm_unpackhi_ps(half[2], half[3]));
    _mm_storeu_ps(out, _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab)));
  }
  static float relu_dot(const float* z, const float* b1, const float* w2) {
    __m256 total[4] = {zero(), zero(), zero(), zero()};
    for (int64_t u = 0; u < UNIT_BLOCK; u += WIDTH) {
      const __m256 v = _mm256_max_ps(zero(), _mm256_add_ps(load(z + u), load(b1 + u)));  // max(0, NaN) is NaN
      total[0] = multiply_add(v, load(w2 + u), total[0]);
    }
    float sums[4];
    store_sums(total, sums);
    return sums[0];
  }
};

}  // namespace

const ScoreKernel avx2_float32{nullptr, nullptr, dot_partial_sums<Avx2, float, float>};
const ScoreKernel avx2_bfloat16{float_bytes, pack_as_float, dot_partial_sums<Avx2, float, bfloat16>};

}  // namespace reflective
REFLECTIVE_TARGET_END
#endif
