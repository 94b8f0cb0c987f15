#include "decode_step.h"

#include <cstring>
#include <string>

#include "score_rows.h"

namespace reflective {
namespace {

void check(const Segments& segments, const Ids& ids, const Stream& stream) {
  for (int64_t b = 0; segments.rows && b < ids.batch; ++b) {
    if (segments.rows[b] < -1 || segments.rows[b] >= stream.sequences) {
      throw std::out_of_range("rows[" + std::to_string(b) + "] is " + std::to_string(segments.rows[b]) +
                              ", the state holds " + std::to_string(stream.sequences) + " sequences");
    }
  }
  const int32_t* const bounds = segments.cu_seqlens;
  for (int64_t b = 0; bounds && b <= ids.batch; ++b) {
    if (bounds[b] < (b > 0 ? bounds[b - 1] : 0) || bounds[b] > ids.length) {
      throw std::out_of_range("cu_seqlens[" + std::to_string(b) + "] is " + std::to_string(bounds[b]) +
                              ", which is not between the one before and the " + std::to_string(ids.length) +
                              " columns of ids");
    }
  }
}

}  // namespace

void decode_step(const Ids& ids, const Hidden& hidden, const Segments& segments, const Automaton& automaton,
                 const Head& head, const Stream& stream, bool at_predict, bool immediate, int64_t quiet) {
  const int64_t element = head.is_bfloat16() ? sizeof(bfloat16) : sizeof(float);
  const int64_t row_bytes = head.width * element;
  const bool packed = segments.cu_seqlens != nullptr;
  char* const last_hidden = static_cast<char*>(stream.last_hidden);
  // Half SEEN & 1 is the state at the last column consumed.
  const auto last_row = [&](int64_t row, int64_t seen) { return last_hidden + (2 * row + (seen & 1)) * row_bytes; };
  const auto hidden_row = [&](int64_t b, int64_t j) {
    return static_cast<const char*>(hidden.data) + (b * hidden.batch_stride + j * hidden.stride) * element;
  };
  const auto state_row = [&](int64_t b) { return segments.rows ? segments.rows[b] : b; };
  const auto begin = [&](int64_t b) { return packed ? segments.cu_seqlens[b] : 0; };
  const auto end = [&](int64_t b) { return packed ? segments.cu_seqlens[b + 1] : ids.length; };

  check_n_slots(stream);
  check(segments, ids, stream);
  if (packed) {  // all share one row, whose columns beyond the last sequence are nobody's
    automaton.check({ids.data, 1, segments.cu_seqlens[ids.batch], 0, ids.stride});
  } else {
    automaton.check(ids);
  }
  for (int64_t b = 0; b < ids.batch; ++b) {
    if (state_row(b) >= 0) automaton.check_state(stream.seq[state_row(b) * SEQ_FIELDS + AUTOMATON]);
  }

  const auto consume = [&](int64_t b, int64_t j) {
    const int64_t row = state_row(b);
    if (row < 0) return;
    int64_t* const s = stream.seq + row * SEQ_FIELDS;
    const int64_t id = ids(b, j), column = s[SEEN]++;
    s[HASH] = static_cast<int64_t>(static_cast<uint64_t>(s[HASH]) * HASH_FACTOR + static_cast<uint64_t>(id) + 1);
    if (column < s[PAD]) return;

    const int32_t entry = automaton.entry(id, s[AUTOMATON]);
    s[AUTOMATON] = automaton.check_state(entry & NEXT_STATE);
    if (entry & STEP && column - s[PAD] >= 2 && column >= s[START] && j >= quiet) {
      if (*stream.n_slots == stream.slot_capacity) flush(head, stream);
      const int64_t slot = (*stream.n_slots)++, step = s[N_STEPS]++;
      const int64_t region = (s[N_THINK] > 0 ? AFTER_THINK : 0) + (s[N_END] > 0 ? AFTER_END : 0);
      const char* feature = !at_predict    ? hidden_row(b, j)
                            : j > begin(b) ? hidden_row(b, j - 1)
                                           : last_row(row, column);
      std::memcpy(static_cast<char*>(stream.slots) + slot * row_bytes, feature, row_bytes);
      int32_t* const owner = stream.slot_owner + slot * OWNER_FIELDS;
      owner[OWNER_SEQUENCE] = static_cast<int32_t>(row);
      owner[OWNER_STEP] = static_cast<int32_t>(step);
      owner[OWNER_REGION] = static_cast<int32_t>(region);
      if (step < stream.log_capacity) {
        stream.step_column[row * stream.log_capacity + step] = static_cast<int32_t>(column);
        stream.step_region[row * stream.log_capacity + step] = static_cast<int8_t>(region);
      }
    }
    s[N_THINK] += (entry & THINK) != 0;
    s[N_END] += (entry & END) != 0;
  };

  for (int64_t j = 0; !packed && j < ids.length; ++j) {
    for (int64_t b = 0; b < ids.batch; ++b) consume(b, j);
  }
  for (int64_t b = 0; b < ids.batch; ++b) {
    for (int64_t j = begin(b); packed && j < end(b); ++j) consume(b, j);
    const int64_t row = state_row(b);
    if (row < 0 || begin(b) == end(b)) continue;
    std::memcpy(last_row(row, stream.seq[row * SEQ_FIELDS + SEEN]), hidden_row(b, end(b) - 1), row_bytes);
  }
  if (immediate) flush(head, stream);
}

}  // namespace reflective
