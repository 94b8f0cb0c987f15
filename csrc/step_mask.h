#pragma once

#include "automaton.h"

namespace reflective {

// mask[b, t] = a step ends at t, first think tag + 2 <= t <= end tag, pad <= t < length, t >= start: see
// kernels/step_mask.py. pad, length, start: [B]; mask: [B, T] contiguous. Throws std::out_of_range for a bad id.
void step_mask(const Ids& ids, const Automaton& automaton, const int64_t* pad, const int64_t* length,
               const int64_t* start, bool* mask);

}  // namespace reflective
