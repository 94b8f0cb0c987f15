#include "launch.cuh"

namespace reflective::gpu {
namespace {

template <class T>
struct StridedRows {
  const T* data;
  int64_t stride;
  int count;

  __device__ const T* operator()(int row) const { return data + row * stride; }

  // For head_sm90.cuh.
  __device__ int octets() const { return (count + 7) / 8; }

  __device__ int octets_in_order() const { return octets(); }

  template <class Maps>
  __device__ typename Maps::Octet octet(const Maps& maps, int octet) const {
    return {&maps.eight, 0, 8 * octet};
  }

  __device__ int few_of(int) const { return 0; }

  __device__ int place_of(int, int) const { return 0; }

  __device__ int row_at(int octet, int place) const { return 8 * octet + place < count ? 8 * octet + place : -1; }
};

template <class H>
__global__ void __launch_bounds__(H::THREADS, 1)
    partial_sums_kernel(H head, const __grid_constant__ typename H::Maps maps, StridedRows<typename H::T> rows, float* sums,
                        int ring_bytes) {
  unsigned char* const shared = shared_memory();
  const Ring ring{reinterpret_cast<float*>(shared), shared + GROUP_SUM_BYTES, ring_bytes};
  prepare(head, ring);
  __syncthreads();
  partial_sums(head, maps, rows, rows.count, sums, ring);
}

// out[row] = the row's logit or log-score; one warp a row.
template <class H, bool LOG_SCORE>
__global__ void __launch_bounds__(FINISH_THREADS) finish_kernel(H head, const float* sums, int count, float* out) {
  const int row = blockIdx.x * (FINISH_THREADS / WARP) + threadIdx.x / WARP;
  const float logit = row_logits<1, 2>(head, bias_of(head), sums, row, 0, count);
  if (threadIdx.x % WARP == 0 && row < count) out[row] = LOG_SCORE ? device_log_score(logit) : logit;
}

template <bool LOG_SCORE>
void run(const Head& head, const Rows& rows, float* sums, float* out, cudaStream_t stream) {
  if (rows.count == 0) return;
  const Device on = device();
  with_head(head, on, [&](auto typed) {
    using H = decltype(typed);
    using T = typename H::T;
    const int count = static_cast<int>(rows.count);
    const int ring_bytes = on.shared_bytes - GROUP_SUM_BYTES;
    const int64_t items = int64_t{typed.tiles} * ((count + 7) / 8);  // or fewer, of more rows
    launch_on<partial_sums_kernel<H>, H::CLUSTER>(on, blocks_for<H>(on, items), H::THREADS, on.shared_bytes, stream, typed,
                                                  maps_of(typed, {rows.data, 1, rows.count, rows.stride}, {}),
                                                  StridedRows<T>{static_cast<const T*>(rows.data), rows.stride, count},
                                                  sums, ring_bytes);
    constexpr int ROWS = FINISH_THREADS / WARP;
    launch(finish_kernel<H, LOG_SCORE>, dim3((count + ROWS - 1) / ROWS), FINISH_THREADS, 0, stream, typed, sums, count,
           out);
  });
}

}  // namespace

int64_t row_sums_size(const Head& head, int64_t count) {
  return count * tiling(head.units, device().multiprocessors).line();
}

void score_rows(const Head& head, const Rows& rows, float* sums, float* out, cudaStream_t stream) {
  run<true>(head, rows, sums, out, stream);
}

void logit_rows(const Head& head, const Rows& rows, float* sums, float* out, cudaStream_t stream) {
  run<false>(head, rows, sums, out, stream);
}

}  // namespace reflective::gpu
