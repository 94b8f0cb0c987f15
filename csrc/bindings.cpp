// torch.ops.reflective.* on CPU tensors. The only file that knows torch, and of it only libtorch's stable ABI: one
// build serves every torch from 2.11 and every Python from 3.10. The schemas are stated in reflective/ops.py.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <stdexcept>
#include <string>

#include "capability.h"
#include "decode_step.h"
#include "layout.h"
#include "parallel.h"
#include "score_rows.h"
#include "step_mask.h"

namespace reflective {

void parallel_for(int64_t n, int64_t grain, RangeFunction function, void* context) {
  if (n <= grain) {
    if (n > 0) function(0, n, context);
  } else if (torch_parallel_for(0, n, grain, function, context) != TORCH_SUCCESS) {
    throw std::runtime_error("a thread of reflective failed");
  }
}

namespace {

using torch::stable::Tensor;

enum class Type { int64, int32, int8, float64, float32, bfloat16 };
constexpr int64_t ANY = -1;  // a size that may be anything

int32_t code(Type type) {
  static const int32_t codes[] = {aoti_torch_dtype_int64(),   aoti_torch_dtype_int32(),   aoti_torch_dtype_int8(),
                                  aoti_torch_dtype_float64(), aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16()};
  return codes[static_cast<int>(type)];
}

const char* name_of(Type type) {
  static const char* const names[] = {"int64", "int32", "int8", "float64", "float32", "bfloat16"};
  return names[static_cast<int>(type)];
}

// One argument, looked at once.
struct Argument {
  const char* name;
  void* data;
  const int64_t *sizes, *strides;
  int64_t dim;

  Argument(const char* name, const Tensor& tensor, Type type, std::initializer_list<int64_t> expected)
      : name(name), sizes(tensor.sizes().data()), strides(tensor.strides().data()), dim(tensor.dim()) {
    int32_t dtype;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
    if (dtype != code(type)) fail(std::string("must be ") + name_of(type));
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

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

Type head_type(const Tensor& w1) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(w1.get(), &dtype));
  if (dtype == code(Type::float32)) return Type::float32;
  if (dtype == code(Type::bfloat16)) return Type::bfloat16;
  throw std::runtime_error("w1 must be float32 or bfloat16: the compiled CPU backend has no other head");
}

Head make_head(const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2) {
  const Type type = head_type(w1);
  const Argument weights("w1", w1, type, {ANY, ANY});
  const int64_t units = weights.sizes[0], width = weights.sizes[1];
  if (units == 0) weights.fail("must have at least one row");
  return {weights.dense().data,
          Argument("b1", b1, type, {units}).dense().data,
          Argument("w2", w2, type, {1, units}).dense().data,
          Argument("b2", b2, type, {1}).data,
          units,
          width,
          type == Type::bfloat16};
}

Type type_of(const Head& head) { return head.is_bfloat16 ? Type::bfloat16 : Type::float32; }

Ids make_ids(const Tensor& ids) {
  const Argument a("ids", ids, Type::int64, {ANY, ANY});
  return {a.as<int64_t>(), a.sizes[0], a.sizes[1], a.strides[0], a.strides[1]};
}

Automaton make_automaton(const Tensor& token_class, const Tensor& transition) {
  const Argument classes("token_class", token_class, Type::int32, {ANY});
  const Argument table("transition", transition, Type::int32, {ANY, ANY});
  return {classes.dense().as<int32_t>(), table.dense().as<int32_t>(), classes.sizes[0], table.sizes[0], table.sizes[1]};
}

// Everything but what only decode_step touches.
Stream make_buffer(const Head& head, const Tensor& tally, const Tensor& step_score, const Tensor& slots,
                   const Tensor& slot_owner, const Tensor& n_slots) {
  const Argument sums("tally", tally, Type::float64, {ANY, N_REGIONS, TALLY_FIELDS});
  const Argument log("step_score", step_score, Type::float32, {sums.sizes[0], ANY});
  const Argument buffer("slots", slots, type_of(head), {ANY, head.width});
  if (buffer.sizes[0] == 0) buffer.fail("must have at least one row");
  Stream stream{};
  stream.tally = sums.dense().as<double>();
  stream.step_score = log.dense().as<float>();
  stream.slots = buffer.dense().data;
  stream.slot_owner =
      Argument("slot_owner", slot_owner, Type::int32, {buffer.sizes[0], OWNER_FIELDS}).dense().as<int32_t>();
  stream.n_slots = Argument("n_slots", n_slots, Type::int32, {1}).as<int32_t>();
  stream.sequences = sums.sizes[0];
  stream.log_capacity = log.sizes[1];
  stream.slot_capacity = buffer.sizes[0];
  return stream;
}

Tensor step_mask_cpu(const Tensor& ids, const Tensor& token_class, const Tensor& transition, const Tensor& pad,
                     const Tensor& length, const Tensor& start) {
  const Ids tokens = make_ids(ids);
  const Automaton automaton = make_automaton(token_class, transition);
  const auto column = [&](const char* name, const Tensor& tensor) {
    return Argument(name, tensor, Type::int64, {tokens.batch}).dense().as<int64_t>();
  };
  const int64_t shape[] = {tokens.batch, tokens.length};
  Tensor mask = torch::stable::new_empty(ids, {shape, 2}, torch::headeronly::ScalarType::Bool);
  step_mask(tokens, automaton, column("pad", pad), column("length", length), column("start", start),
            static_cast<bool*>(mask.data_ptr()));
  return mask;
}

Tensor score_rows_cpu(const Tensor& features, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2) {
  const Head head = make_head(w1, b1, w2, b2);
  const Argument rows("features", features, type_of(head), {ANY, head.width});
  const int64_t count = rows.sizes[0];
  Tensor out = torch::stable::new_empty(features, {&count, 1}, torch::headeronly::ScalarType::Float);
  score_rows(head, {rows.dense(1).data, rows.strides[0], count}, static_cast<float*>(out.data_ptr()));
  return out;
}

void decode_step_cpu(const Tensor& ids, const Tensor& hidden, const Tensor& token_class, const Tensor& transition,
                     const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2, const Tensor& seq,
                     const Tensor& tally, const Tensor& last_hidden, const Tensor& step_column,
                     const Tensor& step_region, const Tensor& step_score, const Tensor& slots, const Tensor& slot_owner,
                     const Tensor& n_slots, bool at_predict, bool immediate) {
  const Ids tokens = make_ids(ids);
  const Head head = make_head(w1, b1, w2, b2);
  const Argument states("hidden", hidden, type_of(head), {tokens.batch, tokens.length, head.width});
  Stream stream = make_buffer(head, tally, step_score, slots, slot_owner, n_slots);
  const int64_t n = stream.sequences, capacity = stream.log_capacity;
  if (tokens.batch > n) {
    throw std::runtime_error("ids has " + std::to_string(tokens.batch) + " sequences, the state holds " +
                             std::to_string(n));
  }
  stream.seq = Argument("seq", seq, Type::int64, {n, SEQ_FIELDS}).dense().as<int64_t>();
  stream.last_hidden = Argument("last_hidden", last_hidden, type_of(head), {n, head.width}).dense().data;
  stream.step_column = Argument("step_column", step_column, Type::int32, {n, capacity}).dense().as<int32_t>();
  stream.step_region = Argument("step_region", step_region, Type::int8, {n, capacity}).dense().as<int8_t>();
  decode_step(tokens, {states.dense(2).data, states.strides[0], states.strides[1]},
              make_automaton(token_class, transition), head, stream, at_predict, immediate);
}

void flush_cpu(const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2, const Tensor& tally,
               const Tensor& step_score, const Tensor& slots, const Tensor& slot_owner, const Tensor& n_slots) {
  const Head head = make_head(w1, b1, w2, b2);
  flush(head, make_buffer(head, tally, step_score, slots, slot_owner, n_slots));
}

std::string cpu_capability() { return capability().name; }

}  // namespace
}  // namespace reflective

STABLE_TORCH_LIBRARY_FRAGMENT(reflective, m) {
  m.def("cpu_capability() -> str");
  m.def("compiled_cpu_capabilities() -> str");
  m.def("set_cpu_capability(str name) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(reflective, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&reflective::cpu_capability));
  m.impl("compiled_cpu_capabilities", TORCH_BOX(&reflective::compiled_capabilities));
  m.impl("set_cpu_capability", TORCH_BOX(&reflective::set_capability));
}

STABLE_TORCH_LIBRARY_IMPL(reflective, CPU, m) {
  m.impl("step_mask", TORCH_BOX(&reflective::step_mask_cpu));
  m.impl("score_rows", TORCH_BOX(&reflective::score_rows_cpu));
  m.impl("decode_step", TORCH_BOX(&reflective::decode_step_cpu));
  m.impl("flush", TORCH_BOX(&reflective::flush_cpu));
}

// `import reflective._C` is what loads the registrations above; the module itself is empty.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
