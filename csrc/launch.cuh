// From a Head to the kernel of its types, tiled for the device at hand.
#pragma once

#include <algorithm>
#include <atomic>
#include <string>

#include "gpu_ops.h"
#include "head.cuh"
#include "head_sm90.cuh"

namespace reflective::gpu {

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

struct Device {
  int index, multiprocessors, shared_bytes;  // the most that a block can have
  int capability;                            // 90 for 9.0
};

// The current one.
inline Device device() {
  Device device{};
  check(cudaGetDevice(&device.index));
  check(cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, device.index));
  check(cudaDeviceGetAttribute(&device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device.index));
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device.index));
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device.index));
  device.capability = 10 * major + minor;
  return device;
}

// Launches with `shared_bytes`, more of which than 48 KiB must be asked for, once a kernel and device.
template <auto kernel, unsigned CLUSTER = 1, class... A>
void launch_on(const Device& device, int grid, int block, int shared_bytes, cudaStream_t stream,
               const A&... arguments) {
  static std::atomic<uint64_t> allowed{0};
  const uint64_t bit = uint64_t{1} << device.index % 64;
  if (!(allowed.load(std::memory_order_acquire) & bit)) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_bytes));
    allowed.fetch_or(bit, std::memory_order_release);
  }
  launch<CLUSTER>(kernel, dim3(grid), block, shared_bytes, stream, arguments...);
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

// Blocks for `items` pieces of work: whole clusters, and no more than there are multiprocessors.
template <class H>
int blocks_for(const Device& device, int64_t items) {
  const int64_t blocks = (items + H::CLUSTER - 1) / H::CLUSTER * H::CLUSTER;
  return static_cast<int>(std::min<int64_t>(device.multiprocessors / H::CLUSTER * H::CLUSTER, blocks));
}

template <class H>
H device_head(const Head& head, const Device& device) {
  using Bias = typename H::Bias;
  return {tiling(head.units, device.multiprocessors),
          static_cast<const typename H::W*>(head.w1),
          static_cast<const Bias*>(head.b1),
          static_cast<const Bias*>(head.w2),
          static_cast<const Bias*>(head.b2),
          static_cast<int>(head.units),
          static_cast<int>(head.width)};
}

template <class T>
CurvedHead<T, T> curved_head(const Head& head, const Device& device) {
  return {device_head<DeviceHead<T, T>>(head, device), curve_of(head.activation)};
}

// Rows of a head's width in device memory, [rows, planes, width].
struct Rows3 {
  const void* data;
  int planes;
  int64_t rows, stride;  // in elements
};

template <class W, class T>
typename DeviceHead<W, T>::Maps maps_of(const DeviceHead<W, T>&, const Rows3&, const Rows3&) {
  return {};
}

#if defined(__CUDACC__) && defined(REFLECTIVE_SM90A)

// What the copy engine needs to know of a matrix, or of planes of rows, by the sizes from the innermost on; `box` of it at
// once. Sizes and strides, in elements, of all dimensions but the innermost's stride, which is 1.
template <class T, int RANK>
CUtensorMap tensor_map(const void* data, const int64_t (&sizes)[RANK], const int64_t (&strides)[RANK - 1],
                       const int (&box)[RANK]) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
#else
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found));
#endif
    if (found != cudaDriverEntryPointSuccess) throw std::runtime_error("this driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  CUtensorMap map{};
  cuuint64_t size[RANK], bytes[RANK - 1];
  cuuint32_t of_box[RANK], steps[RANK];
  for (int i = 0; i < RANK; ++i) {
    size[i] = static_cast<cuuint64_t>(sizes[i]), of_box[i] = static_cast<cuuint32_t>(box[i]), steps[i] = 1;
    if (i > 0) bytes[i - 1] = static_cast<cuuint64_t>(strides[i - 1]) * sizeof(T);
  }
  const auto type = std::is_same_v<T, Bfloat16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult status =
      encode(&map, type, RANK, const_cast<void*>(data), size, bytes, of_box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled refuses " + std::to_string(sizes[RANK - 1]) + " rows of " +
                             std::to_string(sizes[0]) + ", " + std::to_string(strides[RANK - 2]) + " elements apart");
  }
  return map;
}

// Boxes of `box_rows`.
template <class T>
CUtensorMap rows_map(const Rows3& rows, int width, int box_rows) {
  const int64_t n = std::max<int64_t>(1, rows.rows);
  // Of one row the distance to the next is nobody's business.
  const int64_t stride = n > 1 ? rows.stride : int64_t{rows.planes} * width;
  return tensor_map<T, 3>(rows.data, {width, rows.planes, n}, {width, stride}, {sm90::COLUMNS, 1, box_rows});
}

template <class T>
typename Sm90Head<T>::Maps maps_of(const Sm90Head<T>& head, const Rows3& in_order, const Rows3& scattered) {
  const int units = head.groups * GROUP;
  typename Sm90Head<T>::Maps maps{};
  maps.w1 = tensor_map<T, 2>(head.w1, {head.width, head.units}, {head.width}, {sm90::COLUMNS, units});
  maps.eight = rows_map<T>(in_order, head.width, 8);
  maps.eights = rows_map<T>(in_order, head.width, 64);
  if (scattered.data) {
    maps.scattered = rows_map<T>(scattered, head.width, 8);
    maps.single = rows_map<T>(scattered, head.width, 1);
  }
  return maps;
}

#endif

// use(head), the head typed and tiled.
template <class Use>
void with_head(const Head& head, const Device& device, Use use) {
  if (head.activation != RELU) {
    switch (head.type) {
      case HeadType::float32: return use(curved_head<float>(head, device));
      case HeadType::bfloat16: return use(curved_head<Bfloat16>(head, device));
      case HeadType::float16: return use(curved_head<Float16>(head, device));
      default: throw std::runtime_error("float8 weights go with relu alone");
    }
  }
#if defined(__CUDACC__) && defined(REFLECTIVE_SM90A)
  if (device.capability == 90 && head.type == HeadType::bfloat16) return use(device_head<Sm90Head<Bfloat16>>(head, device));
  if (device.capability == 90 && head.type == HeadType::float16) return use(device_head<Sm90Head<Float16>>(head, device));
#endif
  switch (head.type) {
    case HeadType::float32: return use(device_head<DeviceHead<float, float>>(head, device));
    case HeadType::bfloat16: return use(device_head<DeviceHead<Bfloat16, Bfloat16>>(head, device));
    case HeadType::float16: return use(device_head<DeviceHead<Float16, Float16>>(head, device));
    case HeadType::e4m3_bfloat16: return use(device_head<DeviceHead<E4m3, Bfloat16>>(head, device));
    case HeadType::e4m3_float16: return use(device_head<DeviceHead<E4m3, Float16>>(head, device));
  }
}

}  // namespace reflective::gpu
