// From the tensors of a call to what a kernel takes, of which dtypes, shapes, strides and devices are checked here; an
// error names the argument. Shared by the ops on CPU and on CUDA tensors.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>

#include "decode_step.h"
#include "layout.h"
#include "score_rows.h"
#include "step_mask.h"

namespace reflective {

using torch::stable::Tensor;

enum class Type { int64, int32, int8, float64, float32, bfloat16, float16, float8_e4m3fn };
constexpr int64_t ANY = -1;  // a size that may be anything

inline int32_t code(Type type) {
  static const int32_t codes[] = {aoti_torch_dtype_int64(),   aoti_torch_dtype_int32(),
                                  aoti_torch_dtype_int8(),    aoti_torch_dtype_float64(),
                                  aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(),
                                  aoti_torch_dtype_float16(), aoti_torch_dtype_float8_e4m3fn()};
  return codes[static_cast<int>(type)];
}

inline const char* name_of(Type type) {
  static const char* const names[] = {"int64",   "int32",    "int8",    "float64",
                                      "float32", "bfloat16", "float16", "float8_e4m3fn"};
  return names[static_cast<int>(type)];
}

inline int32_t dtype_of(const Tensor& tensor) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

// Set within an op on a GPU: all of its tensors must be there. On CPU the dispatcher has seen to it.
inline thread_local bool on_gpu = false;
inline thread_local int32_t gpu_index = -1;

// One argument, looked at once.
struct Argument {
  const char* name;
  void* data;
  const int64_t *sizes, *strides;
  int64_t dim;

  Argument(const char* name, const Tensor& tensor, Type type, std::initializer_list<int64_t> expected)
      : name(name), sizes(tensor.sizes().data()), strides(tensor.strides().data()), dim(tensor.dim()) {
    if (dtype_of(tensor) != code(type)) fail(std::string("must be ") + name_of(type));
    if (on_gpu && tensor.get_device_index() != gpu_index) {
      fail("is not on the device of the other tensors, cuda:" + std::to_string(gpu_index));
    }
    bool matches = dim == static_cast<int64_t>(expected.size());
    for (int64_t d = 0; matches && d < dim; ++d) {
      matches = expected.begin()[d] == ANY || expected.begin()[d] == sizes[d];
    }
    if (!matches) fail("must have shape " + shape(expected.begin(), expected.size()) + ", has " + shape(sizes, dim));
    data = tensor.data_ptr();
  }

  [[noreturn]] void fail(const std::string& message) const {
    throw std::runtime_error(std::string(name) + " " + message);
  }

  static std::string shape(const int64_t* sizes, int64_t dim) {
    std::string text = "[";
    for (int64_t d = 0; d < dim; ++d) text += (d ? ", " : "") + (sizes[d] == ANY ? "*" : std::to_string(sizes[d]));
    return text + "]";
  }

  // The dimensions from `first` on lie densely in memory.
  const Argument& dense(int64_t first = 0) const {
    int64_t stride = 1;
    for (int64_t d = dim; d-- > first; stride *= sizes[d]) {
      if (sizes[d] != 1 && strides[d] != stride) {
        fail(first == 0 ? "must be contiguous" : "must be contiguous in its last dimension");
      }
    }
    return *this;
  }

  // Rows are of a multiple of 16 bytes and begin at one, as the GPU reads them.
  const Argument& aligned(int64_t element) const {
    if (sizes[dim - 1] * element % 16 != 0) fail("must have rows of a multiple of 16 bytes on a GPU");
    bool fits = reinterpret_cast<uintptr_t>(data) % 16 == 0;
    for (int64_t d = 0; d + 1 < dim; ++d) fits &= sizes[d] == 1 || strides[d] * element % 16 == 0;
    if (!fits) fail("must have rows that begin at multiples of 16 bytes on a GPU");
    return *this;
  }

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

inline Type feature_type(HeadType type) {
  switch (type) {
    case HeadType::float32: return Type::float32;
    case HeadType::bfloat16:
    case HeadType::e4m3_bfloat16: return Type::bfloat16;
    default: return Type::float16;
  }
}

inline bool is_e4m3(HeadType type) { return type == HeadType::e4m3_bfloat16 || type == HeadType::e4m3_float16; }

inline Type weight_type(HeadType type) { return is_e4m3(type) ? Type::float8_e4m3fn : feature_type(type); }

inline Type bias_type(HeadType type) { return is_e4m3(type) ? Type::float32 : feature_type(type); }

inline int64_t element_size(Type type) { return type == Type::float8_e4m3fn ? 1 : type == Type::float32 ? 4 : 2; }

inline HeadType head_type(const Tensor& w1, const Tensor& features) {
  const int32_t weights = dtype_of(w1);
  if (weights == code(Type::float32)) return HeadType::float32;
  if (weights == code(Type::bfloat16)) return HeadType::bfloat16;
  if (!on_gpu) {
    throw std::runtime_error("w1 must be float32 or bfloat16: the compiled CPU backend has no other head");
  }
  if (weights == code(Type::float16)) return HeadType::float16;
  if (weights != code(Type::float8_e4m3fn)) {
    throw std::runtime_error("w1 must be float32, bfloat16, float16 or float8_e4m3fn");
  }
  return dtype_of(features) == code(Type::float16) ? HeadType::e4m3_float16 : HeadType::e4m3_bfloat16;
}

inline const void* make_b2(const Tensor& b2, HeadType type) { return Argument("b2", b2, bias_type(type), {1}).data; }

inline Head make_head(const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor* b2, const Tensor& features,
                      int64_t activation) {
  const std::string given = "activation is " + std::to_string(activation);
  if (activation < RELU || activation > SILU) {
    throw std::runtime_error(given + "; expected 0 (relu), 1 (gelu), 2 (gelu_tanh) or 3 (silu)");
  }
  const HeadType type = head_type(w1, features);
  if (is_e4m3(type) && activation != RELU) {
    throw std::runtime_error(given + "; the scales of w1 in float8_e4m3fn are folded in by relu (0) alone");
  }
  const Argument weights("w1", w1, weight_type(type), {ANY, ANY});
  const int64_t units = weights.sizes[0], width = weights.sizes[1];
  if (units == 0) weights.fail("must have at least one row");
  if (on_gpu) weights.aligned(element_size(weight_type(type)));
  return {weights.dense().data,
          Argument("b1", b1, bias_type(type), {units}).dense().data,
          Argument("w2", w2, bias_type(type), {1, units}).dense().data,
          b2 ? make_b2(*b2, type) : nullptr,
          units,
          width,
          type,
          activation};
}

// Rows of features: `tensor`'s last dimension is one.
inline Argument features_of(const char* name, const Tensor& tensor, const Head& head,
                     std::initializer_list<int64_t> expected) {
  const Type type = feature_type(head.type);
  const Argument rows(name, tensor, type, expected);
  if (on_gpu) rows.aligned(element_size(type));
  return rows;
}

inline Ids make_ids(const Tensor& ids) {
  const Argument a("ids", ids, Type::int64, {ANY, ANY});
  return {a.as<int64_t>(), a.sizes[0], a.sizes[1], a.strides[0], a.strides[1]};
}

inline Automaton make_automaton(const Tensor& token_class, const Tensor& transition) {
  const Argument classes("token_class", token_class, Type::int32, {ANY});
  const Argument table("transition", transition, Type::int32, {ANY, ANY});
  return {classes.dense().as<int32_t>(), table.dense().as<int32_t>(), classes.sizes[0], table.sizes[0], table.sizes[1]};
}

// What tally_slots needs of the stream.
inline Stream make_tallies(const Tensor& tally, const Tensor& step_score, const Tensor& slot_owner, const Tensor& n_slots) {
  const Argument sums("tally", tally, Type::float64, {ANY, N_REGIONS, TALLY_FIELDS});
  const Argument log("step_score", step_score, Type::float32, {sums.sizes[0], ANY});
  const Argument owners("slot_owner", slot_owner, Type::int32, {ANY, OWNER_FIELDS});
  Stream stream{};
  stream.tally = sums.dense().as<double>();
  stream.step_score = log.dense().as<float>();
  stream.slot_owner = owners.dense().as<int32_t>();
  stream.n_slots = Argument("n_slots", n_slots, Type::int32, {1}).as<int32_t>();
  stream.sequences = sums.sizes[0];
  stream.log_capacity = log.sizes[1];
  stream.slot_capacity = owners.sizes[0];
  return stream;
}

// Everything but what only decode_step touches.
inline Stream make_buffer(const Head& head, const Tensor& tally, const Tensor& step_score, const Tensor& slots,
                   const Tensor& slot_owner, const Tensor& n_slots, const Tensor& workspace) {
  Stream stream = make_tallies(tally, step_score, slot_owner, n_slots);
  const Argument buffer = features_of("slots", slots, head, {stream.slot_capacity, head.width});
  if (buffer.sizes[0] == 0) buffer.fail("must have at least one row");
  stream.slots = buffer.dense().data;
  if (on_gpu) {
    const Argument scratch("workspace", workspace, Type::float32, {ANY});
    const int64_t size = workspace_size(stream.slot_capacity + stream.sequences, head.units);
    if (scratch.sizes[0] < size) scratch.fail("must hold " + std::to_string(size) + " floats");
    stream.workspace = scratch.dense().as<float>();
  }
  return stream;
}

using Optional = std::optional<Tensor>;

struct DecodeStep {
  Ids ids;
  Hidden hidden;
  Segments segments;
  Automaton automaton;
  Head head;
  Stream stream;
};

inline DecodeStep make_decode_step(const Tensor& ids, const Tensor& hidden, const Tensor& token_class,
                            const Tensor& transition, const Tensor& w1, const Tensor& b1, const Tensor& w2,
                            const Tensor& b2, const Tensor& seq, const Tensor& tally, const Tensor& last_hidden,
                            const Tensor& step_column, const Tensor& step_region, const Tensor& step_score,
                            const Tensor& slots, const Tensor& slot_owner, const Tensor& n_slots,
                            const Tensor& workspace, const Optional& rows, const Optional& cu_seqlens, int64_t quiet,
                            int64_t activation) {
  if (quiet < 0) throw std::runtime_error("quiet is " + std::to_string(quiet) + "; expected columns, 0 or more");
  Ids tokens = make_ids(ids);
  const Head head = make_head(w1, b1, w2, &b2, hidden, activation);
  const Argument states = features_of("hidden", hidden, head, {tokens.batch, tokens.length, head.width});
  Hidden at{states.dense(2).data, states.strides[0], states.strides[1]};
  Segments segments{};
  if (cu_seqlens) {
    const Argument bounds("cu_seqlens", *cu_seqlens, Type::int32, {ANY});
    if (bounds.sizes[0] == 0) bounds.fail("must have at least one entry");
    if (tokens.batch != 1) throw std::runtime_error("ids must have one row beside cu_seqlens");
    segments.cu_seqlens = bounds.dense().as<int32_t>();
    tokens.batch = bounds.sizes[0] - 1;
    tokens.batch_stride = at.batch_stride = 0;
  }
  if (rows) segments.rows = Argument("rows", *rows, Type::int32, {tokens.batch}).dense().as<int32_t>();
  Stream stream = make_buffer(head, tally, step_score, slots, slot_owner, n_slots, workspace);
  const int64_t n = stream.sequences, capacity = stream.log_capacity;
  if (tokens.batch > n && !(rows && cu_seqlens)) {
    throw std::runtime_error("ids has " + std::to_string(tokens.batch) + " sequences, the state holds " +
                             std::to_string(n));
  }
  stream.seq = Argument("seq", seq, Type::int64, {n, SEQ_FIELDS}).dense().as<int64_t>();
  stream.last_hidden = features_of("last_hidden", last_hidden, head, {n, 2, head.width}).dense().data;
  stream.step_column = Argument("step_column", step_column, Type::int32, {n, capacity}).dense().as<int32_t>();
  stream.step_region = Argument("step_region", step_region, Type::int8, {n, capacity}).dense().as<int8_t>();
  return {tokens, at, segments, make_automaton(token_class, transition), head, stream};
}

struct StepMask {
  Ids ids;
  Automaton automaton;
  const int64_t *pad, *length, *start;
  Tensor mask;
};

inline StepMask make_step_mask(const Tensor& ids, const Tensor& token_class, const Tensor& transition, const Tensor& pad,
                        const Tensor& length, const Tensor& start) {
  const Ids tokens = make_ids(ids);
  const auto column = [&](const char* name, const Tensor& tensor) {
    return Argument(name, tensor, Type::int64, {tokens.batch}).dense().as<int64_t>();
  };
  const int64_t shape[] = {tokens.batch, tokens.length};
  return {tokens,
          make_automaton(token_class, transition),
          column("pad", pad),
          column("length", length),
          column("start", start),
          torch::stable::new_empty(ids, {shape, 2}, torch::headeronly::ScalarType::Bool)};
}

inline Tensor new_floats(const Tensor& like, int64_t count) {
  return torch::stable::new_empty(like, {&count, 1}, torch::headeronly::ScalarType::Float);
}

struct HeadOnRows {
  Head head;
  Rows rows;
  Tensor out;
};

inline HeadOnRows make_head_on_rows(const Tensor& features, const Tensor& w1, const Tensor& b1, const Tensor& w2,
                             const Tensor* b2, int64_t activation) {
  const Head head = make_head(w1, b1, w2, b2, features, activation);
  const Argument rows = features_of("features", features, head, {ANY, head.width});
  return {head, {rows.dense(1).data, rows.strides[0], rows.sizes[0]}, new_floats(features, rows.sizes[0])};
}

inline const float* make_logits(const Tensor& logits, const Stream& stream) {
  return Argument("logits", logits, Type::float32, {stream.slot_capacity}).dense().as<float>();
}

#define DECODE_STEP_ARGUMENTS                                                                                     \
  const Tensor &ids, const Tensor &hidden, const Tensor &token_class, const Tensor &transition, const Tensor &w1, \
      const Tensor &b1, const Tensor &w2, const Tensor &b2, const Tensor &seq, const Tensor &tally,               \
      const Tensor &last_hidden, const Tensor &step_column, const Tensor &step_region, const Tensor &step_score,  \
      const Tensor &slots, const Tensor &slot_owner, const Tensor &n_slots, const Tensor &workspace,              \
      bool at_predict, bool immediate, const Optional &rows, const Optional &cu_seqlens, int64_t quiet,         \
      int64_t activation
#define DECODE_STEP_NAMES                                                                                        \
  token_class, transition, w1, b1, w2, b2, seq, tally, last_hidden, step_column, step_region, step_score, slots, \
      slot_owner, n_slots, workspace, rows, cu_seqlens, quiet, activation

}  // namespace reflective

// Makes the functions `<op>_<where>` the ops' implementations for one kind of tensor.
#define IMPLEMENT_OPS(m, where)                                       \
  m.impl("step_mask", TORCH_BOX(&reflective::step_mask_##where));     \
  m.impl("score_rows", TORCH_BOX(&reflective::score_rows_##where));   \
  m.impl("logit_rows", TORCH_BOX(&reflective::logit_rows_##where));   \
  m.impl("decode_step", TORCH_BOX(&reflective::decode_step_##where)); \
  m.impl("flush", TORCH_BOX(&reflective::flush_##where));             \
  m.impl("tally_slots", TORCH_BOX(&reflective::tally_slots_##where));
