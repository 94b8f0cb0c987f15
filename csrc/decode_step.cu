// decode_step and flush: one token a sequence in one launch; many in launches that find and keep steps.
#include "detect.cuh"
#include "step_rows.cuh"

namespace reflective::gpu {
namespace {

// One launch. Every block finds out by itself which sequences end a step, from seq and n_slots as the launch found them:
// these, slot_owner, the tallies and the step log are written by the last block to arrive alone. What blocks write before
// are halves of last_hidden and slots that no block reads in this launch, and their own places of the workspace's sums.
// Where there is nothing to score, that is all. Otherwise each block streams its tiles of W1, and the last one to arrive
// has all sums.
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

  prepare(step.head, ring);

  // This thread's share of hidden, which goes to last_hidden. Its first piece is loaded while find_steps still looks for
  // where in last_hidden it goes.
  const int first = threadIdx.x < H::COPIERS ? blockIdx.x * H::COPIERS + threadIdx.x : batch * step.pieces;
  const int stride = gridDim.x * H::COPIERS;
  const auto piece_of = [&](int i) {
    return static_cast<const uint4*>(static_cast<const void*>(step.hidden + i / step.pieces * step.hidden_stride)) +
           i % step.pieces;
  };
  uint4 piece{};
  if (first < batch * step.pieces) piece = *piece_of(first);

  Sequence sequence;
  const int n_new = find_steps(step, found, sequence), n_waiting = found.scratch[SCRATCH_WAITING];
  const bool full = n_waiting + n_new + step.wanted_room() > state.slot_capacity;
  const int n_rows = step.immediate ? n_waiting + n_new : full ? n_waiting : 0;
  const bool gathers = !step.immediate && n_rows == 0;
  StepRows<H> rows{step, found, n_waiting, n_new};

  bool last = false;
  if (n_rows == 0 && threadIdx.x == 0) last = arrive(arrived) == gridDim.x - 1;

  // Features are read from hidden or from the old halves of last_hidden; the new halves, and the slots behind the waiting
  // ones, are written.
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
    sequence = {};  // read anew below: kept since find_steps, it would cost the products registers
    __syncthreads();
    if (threadIdx.x == 0) last = arrive(arrived) == gridDim.x - 1;
  }
  if (threadIdx.x == 0) found.scratch[SCRATCH_LAST] = last;
  __syncthreads();
  if (!found.scratch[SCRATCH_LAST]) return;

  // From here on one block: what it reads of memory it asks for as early as it can.
  const int mine = static_cast<int>(threadIdx.x);
  if (n_rows > 0) {
    sequence = Sequence::of(step, found, mine < batch ? mine : -1);
    const Scored scored(ring.stages, n_rows);
    const Owner owner = mine < n_rows ? rows.owner(mine) : Owner{};
    const float b2 = found.bias();
    constexpr int WARPS = THREADS / WARP;
    const auto score = [&](auto batch, auto parts) {  // some rows a warp at once
      constexpr int BATCH = decltype(batch)::value, PARTS = decltype(parts)::value;
      for (int first = threadIdx.x / WARP; first < n_rows; first += WARPS * BATCH) {
        const float score = device_log_score(row_logits<BATCH, PARTS>(step.head, b2, sums, first, WARPS, n_rows));
        const int lane = threadIdx.x % WARP, row = first + lane * WARPS;
        if (lane < BATCH && row < n_rows) scored.scores[row] = score;
      }
    };
    if (n_rows <= WARPS) {
      score(std::integral_constant<int, 1>{}, std::integral_constant<int, 2>{});
    } else if (n_rows <= 8 * WARPS) {
      score(std::integral_constant<int, 8>{}, std::integral_constant<int, 2>{});
    } else {
      score(std::integral_constant<int, 16>{}, std::integral_constant<int, 1>{});
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
    __syncthreads();  // rows.owner is through with seq and slot_owner, which are written below
  }

  const int slot0 = gathers ? n_waiting : 0;
  for (int b = mine; b < batch; b += THREADS) {
    if (found.places[b] == SKIPPED) continue;
    const Sequence its = b == mine ? sequence : Sequence::of(step, found, b);
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
  // Blocks beyond the tiles, of which a linear head has one, help to copy hidden: each thread takes its share of the pieces.
  constexpr int64_t PIECES_A_BLOCK = 4 * H::COPIERS;
  const int64_t copying = (step.ids.batch * step.pieces + PIECES_A_BLOCK - 1) / PIECES_A_BLOCK;
  const int grid = blocks_for<H>(on, std::max<int64_t>(step.head.tiles, copying));
  launch_on<step_kernel<H>, H::CLUSTER>(on, grid, H::THREADS, on.shared_bytes, stream, step);
}

}  // namespace

void decode_step(const Ids& ids, const Hidden& hidden, const Segments& segments, const Automaton& automaton,
                 const Head& head, const Stream& state, bool at_predict, bool immediate, int64_t quiet,
                 cudaStream_t stream) {
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
    if (ids.length == 1 && !packed && quiet == 0) return launch_step(on, step, stream);
    const int64_t rows_a_column = packed ? 1 : ids.batch;
    const int64_t piece = std::max<int64_t>(1, state.slot_capacity / rows_a_column);
    for (int64_t begin = 0, end; begin < ids.length; begin = end) {
      const int64_t counting = std::min(std::max(begin, quiet), ids.length);  // from here on a column may want slots
      end = std::min(counting + piece, ids.length);
      if (counting < end) {
        Step<H> make_room = step;
        make_room.ids.batch = 0;
        make_room.immediate = false;
        make_room.room = static_cast<int>(rows_a_column * (end - counting));
        make_room.room_begin = static_cast<int>(counting);
        make_room.room_end = packed ? segments.cu_seqlens + ids.batch : nullptr;
        launch_step(on, make_room, stream);
      }
      launch(detect_kernel<H>, dim3(static_cast<unsigned>(ids.batch)), WALK_THREADS, DETECT_SHARED_BYTES, stream, step,
             hidden.stride, begin, end, quiet);
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

}  // namespace reflective::gpu
