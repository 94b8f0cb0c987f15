// What the kernels ask of Hopper alone, each primitive once: barriers in shared memory, the copy engine (TMA), warpgroup
// products (wgmma).
#pragma once

#include "gpu.cuh"

#if defined(__CUDACC__) && defined(REFLECTIVE_SM90A)

#include <cuda.h>

namespace reflective::sm90 {

constexpr int COLUMNS = 64;  // of a stage: 128 bytes, as far as a swizzle reaches
constexpr int ROW_BYTES = 2 * COLUMNS;
constexpr int ATOM_BYTES = 8 * ROW_BYTES;  // 8 rows, after which the swizzle's pattern repeats

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// True in one thread of the warp, and known to the compiler to be: what it does then needs no vote.
__device__ __forceinline__ bool elected() {
  uint32_t is;
  asm volatile(
      "{\n"
      ".reg .pred one;\n"
      "elect.sync _|one, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, one;\n"
      "}"
      : "=r"(is));
  return is != 0;
}

// -- barriers --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Barriers that were just made are there for the copy engine and for the cluster.
__device__ __forceinline__ void barriers_made() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Arrives, and `bytes` more must come before the phase ends.
__device__ __forceinline__ void expect_bytes(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void arrive_here(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives at the same barrier of the cluster's block `rank`.
__device__ __forceinline__ void arrive_at(uint64_t* barrier, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

__device__ __forceinline__ void wait_for(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred there;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 there, [%0], %1;\n"
      "@there bra done;\n"
      "bra again;\n"
      "done:\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// All threads of the cluster's blocks, who have no more to show each other than barriers that were made.
__device__ __forceinline__ void meet_cluster_first() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// All threads of the cluster's blocks.
__device__ __forceinline__ void meet_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// -- copies ----------------------------------------------------------------------------------------------------------

// A box of which `column` and `row` are the first, to `shared`; its bytes count at `barrier`.
__device__ __forceinline__ void copy_box(void* shared, const CUtensorMap* map, int column, int row, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          shared_address(shared)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

// The same of rows in a plane.
__device__ __forceinline__ void copy_rows(void* shared, const CUtensorMap* map, int column, int plane, int row,
                                          uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(
          shared_address(shared)),
      "l"(map), "r"(column), "r"(plane), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

// To the same place, and at the same barrier, of each block in `blocks`, a bit a rank.
__device__ __forceinline__ void copy_rows_to(int blocks, void* shared, const CUtensorMap* map, int column, int plane,
                                             int row, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, "
      "%3, %4}], [%5], %6;" ::"r"(shared_address(shared)),
      "l"(map), "r"(column), "r"(plane), "r"(row), "r"(shared_address(barrier)), "h"(static_cast<uint16_t>(blocks))
      : "memory");
}

// -- products --------------------------------------------------------------------------------------------------------

// wgmma's name for rows of 128 bytes, swizzled, the first of them at a multiple of ATOM_BYTES.
__device__ __forceinline__ uint64_t matrix_at(const unsigned char* rows) {
  constexpr uint64_t SWIZZLED_128 = uint64_t{1} << 62, ATOM_TO_ATOM = uint64_t{ATOM_BYTES >> 4} << 32;
  return SWIZZLED_128 | ATOM_TO_ATOM | uint64_t{1} << 16 | (shared_address(rows) & 0x3FFFF) >> 4;
}

constexpr uint64_t SIXTEEN_COLUMNS = 32 >> 4;  // from one product to the next, in a matrix's name

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Returns once all but the newest N groups of products are done.
template <int N>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// d += rows units^T, [64, 16] by [16, N].
template <class T, int N>
__device__ __forceinline__ void product(float (&d)[N / 2], uint64_t rows, uint64_t units);

#define REFLECTIVE_8(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define REFLECTIVE_WGMMA(T, type, N, names, rows_name, units_name, one_name, ...)                                      \
  template <>                                                                                                          \
  __device__ __forceinline__ void product<T, N>(float (&d)[N / 2], uint64_t rows, uint64_t units) {                    \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " one_name ", 0;\n"                                             \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type " {" names "}, " rows_name            \
                 ", " units_name ", add, 1, 1, 0, 0;\n}"                                                               \
                 : __VA_ARGS__                                                                                         \
                 : "l"(rows), "l"(units), "r"(1));                                                                     \
  }
#define REFLECTIVE_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define REFLECTIVE_NAMES_32 REFLECTIVE_NAMES_16 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define REFLECTIVE_NAMES_48 REFLECTIVE_NAMES_32 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define REFLECTIVE_NAMES_64 REFLECTIVE_NAMES_48 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define REFLECTIVE_NAMES_80 REFLECTIVE_NAMES_64 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define REFLECTIVE_PRODUCTS(T, type)                                                                                   \
  REFLECTIVE_WGMMA(T, type, 16, REFLECTIVE_NAMES_16, "%8", "%9", "%10", REFLECTIVE_8(0))                               \
  REFLECTIVE_WGMMA(T, type, 32, REFLECTIVE_NAMES_32, "%16", "%17", "%18", REFLECTIVE_8(0), REFLECTIVE_8(8))            \
  REFLECTIVE_WGMMA(T, type, 48, REFLECTIVE_NAMES_48, "%24", "%25", "%26", REFLECTIVE_8(0), REFLECTIVE_8(8),            \
                   REFLECTIVE_8(16))                                                                                   \
  REFLECTIVE_WGMMA(T, type, 64, REFLECTIVE_NAMES_64, "%32", "%33", "%34", REFLECTIVE_8(0), REFLECTIVE_8(8),            \
                   REFLECTIVE_8(16), REFLECTIVE_8(24))                                                                 \
  REFLECTIVE_WGMMA(T, type, 80, REFLECTIVE_NAMES_80, "%40", "%41", "%42", REFLECTIVE_8(0), REFLECTIVE_8(8),            \
                   REFLECTIVE_8(16), REFLECTIVE_8(24), REFLECTIVE_8(32))
REFLECTIVE_PRODUCTS(Bfloat16, "bf16")
REFLECTIVE_PRODUCTS(Float16, "f16")
#undef REFLECTIVE_PRODUCTS
#undef REFLECTIVE_WGMMA
#undef REFLECTIVE_8

#endif

}  // namespace reflective::sm90

#endif
