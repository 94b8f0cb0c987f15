// The ops on CPU tensors, and the threads that they run on, which are torch's.
#include "bind_arguments.h"
#include "parallel.h"

namespace reflective {

void parallel_for(int64_t n, int64_t grain, RangeFunction function, void* context) {
  if (n <= grain) {
    if (n > 0) function(0, n, context);
  } else if (torch_parallel_for(0, n, grain, function, context) != TORCH_SUCCESS) {
    throw std::runtime_error("a thread of reflective failed");
  }
}

namespace {

Tensor step_mask_cpu(const Tensor& ids, const Tensor& token_class, const Tensor& transition, const Tensor& pad,
                     const Tensor& length, const Tensor& start) {
  const StepMask call = make_step_mask(ids, token_class, transition, pad, length, start);
  step_mask(call.ids, call.automaton, call.pad, call.length, call.start, static_cast<bool*>(call.mask.data_ptr()));
  return call.mask;
}

Tensor score_rows_cpu(const Tensor& features, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2,
                      int64_t activation) {
  const HeadOnRows call = make_head_on_rows(features, w1, b1, w2, &b2, activation);
  score_rows(call.head, call.rows, static_cast<float*>(call.out.data_ptr()));
  return call.out;
}

Tensor logit_rows_cpu(const Tensor& features, const Tensor& w1, const Tensor& b1, const Tensor& w2,
                      const Optional& b2, int64_t activation) {
  const HeadOnRows call = make_head_on_rows(features, w1, b1, w2, b2 ? &*b2 : nullptr, activation);
  logit_rows(call.head, call.rows, static_cast<float*>(call.out.data_ptr()));
  return call.out;
}

void decode_step_cpu(DECODE_STEP_ARGUMENTS) {
  const DecodeStep call = make_decode_step(ids, hidden, DECODE_STEP_NAMES);
  decode_step(call.ids, call.hidden, call.segments, call.automaton, call.head, call.stream, at_predict, immediate,
              quiet);
}

void flush_cpu(const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2, const Tensor& tally,
               const Tensor& step_score, const Tensor& slots, const Tensor& slot_owner, const Tensor& n_slots,
               const Tensor& workspace, int64_t activation) {
  const Head head = make_head(w1, b1, w2, &b2, slots, activation);
  flush(head, make_buffer(head, tally, step_score, slots, slot_owner, n_slots, workspace));
}

void tally_slots_cpu(const Tensor& logits, const Tensor& b2, const Tensor& tally, const Tensor& step_score,
                     const Tensor& slot_owner, const Tensor& n_slots) {
  const Stream stream = make_tallies(tally, step_score, slot_owner, n_slots);
  const HeadType type = head_type(b2, b2);
  const void* const bias = make_b2(b2, type);
  tally_slots(
      make_logits(logits, stream),
      type == HeadType::bfloat16 ? to_float(*static_cast<const bfloat16*>(bias)) : *static_cast<const float*>(bias),
      stream);
}

}  // namespace
}  // namespace reflective

STABLE_TORCH_LIBRARY_IMPL(REFLECTIVE_NAMESPACE, CPU, m) { IMPLEMENT_OPS(m, cpu) }
