// What the kernels ask of a GPU, each primitive once: CUDA and PTX under nvcc, else gpu_emulation.h, which does the
// same on the processor, so that the tests can run the kernels without a GPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>

namespace reflective {

struct Bfloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

}  // namespace reflective

#ifndef __CUDACC__

#include "gpu_emulation.h"

#else

#include <cuda_runtime.h>

namespace reflective {

// The block's dynamic shared memory.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
  return dynamic_shared_memory;
}

// Starts a copy of 16 bytes into shared memory, past the first-level cache; zeros, and nothing is read, unless `valid`.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool valid = true) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
               : "memory");
}

// The copies that this thread started since the last commit become a group.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Returns once all of this thread's groups but the newest N have landed.
template <int N>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// A barrier of all THREADS of the block, wherever in the code each of its warps is.
template <int THREADS>
__device__ __forceinline__ void meet() {
  asm volatile("barrier.sync.aligned 1, %0;" ::"n"(THREADS) : "memory");
}

// Four matrices of 8 rows of 16 bytes in shared memory, of which each thread names one row; into fragments, as PTX has
// them for ldmatrix.x4.
__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

// d += a b over the warp, [16, 16] by [16, 8]; fragments as PTX has them for mma.m16n8k16.
template <class T>
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#define REFLECTIVE_MMA(T, type)                                                                                   \
  template <>                                                                                                     \
  __device__ __forceinline__ void mma_16x8x16<T>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                                    \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                    \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                          \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                      \
  }
REFLECTIVE_MMA(Bfloat16, "bf16")
REFLECTIVE_MMA(Float16, "f16")
#undef REFLECTIVE_MMA

__device__ __forceinline__ float to_float(float x) { return x; }

__device__ __forceinline__ float to_float(Bfloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }

__device__ __forceinline__ float to_float(Float16 x) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
}

// Two packed products, rounded to nearest; subnormal numbers are kept.
template <class T>
__device__ __forceinline__ uint32_t multiply_pairs(uint32_t x, uint32_t y);

template <>
__device__ __forceinline__ uint32_t multiply_pairs<Float16>(uint32_t x, uint32_t y) {
  uint32_t z;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
  return z;
}

// sm_80 multiplies bfloat16 only as it adds: -0 is what keeps the sign of a zero.
template <>
__device__ __forceinline__ uint32_t multiply_pairs<Bfloat16>(uint32_t x, uint32_t y) {
  uint32_t z;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(z) : "r"(x), "r"(y), "r"(0x80008000u));
  return z;
}

// Byte i of the result is the byte of y:x that the selector's nibble i names; with 8 added, its sign in all bits.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t x, uint32_t y, uint32_t selector) {
  uint32_t z;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(z) : "r"(x), "r"(y), "r"(selector));
  return z;
}

// 2^x, within 2 units of the last place; infinity or 0 where float32 has no room.
__device__ __forceinline__ float power_of_two(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

// x / y, within 2 units of the last place; 0 where y is beyond 2^126, NaN where both are infinite.
__device__ __forceinline__ float quotient(float x, float y) { return __fdividef(x, y); }

// counter += 1, ordered on the whole device with all that the block did before its last barrier; returns the old value.
__device__ __forceinline__ unsigned arrive(unsigned* counter) {
  unsigned before;
  asm volatile("atom.add.acq_rel.gpu.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}

// A load that sees what other blocks wrote before they arrived: from the second-level cache, not from this
// multiprocessor's own.
template <class T>
__device__ __forceinline__ T load_fresh(const T* address) {
  return __ldcg(address);
}

// In clusters of CLUSTER blocks. Throws std::runtime_error with CUDA's words if the kernel cannot be launched.
template <unsigned CLUSTER = 1, class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, unsigned block, size_t shared_bytes, cudaStream_t stream, A... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = CLUSTER, cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = CLUSTER > 1;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...);
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

}  // namespace reflective

#endif

namespace reflective {

template <class T>
__device__ __forceinline__ T from_bits(uint16_t bits) {
  return T{bits};
}

// Four float8_e4m3fn codes, lowest byte first, into two pairs of T, exactly; NaN stays NaN.
template <class T>
__device__ __forceinline__ void unpack_e4m3(uint32_t four, uint32_t (&pairs)[2]);

#if __CUDA_ARCH__ >= 890

template <>
__device__ __forceinline__ void unpack_e4m3<Float16>(uint32_t four, uint32_t (&pairs)[2]) {
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pairs[0]) : "h"(static_cast<uint16_t>(four)));
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pairs[1]) : "h"(static_cast<uint16_t>(four >> 16)));
}

template <>
__device__ __forceinline__ void unpack_e4m3<Bfloat16>(uint32_t four, uint32_t (&pairs)[2]) {
  unpack_e4m3<Float16>(four, pairs);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float low = to_float(from_bits<Float16>(pairs[i])), high = to_float(from_bits<Float16>(pairs[i] >> 16));
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pairs[i]) : "f"(high), "f"(low));
  }
}

#else

// A code's seven bits, moved to where T has its lowest exponent bit and the three highest of its fraction, are its
// number divided by a power of two, subnormal numbers included.
template <class T>
__device__ __forceinline__ void widen_e4m3(uint32_t four, int shift, uint32_t powers, uint32_t (&pairs)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t codes = permute_bytes(four, 0, i ? 0x3424 : 0x1404);  // in the high byte of each half
    const uint32_t magnitude = codes & 0x7f007f00;
    // Of all codes 0x7f alone carries into the sign's place; ones in all of a half are a NaN.
    const uint32_t nan = permute_bytes(magnitude + 0x01000100, 0, 0xbb99);
    pairs[i] = multiply_pairs<T>((codes & 0x80008000) | magnitude >> shift | nan, powers);
  }
}

template <>
__device__ __forceinline__ void unpack_e4m3<Float16>(uint32_t four, uint32_t (&pairs)[2]) {
  widen_e4m3<Float16>(four, 1, 0x5c005c00, pairs);  // 2^8
}

template <>
__device__ __forceinline__ void unpack_e4m3<Bfloat16>(uint32_t four, uint32_t (&pairs)[2]) {
  widen_e4m3<Bfloat16>(four, 4, 0x7b807b80, pairs);  // 2^120
}

#endif

}  // namespace reflective
