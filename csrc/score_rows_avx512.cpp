#include "capability.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "target.h"
REFLECTIVE_TARGET("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq")
#include "score_rows_avx512.h"

namespace reflective {

const ScoreKernel avx512_float32{nullptr, nullptr, dot_partial_sums<Avx512, float, float>};
const ScoreKernel avx512_bfloat16{float_bytes, pack_as_float, dot_partial_sums<Avx512, float, bfloat16>};

}  // namespace reflective
REFLECTIVE_TARGET_END
#endif
