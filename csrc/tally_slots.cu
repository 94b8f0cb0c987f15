#include "tallies.cuh"

namespace reflective::gpu {
namespace {

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

}  // namespace

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
