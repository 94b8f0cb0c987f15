#include "launch.cuh"

namespace reflective::gpu {

int current_device() {
  int index;
  check(cudaGetDevice(&index));
  return index;
}

void set_device(int index) { check(cudaSetDevice(index)); }

}  // namespace reflective::gpu
