#include "decode_step.h"

#include <cstring>

#include "score_rows.h"

namespace reflective {

void decode_step(const Ids& ids, const Hidden& hidden, const Automaton& automaton, const Head& head,
                 const Stream& stream, bool at_predict, bool immediate) {
  const int64_t element = head.is_bfloat16() ? sizeof(bfloat16) : sizeof(float);
  const int64_t row_bytes = head.width * element;
  char* const last_hidden = static_cast<char*>(stream.last_hidden);
  // Half SEEN & 1 is the state at the last column consumed.
  const auto last_row = [&](int64_t b, int64_t seen) { return last_hidden + (2 * b + (seen & 1)) * row_bytes; };
  const auto hidden_row = [&](int64_t b, int64_t j) {
    return static_cast<const char*>(hidden.data) + (b * hidden.batch_stride + j * hidden.stride) * element;
  };

  check_n_slots(stream);
  automaton.check(ids);
  for (int64_t b = 0; b < ids.batch; ++b) automaton.check_state(stream.seq[b * SEQ_FIELDS + AUTOMATON]);

  for (int64_t j = 0; j < ids.length; ++j) {
    for (int64_t b = 0; b < ids.batch; ++b) {
      int64_t* const s = stream.seq + b * SEQ_FIELDS;
      const int64_t id = ids(b, j), column = s[SEEN]++;
      s[HASH] = static_cast<int64_t>(static_cast<uint64_t>(s[HASH]) * HASH_FACTOR + static_cast<uint64_t>(id) + 1);
      if (column < s[PAD]) continue;

      const int32_t entry = automaton.entry(id, s[AUTOMATON]);
      s[AUTOMATON] = automaton.check_state(entry & NEXT_STATE);
      if (entry & STEP && column - s[PAD] >= 2 && column >= s[START]) {
        if (*stream.n_slots == stream.slot_capacity) flush(head, stream);
        const int64_t slot = (*stream.n_slots)++, step = s[N_STEPS]++;
        const int64_t region = (s[N_THINK] > 0 ? AFTER_THINK : 0) + (s[N_END] > 0 ? AFTER_END : 0);
        const char* feature = !at_predict ? hidden_row(b, j)
                              : j > 0     ? hidden_row(b, j - 1)
                                          : last_row(b, column);
        std::memcpy(static_cast<char*>(stream.slots) + slot * row_bytes, feature, row_bytes);
        int32_t* const owner = stream.slot_owner + slot * OWNER_FIELDS;
        owner[OWNER_SEQUENCE] = static_cast<int32_t>(b);
        owner[OWNER_STEP] = static_cast<int32_t>(step);
        owner[OWNER_REGION] = static_cast<int32_t>(region);
        if (step < stream.log_capacity) {
          stream.step_column[b * stream.log_capacity + step] = static_cast<int32_t>(column);
          stream.step_region[b * stream.log_capacity + step] = static_cast<int8_t>(region);
        }
      }
      s[N_THINK] += (entry & THINK) != 0;
      s[N_END] += (entry & END) != 0;
    }
  }
  if (ids.length > 0) {
    for (int64_t b = 0; b < ids.batch; ++b) {
      std::memcpy(last_row(b, stream.seq[b * SEQ_FIELDS + SEEN]), hidden_row(b, ids.length - 1), row_bytes);
    }
  }
  if (immediate) flush(head, stream);
}

}  // namespace reflective
