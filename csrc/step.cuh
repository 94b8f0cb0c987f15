// One token of each sequence: what a launch of step_kernel is given, and which sequences end a step with it.
#pragma once

#include "tallies.cuh"

namespace reflective::gpu {
namespace {

// The fields of one sequence that detection needs.
struct Position {
  int64_t automaton = 0, column = 0, pad = 0, start = 0, n_think = 0, n_end = 0;

  Position() = default;

  __device__ explicit Position(const int64_t* seq)
      : automaton(seq[AUTOMATON]),
        column(seq[SEEN]),
        pad(seq[PAD]),
        start(seq[START]),
        n_think(seq[N_THINK]),
        n_end(seq[N_END]) {}

  __device__ int region() const { return region_of(n_think, n_end); }

  __device__ bool is_text() const { return column >= pad; }

  __device__ bool is_step(int32_t entry) const { return entry & STEP && column - pad >= 2 && column >= start; }
};

__device__ __forceinline__ void copy_pieces(void* target, const void* source, int piece) {
  static_cast<uint4*>(target)[piece] = static_cast<const uint4*>(source)[piece];
}

template <class H>
struct Step {
  using T = typename H::T;

  H head;
  typename H::Maps maps;
  Ids ids;  // [batch, 1], or of an empty batch: a flush
  Segments segments;
  const T* hidden;
  int64_t hidden_stride;  // from sequence to sequence
  Automaton automaton;
  Stream state;
  bool at_predict;
  bool immediate;  // score all rows; else only the waiting ones, if fewer slots than `room` were left after this step
  // Of 16 bytes a row. An argument costs step_kernel no register while W1 streams, when all of them are taken.
  int pieces = head.width * static_cast<int>(sizeof(T)) / 16;
  int found_bytes, ring_bytes;
  int room, room_begin;
  const int32_t* room_end;  // if any, no more room is wanted than from room_begin to there

  __device__ int64_t id(int64_t b) const { return ids.data[b * ids.batch_stride]; }

  // Less than 0 for an id outside the vocabulary.
  __device__ int32_t token_class(int64_t id) const {
    return id >= 0 && id < automaton.vocabulary ? automaton.token_class[id] : -1;
  }

  // Less than 0 where the sequence is skipped.
  __device__ int64_t state_row(int64_t b) const {
    if (!segments.rows) return b;
    const int row = segments.rows[b];
    return row < state.sequences ? row : -1;
  }

  __device__ int64_t* seq(int64_t row) const { return state.seq + row * SEQ_FIELDS; }

  __device__ int wanted_room() const { return room_end ? max(0, min(room, *room_end - room_begin)) : room; }

  __device__ T* last_row(int64_t row, int64_t seen) const {
    return static_cast<T*>(state.last_hidden) + (2 * row + (seen & 1)) * head.width;
  }

  __device__ T* slot_row(int64_t slot) const { return static_cast<T*>(state.slots) + slot * head.width; }
};

constexpr int SCRATCH_BYTES = 128;
constexpr int TABLE = 1024;  // of an automaton's entries that are kept at hand, if they are no more
constexpr int FIXED_BYTES = SCRATCH_BYTES + TABLE * sizeof(int32_t) + GROUP_SUM_BYTES;
constexpr int SCRATCH_BIAS = 28, SCRATCH_OCTETS = 29, SCRATCH_LAST = 30, SCRATCH_WAITING = 31;  // of its ints; the first are the warps'
constexpr uint32_t SKIPPED = ~0u;

// What detection finds, of each sequence of the batch; in shared memory, from where the rest of the step takes it.
struct Found {
  uint32_t* active;  // [n_new]: 2 * row + (column & 1), the row of last_hidden with at_predict, else that of hidden
  uint32_t* places;  // [batch]: 2 * row + ((column + 1) & 1), where in last_hidden this token's state goes; or SKIPPED
  int32_t* entries;  // [batch]: the automaton's
  int* order;        // [batch]: which of the active ones
  int* octets;       // [n_octets]: the first of the active ones whose features lie within 8 neighbouring rows
  int* scratch;
  int32_t* table;  // [TABLE]

  __device__ float& bias() const { return reinterpret_cast<float*>(scratch)[SCRATCH_BIAS]; }

  __host__ __device__ static int bytes(int64_t batch) { return static_cast<int>((5 * batch * 4 + 127) / 128 * 128); }

  __device__ Found(unsigned char* shared, int batch)
      : active(reinterpret_cast<uint32_t*>(shared + FIXED_BYTES)),
        places(active + batch),
        entries(reinterpret_cast<int32_t*>(places + batch)),
        order(entries + batch),
        octets(order + batch),
        scratch(reinterpret_cast<int*>(shared)),
        table(reinterpret_cast<int32_t*>(shared + SCRATCH_BYTES)) {}
};

// All of a sequence that a step changes.
struct Sequence {
  Position at;
  int64_t row = 0, n_steps = 0, id = 0;
  uint64_t hash = 0;

  Sequence() = default;

  template <class H>
  __device__ Sequence(const Step<H>& step, int64_t row, int64_t id) : row(row), id(id) {
    const int64_t* const seq = step.seq(row);
    at = Position(seq), n_steps = seq[N_STEPS], hash = static_cast<uint64_t>(seq[HASH]);
  }

  // Of the batch's `b`; of none if that is less than 0, or skipped.
  template <class H>
  __device__ static Sequence of(const Step<H>& step, const Found& found, int b) {
    if (b < 0 || found.places[b] == SKIPPED) return {};
    return {step, found.places[b] >> 1, step.id(b)};
  }
};

// Fills `found`, and `mine` with sequence threadIdx.x of the batch, if it is one; returns how many sequences end a step now.
// Every block finds the same. Behind its last barrier only the last block to arrive reads seq and n_slots again, so that it
// may write them once all have arrived.
template <class H>
__device__ __forceinline__ int find_steps(const Step<H>& step, const Found& found, Sequence& mine) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, batch = static_cast<int>(step.ids.batch);
  const int states = static_cast<int>(step.automaton.states), n_entries = static_cast<int>(step.automaton.classes) * states;
  if (threadIdx.x == 0) found.scratch[SCRATCH_WAITING] = *step.state.n_slots;
  // b2, while there is other to wait for: behind the sums it would be waited for alone.
  if (threadIdx.x == H::COPIERS - 1) found.bias() = bias_of(step.head);
  int total = 0;
  for (int base = 0; base < batch; base += H::THREADS) {
    const int b = base + threadIdx.x;
    const int64_t row = b < batch ? step.state_row(b) : -1;
    int32_t token_class = -1, entry = 0;
    int64_t at_state = 0, column = 0;
    bool is_text = false, may_step = false;
    // The small table comes while the token's class does, not after it.
    constexpr int MINE = (TABLE + H::COPIERS - 1) / H::COPIERS;
    int32_t entries[MINE];
    const bool at_hand = n_entries <= TABLE, brings = base == 0 && at_hand && threadIdx.x < H::COPIERS;
    if (brings) {
#pragma unroll
      for (int i = 0; i < MINE; ++i) {
        const int place = i * H::COPIERS + threadIdx.x;
        entries[i] = place < n_entries ? step.automaton.transition[place] : 0;
      }
    }
    if (row >= 0) {
      const Sequence its(step, row, step.id(b));
      token_class = step.token_class(its.id);
      at_state = its.at.automaton, column = its.at.column, is_text = its.at.is_text(), may_step = its.at.is_step(STEP);
      if (base == 0) mine = its;
    }
    if (brings) {
#pragma unroll
      for (int i = 0; i < MINE; ++i) {
        const int place = i * H::COPIERS + threadIdx.x;
        if (place < n_entries) found.table[place] = entries[i];
      }
    }
    if (base == 0 && at_hand) __syncthreads();
    bool ends = false;
    uint32_t place = 0;
    if (b < batch) found.places[b] = SKIPPED;
    if (row >= 0) {
      const int64_t which = static_cast<int64_t>(token_class) * states + at_state;
      if (is_text && token_class >= 0) entry = at_hand ? found.table[which] : step.automaton.transition[which];
      ends = may_step && (entry & STEP);
      place = static_cast<uint32_t>(2 * (step.at_predict ? row : b) + (column & 1));
      found.places[b] = static_cast<uint32_t>(2 * row + ((column + 1) & 1));
      found.entries[b] = entry;
    }
    const unsigned mates = __ballot_sync(~0u, ends);
    if (base > 0) __syncthreads();  // scratch, with the warps' counts of the sequences before, has been read by all
    if (lane == 0) found.scratch[warp] = __popc(mates);
    __syncthreads();
    int before = total;
    for (int w = 0; w < H::THREADS / WARP; ++w) {
      before += w < warp ? found.scratch[w] : 0;
      total += found.scratch[w];
    }
    const int index = before + __popc(mates & ((1u << lane) - 1));
    if (ends) found.active[index] = place, found.order[b] = index;
  }
  __syncthreads();
  return total;
}

}  // namespace
}  // namespace reflective::gpu
