// From a Head to the kernel of its types, tiled for the device at hand.
#pragma once

#include <algorithm>
#include <atomic>
#include <string>

#include "gpu_ops.h"
#include "head.cuh"

namespace reflective::gpu {

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

struct Device {
  int index, multiprocessors, shared_bytes;  // the most that a block can have
};

// The current one.
inline Device device() {
  Device device{};
  check(cudaGetDevice(&device.index));
  check(cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, device.index));
  check(cudaDeviceGetAttribute(&device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device.index));
  return device;
}

// Launches with `shared_bytes`, more of which than 48 KiB must be asked for, once a kernel and device.
template <auto kernel, class... A>
void launch_on(const Device& device, int grid, int block, int shared_bytes, cudaStream_t stream,
               const A&... arguments) {
  static std::atomic<uint64_t> allowed{0};
  const uint64_t bit = uint64_t{1} << device.index % 64;
  if (!(allowed.load(std::memory_order_acquire) & bit)) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_bytes));
    allowed.fetch_or(bit, std::memory_order_release);
  }
  launch(kernel, dim3(grid), block, shared_bytes, stream, arguments...);
}

// Groups of units a tile: as few waves of tiles over the multiprocessors as possible, each wave as short as possible;
// of equals the largest tile, which reads the features least often. 5 at H = 5120 on 132: 128 tiles, one wave.
inline Tiling tiling(int64_t units, int multiprocessors) {
  const int64_t groups = (units + GROUP - 1) / GROUP;
  Tiling best{};
  int64_t best_cost = INT64_MAX;
  for (int candidate = 1; candidate <= MAX_GROUPS; ++candidate) {
    const int64_t tiles = (groups + candidate - 1) / candidate;
    const int64_t cost = (tiles + multiprocessors - 1) / multiprocessors * candidate;
    if (cost <= best_cost) best = {candidate, static_cast<int>(tiles)}, best_cost = cost;
  }
  return best;
}

template <class W, class T>
DeviceHead<W, T> device_head(const Head& head, const Device& device) {
  using Bias = typename DeviceHead<W, T>::Bias;
  return {tiling(head.units, device.multiprocessors),
          static_cast<const W*>(head.w1),
          static_cast<const Bias*>(head.b1),
          static_cast<const Bias*>(head.w2),
          static_cast<const Bias*>(head.b2),
          static_cast<int>(head.units),
          static_cast<int>(head.width)};
}

// use(head), the head typed and tiled.
template <class Use>
void with_head(const Head& head, const Device& device, Use use) {
  switch (head.type) {
    case HeadType::float32: return use(device_head<float, float>(head, device));
    case HeadType::bfloat16: return use(device_head<Bfloat16, Bfloat16>(head, device));
    case HeadType::float16: return use(device_head<Float16, Float16>(head, device));
    case HeadType::e4m3_bfloat16: return use(device_head<E4m3, Bfloat16>(head, device));
    case HeadType::e4m3_float16: return use(device_head<E4m3, Float16>(head, device));
  }
}

}  // namespace reflective::gpu
