// The kernel for every processor: the compiler's own vectors, lowered to whatever the target has.
#include "capability.h"
#include "score_rows_dot.h"

namespace reflective {
namespace {

struct Portable {
  typedef float Sum __attribute__((vector_size(16)));
  static constexpr int WIDTH = 4;
  static constexpr int64_t WIDEST = 2048;
  static constexpr int ROWS = 2;

  static Sum zero() { return Sum{}; }
  static Sum load(const float* p) {
    Sum v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static Sum load(const bfloat16* p) {
    bfloat16 __attribute__((vector_size(8))) halves;
    uint32_t __attribute__((vector_size(16))) bits;
    std::memcpy(&halves, p, sizeof halves);
    bits = __builtin_convertvector(halves, decltype(bits)) << 16;
    return reinterpret_cast<Sum>(bits);
  }
  template <class T>
  static Sum load_first(const T* p, int64_t n) {
    T padded[WIDTH] = {};
    std::memcpy(padded, p, n * sizeof(T));
    return load(padded);
  }
  static Sum multiply_add(Sum a, Sum b, Sum c) { return a * b + c; }
  static float sum(Sum v) { return (v[0] + v[2]) + (v[1] + v[3]); }
  static void store_sums(const Sum* sums, float* out) {
    for (int u = 0; u < 4; ++u) out[u] = sum(sums[u]);
  }
  static float relu_dot(const float* z, const float* b1, const float* w2) {
    Sum total = zero();
    for (int64_t u = 0; u < UNIT_BLOCK; u += WIDTH) {
      const Sum v = load(z + u) + load(b1 + u);
      total = multiply_add(v < zero() ? zero() : v, load(w2 + u), total);  // a NaN is not below zero and stays
    }
    return sum(total);
  }
};

}  // namespace

const ScoreKernel portable_float32{nullptr, nullptr, dot_partial_sums<Portable, float, float>};
const ScoreKernel portable_bfloat16{float_bytes, pack_as_float, dot_partial_sums<Portable, float, bfloat16>};

}  // namespace reflective
