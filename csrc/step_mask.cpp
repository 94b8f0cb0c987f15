#include "step_mask.h"

#include <algorithm>

#include "parallel.h"

namespace reflective {
namespace {

void mask_row(const Ids& ids, int64_t b, const Automaton& automaton, int64_t pad, int64_t length, int64_t start,
              bool* mask) {
  const int64_t begin = std::clamp<int64_t>(pad, 0, ids.length);
  const int64_t end = std::clamp<int64_t>(length, begin, ids.length);
  int64_t state = 0, n_think = 0, n_end = 0, think = 0, close = 0;
  std::fill(mask, mask + ids.length, false);
  for (int64_t t = begin; t < end; ++t) {
    const int32_t entry = automaton.entry(ids(b, t), state);
    state = automaton.check_state(entry & NEXT_STATE);
    mask[t] = (entry & STEP) != 0;
    if (entry & THINK && n_think++ == 0) think = t;
    if (entry & END && n_end++ == 0) close = t;
  }
  // Whether a tag is alone in the text is known only now.
  const int64_t first = std::max((n_think == 1 ? think : pad) + 2, start);
  const int64_t last = n_end == 1 ? close : length;
  for (int64_t t = begin; t < end; ++t) mask[t] &= t >= first && t <= last;
}

}  // namespace

void step_mask(const Ids& ids, const Automaton& automaton, const int64_t* pad, const int64_t* length,
               const int64_t* start, bool* mask) {
  automaton.check(ids);
  constexpr int64_t TOKENS_PER_THREAD = 16384;  // 38 us on one thread of a 2.6 GHz EPYC
  const int64_t grain = TOKENS_PER_THREAD / std::max<int64_t>(ids.length, 1) + 1;
  parallel_for(ids.batch, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      mask_row(ids, b, automaton, pad[b], length[b], start[b], mask + b * ids.length);
    }
  });
}

}  // namespace reflective
