// Many tokens a sequence: the kernel that finds their steps and keeps the features in slots, for step_kernel to score.
#pragma once

#include "step.cuh"
#include "token_walk.cuh"

namespace reflective::gpu {
namespace {

constexpr int DETECT_SHARED_BYTES = WALK_SHARED_BYTES + 16;

// Columns [begin, end) of one sequence a block, as far as they are its own; steps to the next free slots, of which
// there are enough for those from column `quiet` on. No step before it counts. Rows of one sequence come in step order,
// sequences in any; no result depends on which.
template <class H>
__global__ void __launch_bounds__(WALK_THREADS, 8)
    detect_kernel(const __grid_constant__ Step<H> step, int64_t hidden_token_stride, int64_t begin, int64_t end,
                  int64_t quiet) {
  const Stream& state = step.state;
  int* const shared_slot = reinterpret_cast<int*>(shared_memory() + WALK_SHARED_BYTES);
  const int64_t b = blockIdx.x, row = step.state_row(b);
  const int32_t* const bounds = step.segments.cu_seqlens;
  const int64_t first = bounds ? bounds[b] : 0;
  if (bounds) begin = begin > first ? begin : first, end = end < bounds[b + 1] ? end : bounds[b + 1];
  if (row < 0 || begin >= end) return;
  int64_t* const seq = step.seq(row);
  const auto hidden_row = [&](int64_t j) { return step.hidden + b * step.hidden_stride + j * hidden_token_stride; };
  Position at(seq);
  int64_t n_think = seq[N_THINK], n_end = seq[N_END], n_steps = seq[N_STEPS];
  uint64_t hash = static_cast<uint64_t>(seq[HASH]);

  walk(step.ids, step.automaton, b, begin, end, [&](int64_t j, int64_t id, const int32_t* entries) {
    const int32_t entry = at.is_text() && entries ? entries[at.automaton] : 0;
    if (j >= quiet && at.is_step(entry)) {
      if (threadIdx.x == 0) *shared_slot = atomicAdd(state.n_slots, 1);
      __syncthreads();
      const int slot = *shared_slot;
      const auto* const feature = !step.at_predict ? hidden_row(j)
                                  : j > first      ? hidden_row(j - 1)
                                                   : step.last_row(row, at.column);
      for (int piece = threadIdx.x; piece < step.pieces; piece += WALK_THREADS)
        copy_pieces(step.slot_row(slot), feature, piece);
      if (threadIdx.x == 0) {
        const int region = region_of(n_think, n_end);
        own_slot(state, slot, row, n_steps, region);
        log_step(state, row, n_steps, at.column, region);
      }
      n_steps += 1;
      __syncthreads();  // shared_slot has been read by all, before the next step writes it
    }
    if (at.is_text()) at.automaton = entry & NEXT_STATE;
    n_think += (entry & THINK) != 0;
    n_end += (entry & END) != 0;
    hash = hash * HASH_FACTOR + static_cast<uint64_t>(id) + 1;
    at.column += 1;
  });
  __syncthreads();  // seq has been read by all threads, and so has last_hidden, whose half below may be the one they read
  for (int piece = threadIdx.x; piece < step.pieces; piece += WALK_THREADS) {
    copy_pieces(step.last_row(row, at.column), hidden_row(end - 1), piece);
  }
  if (threadIdx.x == 0) {
    seq[AUTOMATON] = at.automaton, seq[SEEN] = at.column, seq[N_THINK] = n_think, seq[N_END] = n_end;
    seq[N_STEPS] = n_steps, seq[HASH] = static_cast<int64_t>(hash);
  }
}

}  // namespace
}  // namespace reflective::gpu
