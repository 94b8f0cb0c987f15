// The step automaton over token ids, as tables, and the ids that drive it. Shared by step_mask and decode_step.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "layout.h"

namespace reflective {

struct Ids {  // [batch, length] int64, strided
  const int64_t* data;
  int64_t batch, length, batch_stride, stride;

  int64_t operator()(int64_t b, int64_t j) const { return data[b * batch_stride + j * stride]; }
};

struct Automaton {
  const int32_t* token_class;  // [vocabulary]
  const int32_t* transition;   // [classes, states]
  int64_t vocabulary, classes, states;

  int32_t entry(int64_t id, int64_t state) const { return transition[token_class[id] * states + state]; }

  // Asked of every id before anything is written, so that an error leaves the state as it was.
  void check(const Ids& ids) const {
    for (int64_t b = 0; b < ids.batch; ++b) {
      for (int64_t j = 0; j < ids.length; ++j) {
        const int64_t id = ids(b, j);
        if (id < 0 || id >= vocabulary) {
          throw std::out_of_range("ids[" + std::to_string(b) + ", " + std::to_string(j) + "] is " + std::to_string(id) +
                                  ", outside the vocabulary of " + std::to_string(vocabulary));
        }
        if (token_class[id] < 0 || token_class[id] >= classes) {
          throw std::out_of_range("token_class[" + std::to_string(id) + "] is " + std::to_string(token_class[id]) +
                                  ", transition has " + std::to_string(classes) + " classes");
        }
      }
    }
  }

  int64_t check_state(int64_t state) const {
    if (state < 0 || state >= states) {
      throw std::out_of_range("the automaton is in state " + std::to_string(state) + ", transition has " +
                              std::to_string(states) + " states");
    }
    return state;
  }
};

}  // namespace reflective
