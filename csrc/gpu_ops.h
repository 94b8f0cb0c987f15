// The ops on a GPU: as their twins of the same name outside the namespace, on memory of the current device and on a
// stream, without a look at values: an id outside the vocabulary is no step. Throw std::runtime_error if CUDA refuses.
#pragma once

#include "decode_step.h"

struct CUstream_st;
using cudaStream_t = CUstream_st*;  // as in CUDA's own headers, which the bindings do without

namespace reflective::gpu {

void step_mask(const Ids& ids, const Automaton& automaton, const int64_t* pad, const int64_t* length,
               const int64_t* start, bool* mask, cudaStream_t stream);

// Floats of `sums` that score_rows and logit_rows want as scratch.
int64_t row_sums_size(const Head& head, int64_t count);

void score_rows(const Head& head, const Rows& rows, float* sums, float* out, cudaStream_t stream);

void logit_rows(const Head& head, const Rows& rows, float* sums, float* out, cudaStream_t stream);

// One launch where ids are [batch, 1] and none is quiet; else two for every slot_capacity / batch columns, or
// slot_capacity packed ones, and one for `immediate`. Quiet columns come with the first two; where there are no others,
// that is one launch. A row outside the state is skipped. No allocation, no waiting.
void decode_step(const Ids& ids, const Hidden& hidden, const Segments& segments, const Automaton& automaton,
                 const Head& head, const Stream& state, bool at_predict, bool immediate, int64_t quiet,
                 cudaStream_t stream);

void flush(const Head& head, const Stream& state, cudaStream_t stream);

// b2 [1] of `type`'s b2.
void tally_slots(const float* logits, const void* b2, HeadType type, const Stream& state, cudaStream_t stream);

}  // namespace reflective::gpu
