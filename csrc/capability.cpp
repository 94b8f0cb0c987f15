#include "capability.h"

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <stdexcept>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace reflective {
namespace {

bool always() { return true; }

#if defined(__x86_64__)
// __builtin_cpu_supports asks the operating system too (XCR0).
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

bool has_amx() {
#if defined(__linux__)
  constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24;
  unsigned a, b, c, d;
  if (!has_avx512() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if ((d & (AMX_BF16 | AMX_TILE)) != (AMX_BF16 | AMX_TILE)) return false;
  // The kernel keeps tile registers only for a process that asked; it refuses where it does not know them.
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
  return false;
#endif
}
#endif

// Best first. The emulated tiles are a check of the tile kernel for machines without any: only taken when named.
const Capability CAPABILITIES[] = {
#if defined(__x86_64__)
    {"amx", has_amx, &avx512_float32, &amx_bfloat16},
    {"avx512_bf16", has_avx512_bf16, &avx512_float32, &avx512_bf16_bfloat16},
    {"avx512", has_avx512, &avx512_float32, &avx512_bfloat16},
    {"avx2", has_avx2, &avx2_float32, &avx2_bfloat16},
#endif
    {"portable", always, &portable_float32, &portable_bfloat16},
    {"amx_emulated", always, &portable_float32, &amx_emulated_bfloat16},
};

const Capability& find(const std::string& name) {
  std::string available;
  for (const Capability& candidate : CAPABILITIES) {
    const bool supported = candidate.supported();
    if (name == candidate.name && supported) return candidate;
    if (name == candidate.name) {
      throw std::runtime_error("CPU capability '" + name + "' was asked for, but this processor does not have it");
    }
    if (supported) available += std::string(available.empty() ? "" : ", ") + candidate.name;
  }
  throw std::runtime_error("there is no CPU capability '" + name + "'; this processor has " + available);
}

// Whether a bfloat16 kernel gives what the emulated tiles give on a small head whose sizes are no multiples of a tile.
bool agrees_with_emulation(const ScoreKernel& kernel) {
  constexpr int64_t UNITS = 40, WIDTH = 70, COUNT = 19;
  auto values = [](int64_t n, uint32_t seed) {
    std::vector<bfloat16> v(n);
    for (bfloat16& x : v) {
      seed = seed * 1664525u + 1013904223u;
      x = static_cast<bfloat16>((seed >> 16 & 0x8000) | (0x3E80 + (seed >> 24)));  // +-[0.25, 1)
    }
    return v;
  };
  const auto w1 = values(UNITS * WIDTH, 1), b1 = values(UNITS, 2), w2 = values(UNITS, 3), b2 = values(1, 4);
  const auto features = values(COUNT * WIDTH, 5);
  const Head head{w1.data(), b1.data(), w2.data(), b2.data(), UNITS, WIDTH, HeadType::bfloat16};
  const Rows rows{features.data(), WIDTH, COUNT};
  auto partial_sums = [&](const ScoreKernel& k) {
    std::vector<char> packed(k.packed_bytes(COUNT, WIDTH));
    std::vector<float> sums(COUNT * unit_blocks(UNITS));
    k.pack(rows, WIDTH, packed.data());
    k.partial_sums(head, {packed.data(), WIDTH, COUNT}, 0, unit_blocks(UNITS), sums.data());
    return sums;
  };
  const std::vector<float> got = partial_sums(kernel), expected = partial_sums(amx_emulated_bfloat16);
  for (size_t i = 0; i < got.size(); ++i) {
    if (!(std::abs(got[i] - expected[i]) <= 1e-3f * (1.0f + std::abs(expected[i])))) return false;
  }
  return true;
}

const Capability* initial() {
  if (const char* name = std::getenv("REFLECTIVE_CPU_CAPABILITY")) return &find(name);
  const Capability* best = CAPABILITIES;
  // The tile kernel was written without a processor that has tiles: where one is found, it proves itself first.
  while (!best->supported() || (best->bfloat16 == &amx_bfloat16 && !agrees_with_emulation(amx_bfloat16))) ++best;
  return best;
}

std::atomic<const Capability*>& current() {
  static std::atomic<const Capability*> value{initial()};
  return value;
}

}  // namespace

const Capability& capability() { return *current().load(std::memory_order_relaxed); }

std::string compiled_capabilities() {
  std::string names;
  for (const Capability& candidate : CAPABILITIES) {
    if (candidate.bfloat16 != &amx_emulated_bfloat16) names += std::string(names.empty() ? "" : ", ") + candidate.name;
  }
  return names;
}

void set_capability(const std::string& name) { current().store(&find(name), std::memory_order_relaxed); }

}  // namespace reflective
