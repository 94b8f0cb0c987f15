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
  int64_t automaton, column, pad, start, n_think, n_end;

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

// Whether any of four keys is `key`; four at once, since the search for equal keys is of as many steps as there are rows.
__device__ __forceinline__ bool among(const int4& four, int key) {
  return four.x == key || four.y == key || four.z == key || four.w == key;
}

// scores[i], in order of i, into the tally at keys[i], see key_of, by one block; both in shared memory, where up to
// three more keys can be read. The first row of a key does the work of all of its rows.
__device__ void add_to_tallies(const Stream& state, const float* scores, const int* keys, int count, bool keys_differ) {
  const int4* const fours = reinterpret_cast<const int4*>(keys);
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const int key = keys[i];
    double* const tally = state.tally + static_cast<int64_t>(key) * TALLY_FIELDS;
    double n = tally[COUNT], log_sum = tally[LOG_SUM], least = tally[MIN], last = tally[LAST];
    bool first = true;
    if (!keys_differ) {
      for (int four = 0; four < i / 4 && first; ++four) first = !among(fours[four], key);
      for (int j = i / 4 * 4; j < i; ++j) first &= keys[j] != key;
    }
    if (!first) continue;
    const auto add = [&](int j) {
      const double score = scores[j];
      if (n == 0 || score < least || score != score) least = score;  // as torch.minimum: a NaN stays
      n += 1;
      log_sum += score;
      last = score;
    };
    add(i);
    if (!keys_differ) {
      for (int four = i / 4; four < (count + 3) / 4; ++four) {
        if (!among(fours[four], key)) continue;
        for (int j = max(4 * four, i + 1); j < min(4 * four + 4, count); ++j) {
          if (keys[j] == key) add(j);
        }
      }
    }
    tally[COUNT] = n, tally[LOG_SUM] = log_sum, tally[MIN] = least, tally[LAST] = last;
  }
}

// -- one token a sequence --------------------------------------------------------------------------------------------

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

  __device__ int32_t entry(int64_t id, const Position& at) const {
    if (!at.is_text()) return 0;
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

constexpr int SCRATCH_BYTES = 128;
constexpr int FIXED_BYTES = SCRATCH_BYTES + GROUP_SUM_BYTES;
constexpr int SCRATCH_LAST = 30, SCRATCH_WAITING = 31;  // of its ints; the first are the warps'
constexpr uint32_t SKIPPED = ~0u;

// What detection finds, of each sequence of the batch; in shared memory, from where the rest of the step takes it.
struct Found {
  uint32_t* active;   // [n_new]: 2 * row + (column & 1), the row of last_hidden with at_predict, else that of hidden
  uint32_t* places;   // [batch]: 2 * row + (column + 1 & 1), where in last_hidden this token's state goes; or SKIPPED
  int32_t* entries;   // [batch]: the automaton's
  int* scratch;

  __host__ __device__ static int bytes(int64_t batch) { return static_cast<int>((3 * batch * 4 + 127) / 128 * 128); }

  __device__ Found(unsigned char* shared, int batch)
      : active(reinterpret_cast<uint32_t*>(shared + FIXED_BYTES)),
        places(active + batch),
        entries(reinterpret_cast<int32_t*>(places + batch)),
        scratch(reinterpret_cast<int*>(shared)) {}
};

// The rows of a step: those that wait in the slots, then the features of the steps that end now.
template <class H>
struct StepRows {
  using T = typename H::T;

  const Step<H>& step;
  const Found& found;
  int n_waiting;

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

  __device__ int in_order() const { return n_waiting; }

  template <class Maps>
  __device__ auto box(const Maps& maps, int row) const {
    using Box = typename Maps::Box;
    if (row < n_waiting) return Box{&maps.row, row};
    const uint32_t place = found.active[row - n_waiting];
    return Box{&maps.scattered, static_cast<int>(step.at_predict ? place : place >> 1)};
  }
};

// Fills `found`; returns how many sequences end a step now. Every block finds the same. Behind its last barrier no thread
// still reads the old state.
template <class H>
__device__ __forceinline__ int find_steps(const Step<H>& step, const Found& found) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, batch = static_cast<int>(step.ids.batch);
  if (threadIdx.x == 0) found.scratch[SCRATCH_WAITING] = *step.state.n_slots;
  int total = 0;
  for (int base = 0; base < batch; base += H::THREADS) {
    const int b = base + threadIdx.x;
    const int64_t row = b < batch ? step.state_row(b) : -1;
    bool ends = false;
    uint32_t place = 0;
    if (b < batch) found.places[b] = SKIPPED;
    if (row >= 0) {
      const int64_t id = step.id(b);
      const Position at(step.seq(row));
      const int32_t entry = step.entry(id, at);
      ends = at.is_step(entry);
      place = static_cast<uint32_t>(2 * (step.at_predict ? row : b) + (at.column & 1));
      found.places[b] = static_cast<uint32_t>(2 * row + (at.column + 1 & 1));
      found.entries[b] = entry;
    }
    const unsigned mates = __ballot_sync(~0u, ends);
    if (base > 0) __syncthreads();  // the counts before have been read by all
    if (lane == 0) found.scratch[warp] = __popc(mates);
    __syncthreads();
    int before = total;
    for (int w = 0; w < H::THREADS / WARP; ++w) {
      before += w < warp ? found.scratch[w] : 0;
      total += found.scratch[w];
    }
    if (ends) found.active[before + __popc(mates & ((1u << lane) - 1))] = place;
  }
  __syncthreads();
  return total;
}

// One launch. Every block finds out by itself which sequences end a step, from the state as it was: nothing that
// another block may still read is written before the last block has arrived. Where there is nothing to score, that is
// all, but for a share of the copying. Otherwise each block streams its tiles of W1, and the last one to arrive has all
// sums.
template <class H>
__global__ void __launch_bounds__(H::THREADS, 1) step_kernel(const __grid_constant__ Step<H> step) {
  constexpr int THREADS = H::THREADS;
  const Stream& state = step.state;
  const int batch = static_cast<int>(step.ids.batch);
  unsigned char* const shared = shared_memory();
  const Found found(shared, batch);
  const Ring ring{reinterpret_cast<float*>(shared + SCRATCH_BYTES), shared + FIXED_BYTES + step.found_bytes,
                  step.ring_bytes};
  unsigned* const arrived = reinterpret_cast<unsigned*>(state.workspace);
  float* const sums = state.workspace + WORKSPACE_HEADER;

  // This thread's share of the states to keep, of which the first piece is asked for before anything is known of it.
  const int first = threadIdx.x < H::COPIERS ? blockIdx.x * H::COPIERS + threadIdx.x : batch * step.pieces;
  const int stride = gridDim.x * H::COPIERS;
  const auto piece_of = [&](int i) {
    return static_cast<const uint4*>(static_cast<const void*>(step.hidden + i / step.pieces * step.hidden_stride)) +
           i % step.pieces;
  };
  uint4 piece{};
  if (first < batch * step.pieces) piece = *piece_of(first);

  const int n_new = find_steps(step, found), n_waiting = found.scratch[SCRATCH_WAITING];
  const bool full = n_waiting + n_new + step.wanted_room() > state.slot_capacity;
  const int n_rows = step.immediate ? n_waiting + n_new : full ? n_waiting : 0;
  const bool gathers = !step.immediate && n_rows == 0;
  const StepRows<H> rows{step, found, n_waiting};

  bool last = false;
  if (n_rows == 0 && threadIdx.x == 0) last = arrive(arrived) == gridDim.x - 1;

  // What is read here is not written in this launch: of last_hidden the other half is, of the slots those behind.
  for (int i = first; i < batch * step.pieces; i += stride) {
    if (i != first) piece = *piece_of(i);
    const uint32_t place = found.places[i / step.pieces];
    if (place != SKIPPED) {
      uint4* const kept = static_cast<uint4*>(state.last_hidden) + static_cast<int64_t>(place) * step.pieces;
      kept[i % step.pieces] = piece;
    }
  }
  if (gathers && threadIdx.x < H::COPIERS) {
    for (int i = first; i < n_new * step.pieces; i += stride) {
      copy_pieces(step.slot_row(n_waiting + i / step.pieces), rows.feature(i / step.pieces), i % step.pieces);
    }
  }
  if (n_rows > 0) {
    partial_sums(step.head, step.maps, rows, n_rows, sums, ring);
    __syncthreads();
    if (threadIdx.x == 0) last = arrive(arrived) == gridDim.x - 1;
  }
  if (threadIdx.x == 0) found.scratch[SCRATCH_LAST] = last;
  __syncthreads();
  if (!found.scratch[SCRATCH_LAST]) return;

  if (n_rows > 0) {
    float* const scores = reinterpret_cast<float*>(ring.stages);
    int* const keys = reinterpret_cast<int*>(scores + (n_rows + 3) / 4 * 4);
    constexpr int WARPS = THREADS / WARP, BATCH = 8;
    for (int first = threadIdx.x / WARP; first < n_rows; first += WARPS * BATCH) {
      // Whose row it is is asked for before the sums, so that both come from the second-level cache at once.
      const int lane = threadIdx.x % WARP, row = first + lane * WARPS;
      const bool mine = lane < BATCH && row < n_rows, is_new = row >= n_waiting;
      int64_t sequence = 0, which = 0;
      int region = 0;
      if (mine && is_new) {
        sequence = rows.state_row(row - n_waiting);
        const int64_t* const seq = step.seq(sequence);
        which = seq[N_STEPS], region = region_of(seq[N_THINK], seq[N_END]);
      } else if (mine) {
        const int32_t* const owner = state.slot_owner + row * OWNER_FIELDS;
        sequence = owner[OWNER_SEQUENCE], which = owner[OWNER_STEP], region = owner[OWNER_REGION];
      }
      const float score = device_log_score(row_logits<BATCH>(step.head, sums, first, WARPS, n_rows));
      if (mine) {
        scores[row] = score;
        keys[row] = key_of(sequence, region);
        log_score_of(state, sequence, which, score);
      }
    }
    __syncthreads();
    add_to_tallies(state, scores, keys, n_rows, n_waiting == 0);
  }

  const int slot0 = gathers ? n_waiting : 0;
  for (int i = threadIdx.x; i < n_new; i += THREADS) {
    const int64_t row = rows.state_row(i);
    const int64_t* const seq = step.seq(row);
    const Position at(seq);
    log_step(state, row, seq[N_STEPS], at.column, at.region());
    if (!step.immediate) own_slot(state, slot0 + i, row, seq[N_STEPS], at.region());
  }
  if (!step.immediate && n_rows > 0) {
    for (int i = threadIdx.x; i < n_new * step.pieces; i += THREADS) {
      copy_pieces(step.slot_row(i / step.pieces), rows.feature(i / step.pieces), i % step.pieces);
    }
  }
  __syncthreads();  // everything has been read of the old state

  for (int b = threadIdx.x; b < batch; b += THREADS) {
    if (found.places[b] == SKIPPED) continue;
    int64_t* const seq = step.seq(found.places[b] >> 1);
    const Position at(seq);
    const int32_t entry = found.entries[b];
    if (at.is_text()) seq[AUTOMATON] = entry & NEXT_STATE;
    seq[SEEN] = at.column + 1;
    seq[N_THINK] = at.n_think + ((entry & THINK) != 0);
    seq[N_END] = at.n_end + ((entry & END) != 0);
    seq[HASH] = static_cast<int64_t>(static_cast<uint64_t>(seq[HASH]) * HASH_FACTOR +
                                     static_cast<uint64_t>(step.id(b)) + 1);
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
    detect_kernel(const __grid_constant__ Step<H> step, int64_t hidden_token_stride, int64_t begin, int64_t end) {
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
        const int region = region_of(n_think, n_end);
        own_slot(state, slot, row, n_steps, region);
        log_step(state, row, n_steps, at.column, region);
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
__global__ void __launch_bounds__(FINISH_THREADS) tally_slots_kernel(const float* logits, const Bias* b2, Stream state) {
  const int count = *state.n_slots;
  float* const scores = reinterpret_cast<float*>(shared_memory());
  int* const keys = reinterpret_cast<int*>(scores + (count + 3) / 4 * 4);
  for (int row = threadIdx.x; row < count; row += FINISH_THREADS) {
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
  if ((rows + 3) * static_cast<int64_t>(sizeof(float) + sizeof(int)) > bytes) {  // keys are read by fours
    throw std::runtime_error("slots and sequences are " + std::to_string(rows) + " rows; this GPU's blocks can tally " +
                             std::to_string(bytes / static_cast<int64_t>(sizeof(float) + sizeof(int))));
  }
}

template <class H>
void launch_step(const Device& on, Step<H> step, cudaStream_t stream) {
  step.found_bytes = Found::bytes(step.ids.batch);
  step.ring_bytes = on.shared_bytes - FIXED_BYTES - step.found_bytes;
  check_fits(step.state.slot_capacity + step.ids.batch, step.ring_bytes);
  const Stream& state = step.state;
  const Matrix kept{state.last_hidden, 2 * state.sequences, step.head.width};
  step.maps = maps_of(step.head, {state.slots, state.slot_capacity, step.head.width},
                         step.at_predict ? kept : Matrix{step.hidden, step.ids.batch, step.hidden_stride});
  launch_on<step_kernel<H>, H::CLUSTER>(on, blocks_for<H>(on, step.head.tiles), H::THREADS, on.shared_bytes, stream, step);
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
    const T* const first = static_cast<const T*>(hidden.data);
    Step<H> step{typed, {}, ids, segments, first, hidden.batch_stride, automaton, state, at_predict, immediate};
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
    launch_step(on, Step<H>{typed, {}, {}, {}, nullptr, 0, {}, state, true, true}, stream);
  });
}

void tally_slots(const float* logits, const void* b2, HeadType type, const Stream& state, cudaStream_t stream) {
  const Device on = device();
  check_fits(state.slot_capacity, on.shared_bytes);
  const auto run = [&](const auto* bias) {
    using Bias = std::remove_const_t<std::remove_pointer_t<decltype(bias)>>;
    launch_on<tally_slots_kernel<Bias>>(on, 1, FINISH_THREADS, on.shared_bytes, stream, logits, bias, state);
  };
  switch (type) {
    case HeadType::bfloat16: return run(static_cast<const Bfloat16*>(b2));
    case HeadType::float16: return run(static_cast<const Float16*>(b2));
    default: return run(static_cast<const float*>(b2));
  }
}

}  // namespace reflective::gpu
