// decode_step, flush and tally_slots.
#include "launch.cuh"
#include "token_walk.cuh"

namespace reflective::gpu {
namespace {

// -- pieces ----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ int region_of(int64_t n_think, int64_t n_end) {
  return (n_think > 0 ? AFTER_THINK : 0) + (n_end > 0 ? AFTER_END : 0);
}

// A sequence's tally of one region.
__device__ __forceinline__ int key_of(int64_t sequence, int region) {
  return static_cast<int>(sequence * N_REGIONS) + region;
}

// The fields of one sequence that detection needs.
struct Position {
  int64_t automaton, column, pad, start;
  int region;

  __device__ explicit Position(const int64_t* seq)
      : automaton(seq[AUTOMATON]),
        column(seq[SEEN]),
        pad(seq[PAD]),
        start(seq[START]),
        region(region_of(seq[N_THINK], seq[N_END])) {}

  __device__ bool is_text() const { return column >= pad; }

  __device__ bool is_step(int32_t entry) const { return entry & STEP && column - pad >= 2 && column >= start; }
};

__device__ __forceinline__ void copy_pieces(void* target, const void* source, int piece) {
  static_cast<uint4*>(target)[piece] = static_cast<const uint4*>(source)[piece];
}

__device__ __forceinline__ void own_slot(const Stream& state, int64_t slot, int64_t sequence, int64_t step,
                                         int region) {
  int32_t* const owner = state.slot_owner + slot * OWNER_FIELDS;
  owner[OWNER_SEQUENCE] = static_cast<int32_t>(sequence);
  owner[OWNER_STEP] = static_cast<int32_t>(step);
  owner[OWNER_REGION] = region;
}

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

// scores[i], in order of i, into the tally at keys[i], see key_of, by one block; both in shared
// memory. The first row of a key does the work of all of its rows.
__device__ void add_to_tallies(const Stream& state, const float* scores, const int* keys, int count, bool keys_differ) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const int key = keys[i];
    bool first = true;
    if (!keys_differ) {
      for (int j = 0; j < i; ++j) first &= keys[j] != key;
    }
    if (!first) continue;
    double* const tally = state.tally + static_cast<int64_t>(key) * TALLY_FIELDS;
    double n = tally[COUNT], log_sum = tally[LOG_SUM], least = tally[MIN], last = tally[LAST];
    for (int j = i; j < (keys_differ ? i + 1 : count); ++j) {
      if (keys[j] != key) continue;
      const double score = scores[j];
      if (n == 0 || score < least || score != score) least = score;  // as torch.minimum: a NaN stays
      n += 1;
      log_sum += score;
      last = score;
    }
    tally[COUNT] = n, tally[LOG_SUM] = log_sum, tally[MIN] = least, tally[LAST] = last;
  }
}

// -- one token a sequence --------------------------------------------------------------------------------------------

template <class H>
struct Step {
  using T = typename H::T;

  H head;
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
  int active_bytes, ring_bytes;
  int room, room_begin;
  const int32_t* room_end;  // if any, no more room is wanted than from room_begin to there

  __device__ int32_t entry(int64_t b, const Position& at) const {
    if (!at.is_text()) return 0;
    const int64_t id = ids.data[b * ids.batch_stride];
    const bool known = id >= 0 && id < automaton.vocabulary;
    return known ? automaton.transition[automaton.token_class[id] * automaton.states + at.automaton] : 0;
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

// The rows of a step: those that wait in the slots, then the features of the steps that end now.
template <class H>
struct StepRows {
  using T = typename H::T;

  const Step<H>& step;
  const uint32_t* active;  // 2 * row + (column & 1), the row of last_hidden with at_predict, else that of hidden
  int n_waiting;

  __device__ const T* operator()(int row) const {
    return row < n_waiting ? step.slot_row(row) : feature(row - n_waiting);
  }

  __device__ const T* feature(int i) const {
    const int64_t row = active[i] >> 1;
    return step.at_predict ? step.last_row(row, active[i] & 1) : step.hidden + row * step.hidden_stride;
  }

  __device__ int64_t state_row(int i) const {
    const int64_t row = active[i] >> 1;
    return step.at_predict ? row : step.state_row(row);
  }
};

constexpr int SCRATCH_BYTES = 128;
constexpr int FIXED_BYTES = SCRATCH_BYTES + GROUP_SUM_BYTES;

// Sequences whose step ends now, in order, to `active`; returns how many. Every block finds the same.
template <class H>
__device__ __forceinline__ int find_steps(const Step<H>& step, uint32_t* active, int* scratch) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  int total = 0;
  for (int64_t base = 0; base < step.ids.batch; base += THREADS) {
    const int64_t b = base + threadIdx.x, row = b < step.ids.batch ? step.state_row(b) : -1;
    bool ends = false;
    uint32_t found = 0;
    if (row >= 0) {
      const Position at(step.seq(row));
      ends = at.is_step(step.entry(b, at));
      if (ends) prefetch(step.state.tally + row * N_REGIONS * TALLY_FIELDS);  // one line, for the block that adds to it
      found = static_cast<uint32_t>(2 * (step.at_predict ? row : b) + (at.column & 1));
    }
    const unsigned mates = __ballot_sync(~0u, ends);
    if (base > 0) __syncthreads();  // the counts before have been read by all
    if (lane == 0) scratch[warp] = __popc(mates);
    __syncthreads();
    int before = total;
    for (int w = 0; w < THREADS / WARP; ++w) {
      before += w < warp ? scratch[w] : 0;
      total += scratch[w];
    }
    if (ends) active[before + __popc(mates & ((1u << lane) - 1))] = found;
  }
  __syncthreads();
  return total;
}

// One launch. Every block finds out by itself which sequences end a step, from the state as it was: nothing that
// another block may still read is written before the last block has arrived. Where there is nothing to score, that is
// all, but for a share of the copying. Otherwise each block streams its tiles of W1, and the last one to arrive has all
// sums.
template <class H>
__global__ void __launch_bounds__(THREADS, 1) step_kernel(Step<H> step) {
  const Stream& state = step.state;
  const int batch = static_cast<int>(step.ids.batch);
  unsigned char* const shared = shared_memory();
  int* const scratch = reinterpret_cast<int*>(shared);
  uint32_t* const active = reinterpret_cast<uint32_t*>(shared + FIXED_BYTES);
  const Ring ring{reinterpret_cast<float*>(shared + SCRATCH_BYTES), shared + FIXED_BYTES + step.active_bytes,
                  step.ring_bytes};
  unsigned* const arrived = reinterpret_cast<unsigned*>(state.workspace);
  float* const sums = state.workspace + WORKSPACE_HEADER;

  const int n_waiting = *state.n_slots;
  const int n_new = find_steps(step, active, scratch);
  const bool full = n_waiting + n_new + step.wanted_room() > state.slot_capacity;
  const int n_rows = step.immediate ? n_waiting + n_new : full ? n_waiting : 0;
  const bool gathers = !step.immediate && n_rows == 0;
  const StepRows<H> rows{step, active, n_waiting};

  // Half of the threads copy while the others start on W1. What is read here is not written in this launch: of
  // last_hidden the other half is.
  const int copiers = n_rows > 0 ? COMPUTE_THREADS : THREADS;
  if (static_cast<int>(threadIdx.x) < copiers) {
    const int first = blockIdx.x * copiers + threadIdx.x, stride = gridDim.x * copiers;
    for (int i = first; i < batch * step.pieces; i += stride) {
      const int64_t b = i / step.pieces, row = step.state_row(b);
      if (row < 0) continue;
      copy_pieces(step.last_row(row, step.seq(row)[SEEN] + 1), step.hidden + b * step.hidden_stride, i % step.pieces);
    }
    for (int i = first; gathers && i < n_new * step.pieces; i += stride) {
      copy_pieces(step.slot_row(n_waiting + i / step.pieces), rows.feature(i / step.pieces), i % step.pieces);
    }
  }
  if (n_rows > 0) partial_sums(step.head, rows, n_rows, sums, ring);

  __syncthreads();
  if (threadIdx.x == 0) scratch[0] = arrive(arrived) == gridDim.x - 1;
  __syncthreads();
  if (!scratch[0]) return;

  float* const scores = reinterpret_cast<float*>(ring.stages);
  int* const keys = reinterpret_cast<int*>(scores + n_rows);
  constexpr int WARPS = THREADS / WARP, BATCH = 8;
  for (int first = threadIdx.x / WARP; first < n_rows; first += WARPS * BATCH) {
    const float score = device_log_score(row_logits<BATCH>(step.head, sums, first, WARPS, n_rows));
    const int lane = threadIdx.x % WARP, row = first + lane * WARPS;
    if (lane < BATCH && row < n_rows) {
      const bool is_new = row >= n_waiting;
      const int32_t* const owner = state.slot_owner + row * OWNER_FIELDS;
      const int64_t sequence = is_new ? rows.state_row(row - n_waiting) : owner[OWNER_SEQUENCE];
      const int64_t* const seq = step.seq(sequence);
      scores[row] = score;
      keys[row] = key_of(sequence, is_new ? Position(seq).region : owner[OWNER_REGION]);
      log_score_of(state, sequence, is_new ? seq[N_STEPS] : owner[OWNER_STEP], score);
    }
  }
  __syncthreads();
  add_to_tallies(state, scores, keys, n_rows, n_waiting == 0);

  const int slot0 = gathers ? n_waiting : 0;
  for (int i = threadIdx.x; i < n_new; i += THREADS) {
    const int64_t row = rows.state_row(i);
    const int64_t* const seq = step.seq(row);
    const Position at(seq);
    log_step(state, row, seq[N_STEPS], at.column, at.region);
    if (!step.immediate) own_slot(state, slot0 + i, row, seq[N_STEPS], at.region);
  }
  for (int i = threadIdx.x; !step.immediate && n_rows > 0 && i < n_new * step.pieces; i += THREADS) {
    copy_pieces(step.slot_row(i / step.pieces), rows.feature(i / step.pieces), i % step.pieces);
  }
  __syncthreads();  // everything has been read of the old state

  for (int64_t b = threadIdx.x; b < batch; b += THREADS) {
    const int64_t row = step.state_row(b);
    if (row < 0) continue;
    int64_t* const seq = step.seq(row);
    const Position at(seq);
    const int32_t entry = step.entry(b, at);
    const uint64_t id = static_cast<uint64_t>(step.ids.data[b * step.ids.batch_stride]);
    if (at.is_text()) seq[AUTOMATON] = entry & NEXT_STATE;
    seq[SEEN] = at.column + 1;
    seq[N_THINK] += (entry & THINK) != 0;
    seq[N_END] += (entry & END) != 0;
    seq[HASH] = static_cast<int64_t>(static_cast<uint64_t>(seq[HASH]) * HASH_FACTOR + id + 1);
    seq[N_STEPS] += at.is_step(entry);
  }
  if (threadIdx.x == 0) {
    *state.n_slots = step.immediate ? 0 : slot0 + n_new;
    *arrived = 0;
  }
}

// -- many tokens a sequence ------------------------------------------------------------------------------------------

constexpr int DETECT_SHARED_BYTES = WALK_SHARED_BYTES + 16;

// Columns [begin, end) of one sequence a block, as far as they are its own; steps to the next free slots, of which
// there are enough. Rows of one sequence come in step order, sequences in any; no result depends on which.
template <class H>
__global__ void __launch_bounds__(WALK_THREADS, 8)
    detect_kernel(Step<H> step, int64_t hidden_token_stride, int64_t begin, int64_t end) {
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
    if (at.is_step(entry)) {
      if (threadIdx.x == 0) *shared_slot = atomicAdd(state.n_slots, 1);
      __syncthreads();
      const int slot = *shared_slot;
      const auto* const feature = !step.at_predict ? hidden_row(j)
                                  : j > first      ? hidden_row(j - 1)
                                                   : step.last_row(row, at.column);
      for (int piece = threadIdx.x; piece < step.pieces; piece += WALK_THREADS)
        copy_pieces(step.slot_row(slot), feature, piece);
      if (threadIdx.x == 0) {
        at.region = region_of(n_think, n_end);
        own_slot(state, slot, row, n_steps, at.region);
        log_step(state, row, n_steps, at.column, at.region);
      }
      n_steps += 1;
      __syncthreads();  // the slot's number has been read by all
    }
    if (at.is_text()) at.automaton = entry & NEXT_STATE;
    n_think += (entry & THINK) != 0;
    n_end += (entry & END) != 0;
    hash = hash * HASH_FACTOR + static_cast<uint64_t>(id) + 1;
    at.column += 1;
  });
  __syncthreads();  // everything has been read of the old state
  for (int piece = threadIdx.x; piece < step.pieces; piece += WALK_THREADS) {
    copy_pieces(step.last_row(row, at.column), hidden_row(end - 1), piece);
  }
  if (threadIdx.x == 0) {
    seq[AUTOMATON] = at.automaton, seq[SEEN] = at.column, seq[N_THINK] = n_think, seq[N_END] = n_end;
    seq[N_STEPS] = n_steps, seq[HASH] = static_cast<int64_t>(hash);
  }
}

// -- logits from elsewhere -------------------------------------------------------------------------------------------

template <class Bias>
__global__ void __launch_bounds__(THREADS) tally_slots_kernel(const float* logits, const Bias* b2, Stream state) {
  const int count = *state.n_slots;
  float* const scores = reinterpret_cast<float*>(shared_memory());
  int* const keys = reinterpret_cast<int*>(scores + count);
  for (int row = threadIdx.x; row < count; row += THREADS) {
    const int32_t* const owner = state.slot_owner + row * OWNER_FIELDS;
    scores[row] = device_log_score(logits[row] + to_float(*b2));
    keys[row] = key_of(owner[OWNER_SEQUENCE], owner[OWNER_REGION]);
    log_score_of(state, owner[OWNER_SEQUENCE], owner[OWNER_STEP], scores[row]);
  }
  __syncthreads();
  add_to_tallies(state, scores, keys, count, false);
  if (threadIdx.x == 0) *state.n_slots = 0;
}

// -- launches --------------------------------------------------------------------------------------------------------

void check_fits(int64_t rows, int64_t bytes) {
  if (rows * static_cast<int64_t>(sizeof(float) + sizeof(int)) > bytes) {
    throw std::runtime_error("slots and sequences are " + std::to_string(rows) + " rows; this GPU's blocks can tally " +
                             std::to_string(bytes / static_cast<int64_t>(sizeof(float) + sizeof(int))));
  }
}

template <class H>
void launch_step(const Device& on, Step<H> step, cudaStream_t stream) {
  step.active_bytes = static_cast<int>((step.ids.batch * sizeof(uint32_t) + 127) / 128 * 128);
  step.ring_bytes = on.shared_bytes - FIXED_BYTES - step.active_bytes;
  check_fits(step.state.slot_capacity + step.ids.batch, step.ring_bytes);
  launch_on<step_kernel<H>>(on, std::min(on.multiprocessors, step.head.tiles), THREADS, on.shared_bytes, stream, step);
}

}  // namespace

void decode_step(const Ids& ids, const Hidden& hidden, const Segments& segments, const Automaton& automaton,
                 const Head& head, const Stream& state, bool at_predict, bool immediate, cudaStream_t stream) {
  if (ids.batch == 0 || ids.length == 0) {
    if (immediate) flush(head, state, stream);
    return;
  }
  const Device on = device();
  with_head(head, on, [&](auto typed) {
    using H = decltype(typed);
    using T = typename H::T;
    Step<H> step{typed,     ids,   segments,   static_cast<const T*>(hidden.data), hidden.batch_stride,
                 automaton, state, at_predict, immediate};
    const bool packed = segments.cu_seqlens != nullptr;
    if (ids.length == 1 && !packed) return launch_step(on, step, stream);
    const int64_t rows_a_column = packed ? 1 : ids.batch;
    const int64_t piece = std::max<int64_t>(1, state.slot_capacity / rows_a_column);
    for (int64_t begin = 0; begin < ids.length; begin += piece) {
      const int64_t end = std::min(begin + piece, ids.length);
      Step<H> make_room = step;
      make_room.ids.batch = 0;
      make_room.immediate = false;
      make_room.room = static_cast<int>(rows_a_column * (end - begin));
      make_room.room_begin = static_cast<int>(begin);
      make_room.room_end = packed ? segments.cu_seqlens + ids.batch : nullptr;
      launch_step(on, make_room, stream);
      launch(detect_kernel<H>, dim3(static_cast<unsigned>(ids.batch)), WALK_THREADS, DETECT_SHARED_BYTES, stream, step,
             hidden.stride, begin, end);
    }
    if (immediate) flush(head, state, stream);
  });
}

void flush(const Head& head, const Stream& state, cudaStream_t stream) {
  const Device on = device();
  with_head(head, on, [&](auto typed) {
    using H = decltype(typed);
    launch_step(on, Step<H>{typed, {}, {}, nullptr, 0, {}, state, true, true}, stream);
  });
}

void tally_slots(const float* logits, const void* b2, HeadType type, const Stream& state, cudaStream_t stream) {
  const Device on = device();
  check_fits(state.slot_capacity, on.shared_bytes);
  const auto run = [&](const auto* bias) {
    using Bias = std::remove_const_t<std::remove_pointer_t<decltype(bias)>>;
    launch_on<tally_slots_kernel<Bias>>(on, 1, THREADS, on.shared_bytes, stream, logits, bias, state);
  };
  switch (type) {
    case HeadType::bfloat16: return run(static_cast<const Bfloat16*>(b2));
    case HeadType::float16: return run(static_cast<const Float16*>(b2));
    default: return run(static_cast<const float*>(b2));
  }
}

}  // namespace reflective::gpu
