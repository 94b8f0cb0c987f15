// Scores into the tallies and the step logs of their owners. Shared by decode_step, flush and tally_slots.
#pragma once

#include <string>

#include "launch.cuh"

namespace reflective::gpu {
namespace {

__device__ __forceinline__ int region_of(int64_t n_think, int64_t n_end) {
  return (n_think > 0 ? AFTER_THINK : 0) + (n_end > 0 ? AFTER_END : 0);
}

// A sequence's tally of one region.
__device__ __forceinline__ int key_of(int64_t sequence, int region) {
  return static_cast<int>(sequence * N_REGIONS) + region;
}

// slots[slot] is the feature of this step.
__device__ __forceinline__ void own_slot(const Stream& state, int64_t slot, int64_t sequence, int64_t step,
                                         int region) {
  int32_t* const owner = state.slot_owner + slot * OWNER_FIELDS;
  owner[OWNER_SEQUENCE] = static_cast<int32_t>(sequence);
  owner[OWNER_STEP] = static_cast<int32_t>(step);
  owner[OWNER_REGION] = region;
}

// The step's column and region; steps past log_capacity are in the tallies alone, as is their score.
__device__ __forceinline__ void log_step(const Stream& state, int64_t sequence, int64_t step, int64_t column,
                                         int region) {
  if (step < state.log_capacity) {
    state.step_column[sequence * state.log_capacity + step] = static_cast<int32_t>(column);
    state.step_region[sequence * state.log_capacity + step] = static_cast<int8_t>(region);
  }
}

__device__ __forceinline__ void log_score_of(const Stream& state, int64_t sequence, int64_t step, float score) {
  if (step < state.log_capacity) state.step_score[sequence * state.log_capacity + step] = score;
}

// One row of `tally`.
struct Tally {
  double n = 0, log_sum = 0, least = 0, last = 0;

  Tally() = default;

  __device__ Tally(const Stream& state, int key) {
    const double* const at = state.tally + static_cast<int64_t>(key) * TALLY_FIELDS;
    n = at[COUNT], log_sum = at[LOG_SUM], least = at[MIN], last = at[LAST];
  }

  __device__ void add(double score) {
    if (n == 0 || score < least || score != score) least = score;  // as torch.minimum: a NaN stays
    n += 1;
    log_sum += score;
    last = score;
  }

  __device__ void write(const Stream& state, int key) const {
    double* const at = state.tally + static_cast<int64_t>(key) * TALLY_FIELDS;
    at[COUNT] = n, at[LOG_SUM] = log_sum, at[MIN] = least, at[LAST] = last;
  }
};

// The rows that are to be tallied, in shared memory.
struct Scored {
  float* scores;
  int* keys;  // see key_of
  int* next;  // the next row of the same key, or -1

  __host__ __device__ static int64_t bytes(int64_t rows) { return 3 * 4 * ((rows + 3) / 4 * 4); }

  __device__ Scored(unsigned char* shared, int rows)
      : scores(reinterpret_cast<float*>(shared)),
        keys(reinterpret_cast<int*>(scores + (rows + 3) / 4 * 4)),
        next(keys + (rows + 3) / 4 * 4) {}

  // The last row before `row` of its key, or -1. Four keys a read: this is a search of as many steps as there are rows.
  __device__ int before(int row) const {
    const int key = keys[row];
    for (int j = row / 4 * 4; j >= 0; j -= 4) {
      const int4 four = *reinterpret_cast<const int4*>(keys + j);
      if (four.w == key && j + 3 < row) return j + 3;
      if (four.z == key && j + 2 < row) return j + 2;
      if (four.y == key && j + 1 < row) return j + 1;
      if (four.x == key && j < row) return j;
    }
    return -1;
  }
};

// scores[i], in order of i, into the tally at keys[i], by one block whose threads see keys, scores, and next = -1. The
// first row of a key does the work of all of its rows. `mine`: the tally of row threadIdx.x, asked for earlier.
__device__ __forceinline__ void add_to_tallies(const Stream& state, const Scored& rows, int count, bool keys_differ,
                                               const Tally& mine) {
  uint64_t follows = 0;  // a bit for each of this thread's rows
  if (!keys_differ) {
    for (int i = threadIdx.x, bit = 0; i < count; i += blockDim.x, ++bit) {
      const int before = rows.before(i);
      if (before >= 0) rows.next[before] = i, follows |= uint64_t{1} << bit;
    }
    __syncthreads();
  }
  for (int i = threadIdx.x, bit = 0; i < count; i += blockDim.x, ++bit) {
    if (follows >> bit & 1) continue;
    const int key = rows.keys[i];
    Tally tally = bit == 0 ? mine : Tally(state, key);
    for (int j = i; j >= 0; j = rows.next[j]) tally.add(rows.scores[j]);
    tally.write(state, key);
  }
}

// Throws if a block's `bytes` of shared memory do not hold `rows` rows that are to be tallied.
inline void check_fits(int64_t rows, int64_t bytes) {
  if (Scored::bytes(rows) > bytes) {
    throw std::runtime_error("slots and sequences are " + std::to_string(rows) + " rows; this GPU's blocks can tally " +
                             std::to_string(bytes / Scored::bytes(4) * 4));
  }
}

}  // namespace
}  // namespace reflective::gpu
