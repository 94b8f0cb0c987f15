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
constexpr int SCRATCH_OCTETS = 29, SCRATCH_LAST = 30, SCRATCH_WAITING = 31;  // of its ints; the first are the warps'
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

// All of sequence `b` of the batch that a step changes; of none if it is less than 0, or skipped.
template <class H>
struct Sequence {
  Position at;
  int64_t row = 0, n_steps = 0, id = 0;
  uint64_t hash = 0;

  __device__ Sequence(const Step<H>& step, const Found& found, int b) {
    if (b < 0 || found.places[b] == SKIPPED) return;
    row = found.places[b] >> 1;
    const int64_t* const seq = step.seq(row);
    at = Position(seq), n_steps = seq[N_STEPS], hash = static_cast<uint64_t>(seq[HASH]), id = step.id(b);
  }
};

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
    const int mine = octet - octets_in_order();
    const int end = mine + 1 < n_octets ? found.octets[mine + 1] : n_new;
    for (int i = found.octets[mine]; i < end; ++i) {
      if (static_cast<int>(found.active[i] >> 1 & 7) == place) return n_waiting + i;
    }
    return -1;
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

// Fills `found`; returns how many sequences end a step now. Every block finds the same. Behind its last barrier no thread
// still reads the old state.
template <class H>
__device__ __forceinline__ int find_steps(const Step<H>& step, const Found& found) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, batch = static_cast<int>(step.ids.batch);
  const int states = static_cast<int>(step.automaton.states), n_entries = static_cast<int>(step.automaton.classes) * states;
  if (threadIdx.x == 0) found.scratch[SCRATCH_WAITING] = *step.state.n_slots;
  int total = 0;
  for (int base = 0; base < batch; base += H::THREADS) {
    const int b = base + threadIdx.x;
    const int64_t row = b < batch ? step.state_row(b) : -1;
    int32_t token_class = -1, entry = 0;
    int64_t at_state = 0, column = 0;
    bool is_text = false, may_step = false;
    // The small table comes while the token's class does, not after it.
    constexpr int MINE = (TABLE + H::THREADS - 1) / H::THREADS;
    int32_t mine[MINE];
    const bool at_hand = n_entries <= TABLE;
    if (base == 0 && at_hand) {
#pragma unroll
      for (int i = 0; i < MINE; ++i) {
        const int place = i * H::THREADS + threadIdx.x;
        mine[i] = place < n_entries ? step.automaton.transition[place] : 0;
      }
    }
    if (row >= 0) {
      token_class = step.token_class(step.id(b));
      const Position at(step.seq(row));
      at_state = at.automaton, column = at.column, is_text = at.is_text(), may_step = at.is_step(STEP);
    }
    if (base == 0 && at_hand) {
#pragma unroll
      for (int i = 0; i < MINE; ++i) {
        const int place = i * H::THREADS + threadIdx.x;
        if (place < n_entries) found.table[place] = mine[i];
      }
      __syncthreads();
    }
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
    if (base > 0) __syncthreads();  // the counts before have been read by all
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
  const Ring ring{reinterpret_cast<float*>(shared + FIXED_BYTES - GROUP_SUM_BYTES), shared + FIXED_BYTES + step.found_bytes,
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
  StepRows<H> rows{step, found, n_waiting, n_new};

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
    if (H::CLUSTER > 1 && step.immediate) rows.find_octets();
    partial_sums(step.head, step.maps, rows, n_rows, sums, ring);
    __syncthreads();
    if (threadIdx.x == 0) last = arrive(arrived) == gridDim.x - 1;
  }
  if (threadIdx.x == 0) found.scratch[SCRATCH_LAST] = last;
  __syncthreads();
  if (!found.scratch[SCRATCH_LAST]) return;

  // From here on one block: what it reads of memory it asks for as early as it can.
  const int mine = static_cast<int>(threadIdx.x);
  const Sequence<H> sequence(step, found, mine < batch ? mine : -1);
  if (n_rows > 0) {
    const Scored scored(ring.stages, n_rows);
    const Owner owner = mine < n_rows ? rows.owner(mine) : Owner{};
    constexpr int WARPS = THREADS / WARP;
    const auto score = [&](auto batch) {  // some rows a warp at once
      constexpr int BATCH = decltype(batch)::value;
      for (int first = threadIdx.x / WARP; first < n_rows; first += WARPS * BATCH) {
        const float score = device_log_score(row_logits<BATCH>(step.head, sums, first, WARPS, n_rows));
        const int lane = threadIdx.x % WARP, row = first + lane * WARPS;
        if (lane < BATCH && row < n_rows) scored.scores[row] = score;
      }
    };
    if (n_rows <= 8 * WARPS) {
      score(std::integral_constant<int, 8>{});
    } else {
      score(std::integral_constant<int, 16>{});
    }
    const Tally tally = mine < n_rows ? Tally(state, owner.key()) : Tally();
    for (int row = mine; row < n_rows; row += THREADS) {
      scored.keys[row] = row == mine ? owner.key() : rows.owner(row).key();
      scored.next[row] = -1;
    }
    __syncthreads();
    for (int row = mine; row < n_rows; row += THREADS) {
      const Owner its = row == mine ? owner : rows.owner(row);
      log_score_of(state, its.sequence, its.step, scored.scores[row]);
    }
    add_to_tallies(state, scored, n_rows, n_waiting == 0, tally);
    if (!step.immediate) {
      for (int i = mine; i < n_new * step.pieces; i += THREADS) {
        copy_pieces(step.slot_row(i / step.pieces), rows.feature(i / step.pieces), i % step.pieces);
      }
    }
    __syncthreads();  // everything has been read of the old state
  }

  const int slot0 = gathers ? n_waiting : 0;
  for (int b = mine; b < batch; b += THREADS) {
    if (found.places[b] == SKIPPED) continue;
    const Sequence<H> its = b == mine ? sequence : Sequence<H>(step, found, b);
    const Position& at = its.at;
    const int32_t entry = found.entries[b];
    const bool ends = at.is_step(entry);
    if (ends) {
      log_step(state, its.row, its.n_steps, at.column, at.region());
      if (!step.immediate) own_slot(state, slot0 + found.order[b], its.row, its.n_steps, at.region());
    }
    int64_t* const seq = step.seq(its.row);
    if (at.is_text()) seq[AUTOMATON] = entry & NEXT_STATE;
    seq[SEEN] = at.column + 1;
    seq[N_THINK] = at.n_think + ((entry & THINK) != 0);
    seq[N_END] = at.n_end + ((entry & END) != 0);
    seq[HASH] = static_cast<int64_t>(its.hash * HASH_FACTOR + static_cast<uint64_t>(its.id) + 1);
    seq[N_STEPS] = its.n_steps + ends;
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
  const Scored scored(shared_memory(), count);
  for (int row = threadIdx.x; row < count; row += FINISH_THREADS) {
    const int32_t* const owner = state.slot_owner + row * OWNER_FIELDS;
    scored.scores[row] = device_log_score(logits[row] + to_float(*b2));
    scored.keys[row] = key_of(owner[OWNER_SEQUENCE], owner[OWNER_REGION]);
    scored.next[row] = -1;
    log_score_of(state, owner[OWNER_SEQUENCE], owner[OWNER_STEP], scored.scores[row]);
  }
  const bool any = static_cast<int>(threadIdx.x) < count;
  const Tally tally = any ? Tally(state, scored.keys[threadIdx.x]) : Tally();
  __syncthreads();
  add_to_tallies(state, scored, count, false, tally);
  if (threadIdx.x == 0) *state.n_slots = 0;
}

// -- launches --------------------------------------------------------------------------------------------------------

void check_fits(int64_t rows, int64_t bytes) {
  if (Scored::bytes(rows) > bytes) {
    throw std::runtime_error("slots and sequences are " + std::to_string(rows) + " rows; this GPU's blocks can tally " +
                             std::to_string(bytes / Scored::bytes(4) * 4));
  }
}

template <class H>
void launch_step(const Device& on, Step<H> step, cudaStream_t stream) {
  step.found_bytes = Found::bytes(step.ids.batch);
  step.ring_bytes = on.shared_bytes - FIXED_BYTES - step.found_bytes;
  // As there are no fewer slots than sequences, what holds this is room for two stages of the largest tile, too.
  check_fits(step.state.slot_capacity + step.ids.batch, step.ring_bytes);
  const Stream& state = step.state;
  const Rows3 kept{state.last_hidden, 2, state.sequences, 2 * step.head.width};
  step.maps = maps_of(step.head, {state.slots, 1, state.slot_capacity, step.head.width},
                      step.at_predict ? kept : Rows3{step.hidden, 1, step.ids.batch, step.hidden_stride});
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
