// The ops on CUDA tensors; compiled only into a build with CUDA. With REFLECTIVE_EMULATION the CUDA kernels answer for
// CPU tensors, under a namespace of their own: see tests/emulation.
#include <torch/csrc/stable/accelerator.h>

#include <dlfcn.h>

#include "bind_arguments.h"
#include "gpu_ops.h"

namespace reflective {
namespace {

#ifdef REFLECTIVE_EMULATION

cudaStream_t current_stream(int32_t) { return nullptr; }

#else

// Only a libtorch with CUDA has this function, and this extension also loads beside one without.
cudaStream_t current_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const auto function = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  if (!function) throw std::runtime_error("this torch has no aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

#endif

// While it lives, the tensor's device is the current one and all other arguments must be there.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& tensor) : index_(tensor.get_device_index()) {
    if (index_ >= 0) guard_.emplace(index_);
    on_gpu = true;
    gpu_index = index_;
  }
  ~OnDeviceOf() { on_gpu = false; }
  OnDeviceOf(const OnDeviceOf&) = delete;

  cudaStream_t stream() const { return current_stream(index_); }

 private:
  const int32_t index_;  // -1 under emulation
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

// `rows` itself wherever a GPU can read it as it lies, as it can what a model puts out; else a copy.
Tensor readable(const Tensor& rows) {
  const auto sizes = rows.sizes(), strides = rows.strides();
  const int64_t dim = rows.dim(), element = rows.element_size();
  bool fits = reinterpret_cast<uintptr_t>(rows.data_ptr()) % 16 == 0;
  for (int64_t d = 0; d < dim; ++d) {
    fits &= sizes[d] == 1 || (d == dim - 1 ? strides[d] == 1 : strides[d] * element % 16 == 0);
  }
  if (fits) return rows;
  Tensor copy = torch::stable::new_empty(rows, sizes);
  return torch::stable::copy_(copy, rows);
}

Tensor step_mask_cuda(const Tensor& ids, const Tensor& token_class, const Tensor& transition, const Tensor& pad,
                      const Tensor& length, const Tensor& start) {
  const OnDeviceOf device(ids);
  const StepMask call = make_step_mask(ids, token_class, transition, pad, length, start);
  gpu::step_mask(call.ids, call.automaton, call.pad, call.length, call.start, static_cast<bool*>(call.mask.data_ptr()),
                 device.stream());
  return call.mask;
}

// `op`: gpu::score_rows or gpu::logit_rows.
Tensor head_on_rows_cuda(decltype(gpu::score_rows)* op, const Tensor& features, const Tensor& w1, const Tensor& b1,
                         const Tensor& w2, const Tensor* b2, int64_t activation) {
  const OnDeviceOf device(features);
  const Tensor rows = readable(features);
  const HeadOnRows call = make_head_on_rows(rows, w1, b1, w2, b2, activation);
  const Tensor sums = new_floats(features, gpu::row_sums_size(call.head, call.rows.count));
  op(call.head, call.rows, static_cast<float*>(sums.data_ptr()), static_cast<float*>(call.out.data_ptr()),
     device.stream());
  return call.out;
}

Tensor score_rows_cuda(const Tensor& features, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2,
                       int64_t activation) {
  return head_on_rows_cuda(gpu::score_rows, features, w1, b1, w2, &b2, activation);
}

Tensor logit_rows_cuda(const Tensor& features, const Tensor& w1, const Tensor& b1, const Tensor& w2,
                       const Optional& b2, int64_t activation) {
  return head_on_rows_cuda(gpu::logit_rows, features, w1, b1, w2, b2 ? &*b2 : nullptr, activation);
}

void decode_step_cuda(DECODE_STEP_ARGUMENTS) {
  const OnDeviceOf device(ids);
  const Tensor states = readable(hidden);
  const DecodeStep call = make_decode_step(ids, states, DECODE_STEP_NAMES);
  if (!cu_seqlens && call.ids.batch > call.stream.slot_capacity) {
    throw std::runtime_error("slots has " + std::to_string(call.stream.slot_capacity) + " rows; " +
                             std::to_string(call.ids.batch) + " sequences need at least as many");
  }
  gpu::decode_step(call.ids, call.hidden, call.segments, call.automaton, call.head, call.stream, at_predict, immediate,
                   quiet, device.stream());
}

void flush_cuda(const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2, const Tensor& tally,
                const Tensor& step_score, const Tensor& slots, const Tensor& slot_owner, const Tensor& n_slots,
                const Tensor& workspace, int64_t activation) {
  const OnDeviceOf device(slots);
  const Head head = make_head(w1, b1, w2, &b2, slots, activation);
  gpu::flush(head, make_buffer(head, tally, step_score, slots, slot_owner, n_slots, workspace), device.stream());
}

void tally_slots_cuda(const Tensor& logits, const Tensor& b2, const Tensor& tally, const Tensor& step_score,
                      const Tensor& slot_owner, const Tensor& n_slots) {
  const OnDeviceOf device(logits);
  const Stream stream = make_tallies(tally, step_score, slot_owner, n_slots);
  const HeadType type = head_type(b2, b2);
  gpu::tally_slots(make_logits(logits, stream), make_b2(b2, type), type, stream, device.stream());
}

}  // namespace
}  // namespace reflective

#ifdef REFLECTIVE_EMULATION
STABLE_TORCH_LIBRARY_IMPL(REFLECTIVE_NAMESPACE, CPU, m) { IMPLEMENT_OPS(m, cuda) }
#else
STABLE_TORCH_LIBRARY_IMPL(REFLECTIVE_NAMESPACE, CUDA, m) { IMPLEMENT_OPS(m, cuda) }
#endif
