// The step automaton over many tokens of one sequence. Shared by step_mask and decode_step.
#pragma once

#include "automaton.h"
#include "gpu.cuh"

namespace reflective::gpu {

constexpr int WALK_THREADS = 128;
constexpr int WALK_SHARED_BYTES = WALK_THREADS * (sizeof(int64_t) + sizeof(int32_t));

// visit(j, id, entries) for j = begin, .. end - 1 in every thread, where entries[state] is the automaton's entry; null
// for an id outside the vocabulary. One state after the other cannot be hurried, but what each token needs of the
// tables can: 128 tokens at a time are looked up side by side, and a step of the walk costs two reads of nearby memory.
template <class Visit>
__device__ __forceinline__ void walk(const Ids& ids, const Automaton& automaton, int64_t b, int64_t begin, int64_t end,
                                     const Visit& visit) {
  int64_t* const chunk_ids = reinterpret_cast<int64_t*>(shared_memory());
  int32_t* const chunk_class = reinterpret_cast<int32_t*>(chunk_ids + WALK_THREADS);
  for (int64_t chunk = begin; chunk < end; chunk += WALK_THREADS) {
    const int64_t mine = chunk + threadIdx.x;
    __syncthreads();  // the chunk before has been visited by all
    if (mine < end) {
      const int64_t id = ids.data[b * ids.batch_stride + mine * ids.stride];
      chunk_ids[threadIdx.x] = id;
      chunk_class[threadIdx.x] = id >= 0 && id < automaton.vocabulary ? automaton.token_class[id] : -1;
    }
    __syncthreads();
    const int n = static_cast<int>(end - chunk < WALK_THREADS ? end - chunk : WALK_THREADS);
    for (int i = 0; i < n; ++i) {
      const int32_t row = chunk_class[i];
      visit(chunk + i, chunk_ids[i], row < 0 ? nullptr : automaton.transition + row * automaton.states);
    }
  }
}

}  // namespace reflective::gpu
