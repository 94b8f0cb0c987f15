#include "gpu.cuh"
#include "gpu_ops.h"
#include "token_walk.cuh"

namespace reflective::gpu {
namespace {

// One block a sequence: a walk that notes steps and tags, then a pass over the mask once it is known where the tags
// are.
__global__ void __launch_bounds__(WALK_THREADS)
    step_mask_kernel(Ids ids, Automaton automaton, const int64_t* pad, const int64_t* length, const int64_t* start,
                     bool* mask) {
  const int64_t b = blockIdx.x;
  const auto clamp = [](int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; };
  const int64_t begin = clamp(pad[b], 0, ids.length), end = clamp(length[b], begin, ids.length);
  bool* const out = mask + b * ids.length;
  int state = 0, n_think = 0, n_end = 0;
  int64_t think = 0, close = 0;
  walk(ids, automaton, b, begin, end, [&](int64_t t, int64_t, const int32_t* entries) {
    const int entry = entries ? entries[state] : 0;
    state = entry & static_cast<int>(NEXT_STATE);
    if (threadIdx.x == 0) out[t] = (entry & STEP) != 0;
    if (entry & THINK && n_think++ == 0) think = t;
    if (entry & END && n_end++ == 0) close = t;
  });
  __syncthreads();  // the marks are read below by other threads than wrote them

  const int64_t first = n_think == 1 ? think + 2 : pad[b] + 2;
  const int64_t low = first > start[b] ? first : start[b], high = n_end == 1 ? close : length[b];
  for (int64_t t = threadIdx.x; t < ids.length; t += WALK_THREADS) {
    out[t] = t >= begin && t < end && t >= low && t <= high && out[t];
  }
}

}  // namespace

void step_mask(const Ids& ids, const Automaton& automaton, const int64_t* pad, const int64_t* length,
               const int64_t* start, bool* mask, cudaStream_t stream) {
  if (ids.batch == 0 || ids.length == 0) return;
  launch(step_mask_kernel, dim3(static_cast<unsigned>(ids.batch)), WALK_THREADS, WALK_SHARED_BYTES, stream, ids,
         automaton, pad, length, start, mask);
}

}  // namespace reflective::gpu
