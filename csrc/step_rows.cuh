// The rows that one launch of step_kernel scores: where their features are, and whose tallies their scores go to.
#pragma once

#include "step.cuh"

namespace reflective::gpu {
namespace {

// Whose step a row is.
struct Owner {
  int64_t sequence = 0, step = 0;
  int region = 0;

  __device__ int key() const { return key_of(sequence, region); }
};

// The rows of a step: those that wait in the slots, then the features of the steps that end now.
template <class H>
struct StepRows {
  using T = typename H::T;

  const Step<H>& step;
  const Found& found;
  int n_waiting, n_new;
  int n_octets = 0;  // of the new ones

  __device__ const T* operator()(int row) const {
    return row < n_waiting ? step.slot_row(row) : feature(row - n_waiting);
  }

  __device__ const T* feature(int i) const {
    const int64_t row = found.active[i] >> 1;
    return step.at_predict ? step.last_row(row, found.active[i] & 1) : step.hidden + row * step.hidden_stride;
  }

  __device__ int64_t state_row(int i) const {
    const uint32_t row = found.active[i] >> 1;
    return step.at_predict ? row : found.places[row] >> 1;
  }

  __device__ Owner owner(int row) const {
    if (row >= n_waiting) {
      const int64_t sequence = state_row(row - n_waiting);
      const int64_t* const seq = step.seq(sequence);
      return {sequence, seq[N_STEPS], region_of(seq[N_THINK], seq[N_END])};
    }
    const int32_t* const owner = step.state.slot_owner + row * OWNER_FIELDS;
    return {owner[OWNER_SEQUENCE], owner[OWNER_STEP], owner[OWNER_REGION]};
  }

  // For head_sm90.cuh: what waits has the first places, of the others 8 neighbours in last_hidden, or hidden, an octet.
  __device__ int octets() const { return octets_in_order() + n_octets; }

  __device__ int octets_in_order() const { return (n_waiting + 7) / 8; }

  template <class Maps>
  __device__ typename Maps::Octet octet(const Maps& maps, int octet) const {
    if (octet < octets_in_order()) return {&maps.eight, 0, 8 * octet};
    const uint32_t place = found.active[found.octets[octet - octets_in_order()]];
    return {&maps.scattered, step.at_predict ? static_cast<int>(place & 1) : 0, static_cast<int>(place >> 4 << 3)};
  }

  __device__ int row_at(int octet, int place) const {
    if (octet < octets_in_order()) return 8 * octet + place < n_waiting ? 8 * octet + place : -1;
    // Each lane reads the place of one row, and hands it to the others.
    const int begin = found.octets[octet - octets_in_order()], count = rows_in(octet), i = threadIdx.x % 8;
    const int mine = i < count ? place_of(octet, i) : -1;
    int row = -1;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (__shfl_sync(~0u, mine, j) == place) row = n_waiting + begin + j;
    }
    return row;
  }

  __device__ int rows_in(int octet) const {
    const int mine = octet - octets_in_order();
    return (mine + 1 < n_octets ? found.octets[mine + 1] : n_new) - found.octets[mine];
  }

  __device__ int few_of(int octet) const {
    const int count = rows_in(octet);
    return count <= 2 ? count : 0;
  }

  __device__ int place_of(int octet, int i) const {
    return static_cast<int>(found.active[found.octets[octet - octets_in_order()] + i] >> 1 & 7);
  }

  // Whether the new row `i` lies where the one before it does, and so in its octet.
  __device__ bool joins(int i) const {
    const uint32_t here = found.active[i], before = i > 0 ? found.active[i - 1] : ~here;
    return here >> 4 == before >> 4 && (!step.at_predict || (here & 1) == (before & 1));
  }

  // Fills found.octets; by all threads, who may read them when it returns.
  __device__ void find_octets() {
    const int lane = threadIdx.x % WARP;
    if (threadIdx.x < WARP) {
      for (int first = 0; first < n_new; first += WARP) {
        const int i = first + lane;
        const bool begins = i < n_new && !joins(i);
        const unsigned mates = __ballot_sync(~0u, begins);
        if (begins) found.octets[n_octets + __popc(mates & ((1u << lane) - 1))] = i;
        n_octets += __popc(mates);
      }
      if (lane == 0) found.scratch[SCRATCH_OCTETS] = n_octets;
    }
    __syncthreads();
    n_octets = found.scratch[SCRATCH_OCTETS];
  }
};

}  // namespace
}  // namespace reflective::gpu
