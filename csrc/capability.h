// Which instructions the kernels use: the best that the processor has, or what REFLECTIVE_CPU_CAPABILITY names.
#pragma once

#include <string>

#include "score_rows.h"

namespace reflective {

struct Capability {
  const char* name;
  bool (*supported)();
  const ScoreKernel* float32;
  const ScoreKernel* bfloat16;
};

// The one in use. The first call reads REFLECTIVE_CPU_CAPABILITY and throws std::runtime_error for a name that does not
// exist or that this processor lacks.
const Capability& capability();

// Names of all that were compiled in, best first, without the emulation.
std::string compiled_capabilities();

// Replaces the one in use from the next call on; throws as above and then changes nothing.
void set_capability(const std::string& name);

// Defined by the file of each kernel; the x86 ones exist on x86-64 only.
extern const ScoreKernel portable_float32, portable_bfloat16, amx_emulated_bfloat16;
extern const ScoreKernel avx2_float32, avx2_bfloat16, avx512_float32, avx512_bfloat16, avx512_bf16_bfloat16,
    amx_bfloat16;

}  // namespace reflective
