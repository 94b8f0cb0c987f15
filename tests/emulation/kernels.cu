// Small kernels, right and wrong on purpose, by which tests/test_emulation.py checks the emulator. nvcc takes them too.
#include "../../csrc/gpu.cuh"

using namespace reflective;

namespace {

__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
  return x;
}

// The sum over the block, in every thread.
__device__ __forceinline__ double block_sum(double x, double* warps) {
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  double sum = 0;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) sum += warps[warp];
  __syncthreads();
  return sum;
}

// out[0] = sum of x[n]; the last block to arrive adds the blocks' partial sums and leaves the counter at zero.
__global__ void __launch_bounds__(256) grid_sum_kernel(const float* x, unsigned n, double* partial, unsigned* counter,
                                                       double* out) {
  auto* warps = reinterpret_cast<double*>(shared_memory());
  double sum = 0;
  for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) sum += x[i];
  sum = block_sum(sum, warps);
  bool last = false;
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = sum;
    last = arrive(counter) == gridDim.x - 1;
  }
  if (!__syncthreads_or(last)) return;
  sum = block_sum(threadIdx.x < gridDim.x ? load_fresh(partial + threadIdx.x) : 0, warps);
  if (threadIdx.x == 0) {
    *counter = 0;
    *out = sum;
  }
}

// Collectives and their values: out[12][threads].
__global__ void collectives_kernel(int* out, unsigned* total) {
  const int t = static_cast<int>(threadIdx.x), n = static_cast<int>(blockDim.x);
  out[t] = __shfl_sync(~0u, t, 5);
  out[n + t] = __shfl_xor_sync(~0u, t, 9);
  out[2 * n + t] = __shfl_up_sync(~0u, t, 3);
  out[3 * n + t] = __shfl_sync(~0u, t, 1, 8);
  out[4 * n + t] = static_cast<int>(__ballot_sync(~0u, t % 3 == 0));
  out[5 * n + t] = __syncthreads_count(t % 5 == 0);
  out[6 * n + t] = __syncthreads_or(t == 40);
  out[7 * n + t] = __syncthreads_or(t == n);
  out[8 * n + t] = __popc(t);
  const unsigned half = t % 32 < 16 ? 0xffff : 0xffff0000;
  out[9 * n + t] = static_cast<int>(__ballot_sync(half, t % 2));
  out[10 * n + t] = static_cast<int>(__shfl_xor_sync(~0u, t * 0.5, 1) * 2);
  out[11 * n + t] = static_cast<int>(__shfl_up_sync(~0u, t * 0.5f, 1) * 2);
  atomicAdd(total, 1u);
}

// out[block] = sum of the block's `stages` pieces of blockDim.x * 4 floats, through a ring of three, AHEAD pieces on
// their way while one is read; a thread waits for all of its groups but the newest PENDING. 2 and 1 are right.
template <int AHEAD, int PENDING, bool GUARDED>
__global__ void ring_kernel(const float* x, int stages, double* out) {
  constexpr int RING = 3;
  auto* ring = reinterpret_cast<float*>(shared_memory());
  auto* warps = reinterpret_cast<double*>(ring + RING * blockDim.x * 4);
  const float* piece = x + blockIdx.x * stages * blockDim.x * 4;
  const auto fetch = [&](int stage) {
    const bool valid = stage < stages;
    const float* from = piece + (stage * blockDim.x + threadIdx.x) * 4;
    copy_async_16(ring + (stage % RING * blockDim.x + threadIdx.x) * 4, valid ? from : nullptr, valid);
    copy_async_commit();
  };
  for (int stage = 0; stage < AHEAD; ++stage) fetch(stage);
  double sum = 0;
  for (int stage = 0; stage < stages; ++stage) {
    copy_async_wait<PENDING>();
    // The piece that another thread fetched is read, and one that all have read is overwritten.
    if (GUARDED) __syncthreads();
    const float* mine = ring + (stage % RING * blockDim.x + blockDim.x - 1 - threadIdx.x) * 4;
    for (int i = 0; i < 4; ++i) sum += mine[i];
    fetch(stage + AHEAD);
  }
  sum = block_sum(sum, warps);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

// Reads the numbers of the next warp, after a barrier or not.
template <bool GUARDED>
__global__ void neighbours_kernel(float* out) {
  auto* values = reinterpret_cast<float*>(shared_memory());
  values[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (GUARDED) __syncthreads();
  out[threadIdx.x] = values[(threadIdx.x + 32) % blockDim.x];
}

template <class T>
__global__ void mma_kernel(const T* a, const T* b, float* d) {  // [16, 16], [8, 16] as b's columns, [16, 8]
  const int g = static_cast<int>(threadIdx.x) / 4, t = static_cast<int>(threadIdx.x) % 4;
  const auto pair = [](const T* from) { return *reinterpret_cast<const uint32_t*>(from); };
  const uint32_t left[4] = {pair(a + g * 16 + 2 * t), pair(a + (g + 8) * 16 + 2 * t), pair(a + g * 16 + 2 * t + 8),
                            pair(a + (g + 8) * 16 + 2 * t + 8)};
  const uint32_t right[2] = {pair(b + g * 16 + 2 * t), pair(b + g * 16 + 2 * t + 8)};
  float sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = d[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  mma_16x8x16<T>(sum, left, right);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

template <class T>
__global__ void e4m3_kernel(const uint32_t* codes, float* out) {
  uint32_t pairs[2];
  unpack_e4m3<T>(codes[threadIdx.x], pairs);
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = to_float(from_bits<T>(pairs[i / 2] >> i % 2 * 16 & 0xffff));
}

template <class T>
__global__ void to_float_kernel(const uint16_t* bits, float* out) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = to_float(from_bits<T>(bits[i]));
}

// What hardware leaves undefined, one a case.
__global__ void undefined_kernel(int which, const void* global) {
  const unsigned t = threadIdx.x;
  if (which == 0) {  // one warp, two operations
    if (t < 7) {
      __syncwarp();
    } else {
      __ballot_sync(~0u, 1);
    }
  }
  if (which == 1 && t % 32 < 5) __syncwarp();  // the others go on to the barrier below
  if (which == 2 && t < 32) __syncthreads_or(1);
  if (which == 3 && t % 32 == 4) __shfl_sync(~1u << 4, 1, 6);
  if (which == 4 && t % 32 < 8) __shfl_sync(0xff, 1, 9);
  if (which == 5) copy_async_16(shared_memory() + 8, global);
  if (which == 6) copy_async_16(shared_memory() + 1024, global);
  if (which == 7) copy_async_16(shared_memory(), static_cast<const char*>(global) + 8);
  if (which == 8) reinterpret_cast<volatile unsigned char*>(shared_memory())[1024] = 1;
  if (which == 9) {
    float d[4] = {};
    const uint32_t a[4] = {}, b[2] = {};
    if (t == 3) return;
    mma_16x8x16<Bfloat16>(d, a, b);
  }
  __syncthreads();
}

// Not an error: threads that have ended count as arrived.
__global__ void early_exit_kernel(int* out) {
  if (threadIdx.x % 3 == 0) return;
  if (threadIdx.x >= 32) {
    out[threadIdx.x] = __syncthreads_count(1);
  } else {
    out[threadIdx.x] = static_cast<int>(__ballot_sync(~0u, 1));
    __syncthreads_count(1);
  }
}

thread_local char error[512];

template <class... P, class... A>
const char* run(void (*kernel)(P...), dim3 grid, unsigned block, size_t shared_bytes, A... arguments) {
  try {
    launch(kernel, grid, block, shared_bytes, nullptr, arguments...);
    return nullptr;
  } catch (const std::runtime_error& caught) {
    std::strncpy(error, caught.what(), sizeof error - 1);
    return error;
  }
}

}  // namespace

extern "C" {

const char* grid_sum(const float* x, unsigned n, double* partial, unsigned* counter, double* out, int blocks) {
  return run(grid_sum_kernel, blocks, 256, 64, x, n, partial, counter, out);
}

const char* collectives(int* out, unsigned* total) { return run(collectives_kernel, 1, 64, 0, out, total); }

const char* ring(const float* x, int stages, double* out, int which) {
  const auto kernels = {ring_kernel<2, 1, true>, ring_kernel<2, 2, true>, ring_kernel<3, 2, true>,
                        ring_kernel<2, 1, false>};
  return run(kernels.begin()[which], 2, 64, 3 * 64 * 16 + 16, x, stages, out);
}

const char* neighbours(float* out, bool guarded) {
  return run(guarded ? neighbours_kernel<true> : neighbours_kernel<false>, 1, 128, 512, out);
}

const char* mma(const void* a, const void* b, float* d, bool is_bfloat16) {
  if (is_bfloat16) {
    return run(mma_kernel<Bfloat16>, 1, 32, 0, static_cast<const Bfloat16*>(a), static_cast<const Bfloat16*>(b), d);
  }
  return run(mma_kernel<Float16>, 1, 32, 0, static_cast<const Float16*>(a), static_cast<const Float16*>(b), d);
}

const char* e4m3(const uint32_t* codes, float* out, bool is_bfloat16) {
  return run(is_bfloat16 ? e4m3_kernel<Bfloat16> : e4m3_kernel<Float16>, 1, 64, 0, codes, out);
}

const char* floats(const uint16_t* bits, float* out, bool is_bfloat16) {
  return run(is_bfloat16 ? to_float_kernel<Bfloat16> : to_float_kernel<Float16>, 64, 1024, 0, bits, out);
}

const char* undefined(int which, const void* global) { return run(undefined_kernel, 2, 64, 1024, which, global); }

const char* early_exit(int* out) { return run(early_exit_kernel, 1, 64, 0, out); }

const char* shared_bytes(int bytes, bool opt_in) {
  if (opt_in && cudaFuncSetAttribute(undefined_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) {
    return "refused";
  }
  return run(undefined_kernel, 1, 32, bytes, -1, nullptr);
}
}
