#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "decode_step.h"
#include "score_rows.h"

namespace reflective {

void check_n_slots(const Stream& stream) {
  if (*stream.n_slots < 0 || *stream.n_slots > stream.slot_capacity) {
    throw std::out_of_range("n_slots is " + std::to_string(*stream.n_slots) + ", the slot buffer has " +
                            std::to_string(stream.slot_capacity) + " rows");
  }
}

static void check_owners(const Stream& stream) {
  for (int64_t slot = 0; slot < *stream.n_slots; ++slot) {
    const int32_t* owner = stream.slot_owner + slot * OWNER_FIELDS;
    if (owner[OWNER_SEQUENCE] < 0 || owner[OWNER_SEQUENCE] >= stream.sequences || owner[OWNER_STEP] < 0 ||
        owner[OWNER_REGION] < 0 || owner[OWNER_REGION] >= N_REGIONS) {
      throw std::out_of_range("slot_owner[" + std::to_string(slot) + "] does not name a step");
    }
  }
}

static void tally(const Stream& stream, const float* scores) {
  for (int64_t slot = 0; slot < *stream.n_slots; ++slot) {
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

// One buffer a thread: it grows to its largest use, then nothing is allocated.
static std::vector<float>& score_buffer(const Stream& stream) {
  thread_local std::vector<float> scores;
  scores.resize(std::max<size_t>(scores.size(), stream.slot_capacity));
  return scores;
}

void flush(const Head& head, const Stream& stream) {
  check_n_slots(stream);
  if (*stream.n_slots == 0) return;
  check_owners(stream);
  float* const scores = score_buffer(stream).data();
  score_rows(head, {stream.slots, head.width, *stream.n_slots}, scores);
  tally(stream, scores);
}

void tally_slots(const float* logits, double b2, const Stream& stream) {
  check_n_slots(stream);
  check_owners(stream);
  float* const scores = score_buffer(stream).data();
  for (int64_t slot = 0; slot < *stream.n_slots; ++slot) scores[slot] = log_score(logits[slot] + b2);
  tally(stream, scores);
}

}  // namespace reflective
