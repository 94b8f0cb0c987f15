#include "capability.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "target.h"
REFLECTIVE_TARGET("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
#include "score_rows_avx512.h"

namespace reflective {
namespace {

// Pairs of bfloat16 products, added in float32.
struct Avx512Bf16 : Avx512 {
  static constexpr int WIDTH = 32;

  static __m512bh load(const bfloat16* p) { return __m512bh(_mm512_loadu_si512(p)); }
  static __m512bh load_first(const bfloat16* p, int64_t n) {
    return __m512bh(_mm512_maskz_loadu_epi16((1u << n) - 1, p));
  }
  static __m512 multiply_add(__m512bh a, __m512bh b, __m512 c) { return _mm512_dpbf16_ps(c, a, b); }
};

}  // namespace

const ScoreKernel avx512_bf16_bfloat16{nullptr, nullptr, dot_partial_sums<Avx512Bf16, bfloat16, bfloat16>};

}  // namespace reflective
REFLECTIVE_TARGET_END
#endif
