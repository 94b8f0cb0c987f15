#pragma once

#include "automaton.h"
#include "head.h"

namespace reflective {

// The stream's state, see kernels/decode_step.py for its fields; all contiguous. `flush` needs only the second half.
struct Stream {
  int64_t* seq;          // [sequences, SEQ_FIELDS]
  void* last_hidden;     // [sequences, 2, width]
  int32_t* step_column;  // [sequences, log_capacity]
  int8_t* step_region;   // [sequences, log_capacity]

  double* tally;        // [sequences, N_REGIONS, TALLY_FIELDS]
  float* step_score;    // [sequences, log_capacity]
  void* slots;          // [slot_capacity, width]
  int32_t* slot_owner;  // [slot_capacity, OWNER_FIELDS]
  int32_t* n_slots;     // [1]
  int64_t sequences, log_capacity, slot_capacity;
  float* workspace;  // [workspace_size(slot_capacity + sequences, units)], on GPUs only
};

struct Hidden {  // [batch, length, width] in the head's dtype
  const void* data;
  int64_t batch_stride, stride;
};

// Which columns of a call are a sequence's, and which row of the state is its own.
struct Segments {
  const int32_t* rows;        // [batch], -1: the sequence is skipped; null: row b is sequence b's
  const int32_t* cu_seqlens;  // [batch + 1], the packed form: all sequences share one row of ids; null: the dense form
};

// Consumes ids [batch, length], of batch stride 0 where packed, and the states they produced; no step of the first
// `quiet` columns counts: see kernels/decode_step.py. Throws std::out_of_range for a bad id, row or segment and then
// leaves the state unchanged.
void decode_step(const Ids& ids, const Hidden& hidden, const Segments& segments, const Automaton& automaton,
                 const Head& head, const Stream& stream, bool at_predict, bool immediate, int64_t quiet);

// Scores slots[:n_slots] into their owners' tallies and step logs, in slot order; empties the buffer: see
// kernels/flush.py.
void flush(const Head& head, const Stream& stream);

// The second half of flush: logits [slot_capacity] without b2, those from n_slots on undefined.
void tally_slots(const float* logits, double b2, const Stream& stream);

// Throws std::out_of_range if the buffer cannot hold as many rows as it says it does.
void check_n_slots(const Stream& stream);

}  // namespace reflective
