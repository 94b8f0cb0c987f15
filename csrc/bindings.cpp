// What is registered beside the ops, and the module whose import loads all of it: torch.ops.reflective.*, or that of
// another name in REFLECTIVE_NAMESPACE, which setup.py gives. These bind*.{h,cpp} are the only files that know torch, and
// of it only libtorch's stable ABI: one build serves every torch from 2.11 and every Python from 3.10, with and without
// CUDA. The ops' schemas are stated in reflective/scoring/ops.py.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <string>

#include "capability.h"

namespace reflective {
namespace {

std::string cpu_capability() { return capability().name; }

// "sm_80 sm_90", "" where the build had no CUDA.
std::string compiled_cuda_architectures() {
#ifdef REFLECTIVE_CUDA_ARCHITECTURES
  return REFLECTIVE_CUDA_ARCHITECTURES;
#else
  return "";
#endif
}

}  // namespace
}  // namespace reflective

STABLE_TORCH_LIBRARY_FRAGMENT(REFLECTIVE_NAMESPACE, m) {
  m.def("cpu_capability() -> str");
  m.def("compiled_cpu_capabilities() -> str");
  m.def("set_cpu_capability(str name) -> ()");
  m.def("compiled_cuda_architectures() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(REFLECTIVE_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&reflective::cpu_capability));
  m.impl("compiled_cpu_capabilities", TORCH_BOX(&reflective::compiled_capabilities));
  m.impl("set_cpu_capability", TORCH_BOX(&reflective::set_capability));
  m.impl("compiled_cuda_architectures", TORCH_BOX(&reflective::compiled_cuda_architectures));
}

// Importing the module is what loads the registrations above; itself it is empty. Whoever builds it gives its name: setup.py
// _C, the Hub's kernel-builder one that holds for a single build.
#define REFLECTIVE_INIT_OF(name) PyInit_##name
#define REFLECTIVE_INIT(name) REFLECTIVE_INIT_OF(name)

PyMODINIT_FUNC REFLECTIVE_INIT(TORCH_EXTENSION_NAME)() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, C10_STRINGIZE(TORCH_EXTENSION_NAME), nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
