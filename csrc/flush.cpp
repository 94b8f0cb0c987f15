#include <cmath>
#include <stdexcept>
#include <vector>

#include "decode_step.h"

namespace reflective {

void check_n_slots(const Stream& stream) {
  if (*stream.n_slots < 0 || *stream.n_slots > stream.slot_capacity) {
    throw std::out_of_range("n_slots is " + std::to_string(*stream.n_slots) + ", the slot buffer has " +
                            std::to_string(stream.slot_capacity) + " rows");
  }
}

void flush(const Head& head, const Stream& stream) {
  check_n_slots(stream);
  const int64_t n = *stream.n_slots;
  if (n == 0) return;
  for (int64_t slot = 0; slot < n; ++slot) {
    const int32_t* owner = stream.slot_owner + slot * OWNER_FIELDS;
    if (owner[OWNER_SEQUENCE] < 0 || owner[OWNER_SEQUENCE] >= stream.sequences || owner[OWNER_STEP] < 0 ||
        owner[OWNER_REGION] < 0 || owner[OWNER_REGION] >= N_REGIONS) {
      throw std::out_of_range("slot_owner[" + std::to_string(slot) + "] does not name a step");
    }
  }

  thread_local std::vector<float> scores;
  scores.resize(stream.slot_capacity);
  score_rows(head, {stream.slots, head.width, n}, scores.data());
  for (int64_t slot = 0; slot < n; ++slot) {
    const int32_t* owner = stream.slot_owner + slot * OWNER_FIELDS;
    const int64_t sequence = owner[OWNER_SEQUENCE], step = owner[OWNER_STEP];
    const float score = scores[slot];
    double* sums = stream.tally + (sequence * N_REGIONS + owner[OWNER_REGION]) * TALLY_FIELDS;
    // As torch.minimum: a NaN stays.
    if (sums[COUNT] == 0 || score < sums[MIN] || std::isnan(score)) sums[MIN] = score;
    sums[COUNT] += 1;
    sums[LOG_SUM] += score;
    sums[LAST] = score;
    if (step < stream.log_capacity) stream.step_score[sequence * stream.log_capacity + step] = score;
  }
  *stream.n_slots = 0;
}

}  // namespace reflective
