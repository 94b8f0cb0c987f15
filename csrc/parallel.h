// Torch's thread pool, without a torch header: defined in bindings.cpp.
#pragma once

#include <cstdint>

namespace reflective {

using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);

// Calls `function` on disjoint ranges of at least `grain` indices that cover [0, n), on this thread alone if n <= grain
void parallel_for(int64_t n, int64_t grain, RangeFunction function, void* context);

template <class Body>
void parallel_for(int64_t n, int64_t grain, const Body& body) {
  parallel_for(
      n, grain, [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<Body*>(&body));
}

}  // namespace reflective
