// The SPRM head in 16 bits on Hopper: what head.cuh does, with the copy engine (TMA) and warpgroup products (wgmma).
//
// A block owns a tile of up to 5 groups of 16 units. One warp produces: boxes of 64 columns, of the tile's weights and of
// the rows, into a ring of stages in shared memory. A box costs the copy engine some 40 to 90 cycles, however small it is
// (measured on an H200: 16 boxes of one row a stage, 70 us at H = 5120 where two boxes of 8 took 33; 16 rows copied with
// cp.async by the warp, 60 us). So rows come by octets of neighbours in memory, of which some may be nobody's, and 64 at a
// time where all lie one after the other. Two warpgroups consume: wgmma m64nNk16 with 64 rows by the tile's N
// units. Up to 64 rows one warpgroup suffices; above, the blocks of a cluster, which hold other units of the same rows,
// bring each other a share of the rows, so that these leave the second-level cache once a cluster: at H = 5120 that is 273
// MB for 256 rows in clusters of 2 where blocks alone would read 440.
//
// The order of every sum is fixed by the head and the number of multiprocessors: N is the tile's for any number of rows, a
// (unit, row) product walks the width in one chain, and a tile's units are added in one order.
#pragma once

#include "head.cuh"

#if defined(__CUDACC__) && defined(REFLECTIVE_SM90A)

#include <cuda.h>

namespace reflective {

template <class T_>
struct Sm90Head : Tiling {
  using W = T_;
  using T = T_;
  using Bias = T_;
  static constexpr int CONSUMERS = 2 * 4 * WARP;
  static constexpr int THREADS = CONSUMERS + WARP;
  static constexpr int COPIERS = CONSUMERS;
  static constexpr int CLUSTER = 2;

  // As the copy engine sees them: boxes of 64 columns. Rows are [any, planes, width].
  struct Maps {
    // Where 8 rows are.
    struct Octet {
      const CUtensorMap* map;
      int plane, row;
    };

    CUtensorMap w1;         // a tile's units
    CUtensorMap eight;      // 8 of the rows that lie one after the other
    CUtensorMap eights;     // 64 of them
    CUtensorMap scattered;  // 8 neighbours in one plane, of the others
  };

  const T *w1, *b1, *w2, *b2;
  int units, width;
};

namespace sm90 {

constexpr int COLUMNS = 64;  // of a stage: 128 bytes, as far as a swizzle reaches
constexpr int ROW_BYTES = 2 * COLUMNS;
constexpr int MAX_STAGES = 24;
constexpr int BARRIER_BYTES = 2 * MAX_STAGES * sizeof(uint64_t);
constexpr int ATOM_BYTES = 8 * ROW_BYTES;  // 8 rows, after which the swizzle's pattern repeats

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
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

// -- the tile --------------------------------------------------------------------------------------------------------

// Tiles of GROUPS groups of units by `TILES` times 64 places of rows a warpgroup. Items, a tile of units and a tile of
// places each, are shared out among the blocks, or, where `sharers` blocks of a cluster share their rows, among the
// clusters.
template <class H, class Rows, int GROUPS, int TILES>
struct Pass {
  using T = typename H::T;
  static constexpr int N = GROUPS * GROUP;
  static constexpr int WEIGHT_BYTES = N * ROW_BYTES;

  const H& head;
  const typename H::Maps& maps;
  const Rows& rows;
  const int octets;  // places for rows, by eights
  float* const sums;
  const int warpgroups, sharers;
  int rank, tile_octets, row_tiles, depth, stage_bytes;
  uint64_t *full, *empty;  // [depth]
  unsigned char* stages;

  __device__ Pass(const H& head, const typename H::Maps& maps, const Rows& rows, int octets, float* sums, const Ring& ring,
                  int warpgroups, int sharers)
      : head(head),
        maps(maps),
        rows(rows),
        octets(octets),
        sums(sums),
        warpgroups(warpgroups),
        sharers(sharers) {
    rank = static_cast<int>(blockIdx.x) % sharers;
    tile_octets = warpgroups * TILES * 8;
    row_tiles = (octets + tile_octets - 1) / tile_octets;
    full = reinterpret_cast<uint64_t*>(ring.stages);
    empty = full + MAX_STAGES;
    const uint32_t begin = shared_address(ring.stages) + BARRIER_BYTES;
    const uint32_t aligned = (begin + ATOM_BYTES - 1) / ATOM_BYTES * ATOM_BYTES;
    stages = ring.stages + BARRIER_BYTES + (aligned - begin);
    stage_bytes = WEIGHT_BYTES + tile_octets * ATOM_BYTES;
    depth = min(MAX_STAGES, (ring.bytes - BARRIER_BYTES - static_cast<int>(aligned - begin)) / stage_bytes);
  }

  __device__ __forceinline__ bool in_cluster() const { return sharers > 1; }

  // visit(unit_tile, first octet, octets of the item).
  template <class Visit>
  __device__ __forceinline__ void each_item(const Visit& visit) const {
    const int tiles = (head.tiles + sharers - 1) / sharers;
    for (int item = blockIdx.x / sharers; item < tiles * row_tiles; item += gridDim.x / sharers) {
      const int first = item % row_tiles * tile_octets;
      visit(item / row_tiles * sharers + rank, first, min(tile_octets, octets - first));
    }
  }

  // The stage in turn, and the parity of its phase.
  struct Turn {
    int stage = 0, parity = 0;

    __device__ __forceinline__ void advance(int depth) {
      if (++stage == depth) stage = 0, parity ^= 1;
    }
  };

  // One warp.
  __device__ __forceinline__ void produce() const {
    const int lane = threadIdx.x % WARP;
    Turn turn;
    each_item([&](int unit_tile, int first, int n) __attribute__((always_inline)) {
      const int large = max(0, min(first + n, rows.octets_in_order()) - first) / 8;  // boxes of 8 octets
      for (int column = 0; column < head.width; column += COLUMNS, turn.advance(depth)) {
        uint64_t* const there = full + turn.stage;
        unsigned char* const weights = stages + turn.stage * stage_bytes;
        unsigned char* const features = weights + WEIGHT_BYTES;
        wait_for(empty + turn.stage, turn.parity ^ 1);
        if (lane == 0) {
          expect_bytes(there, WEIGHT_BYTES + n * ATOM_BYTES);
          copy_box(weights, &maps.w1, column, unit_tile * N, there);
        }
        __syncwarp();
        const auto bring = [&](int octet, typename H::Maps::Octet from) {
          unsigned char* const to = features + octet * ATOM_BYTES;
          if (in_cluster()) {
            copy_rows_to((1 << sharers) - 1, to, from.map, column, from.plane, from.row, there);
          } else {
            copy_rows(to, from.map, column, from.plane, from.row, there);
          }
        };
        for (int i = rank + sharers * lane; i < large; i += sharers * WARP) bring(8 * i, {&maps.eights, 0, 8 * (first + 8 * i)});
        for (int i = 8 * large + rank + sharers * lane; i < n; i += sharers * WARP) bring(i, rows.octet(maps, first + i));
      }
    });
  }

  // The bias and the second layer's weight of this thread's units, two of every 8, as they are stored.
  struct Units {
    T b1[N / 4], w2[N / 4];
  };

  // Of two rows of each of this warpgroup's tiles a thread has the products with its units.
  __device__ __forceinline__ void consume(int warpgroup) const {
    const int lane = threadIdx.x % WARP, quad = lane % 4, warp = threadIdx.x / WARP % 4;
    float products[TILES][N / 2];
    Turn turn;
    const auto release = [&](int stage) {  // by each warp, to every block that fills it
      if (lane < sharers) arrive_at(empty + stage, in_cluster() ? lane : own_rank());
    };
    each_item([&](int unit_tile, int first, int n) __attribute__((always_inline)) {
      Units mine;
#pragma unroll
      for (int i = 0; i < N / 4; ++i) {
        const int unit = unit_tile * N + i / 2 * 8 + 2 * quad + i % 2;
        mine.b1[i] = unit < head.units ? head.b1[unit] : T{0};
        mine.w2[i] = unit < head.units ? head.w2[unit] : T{0};
      }
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
        for (int i = 0; i < N / 2; ++i) products[tile][i] = 0;
      }
      int before = -1;  // the stage whose products may still be running
      for (int column = 0; column < head.width; column += COLUMNS, turn.advance(depth)) {
        wait_for(full + turn.stage, turn.parity);
        const unsigned char* const weights = stages + turn.stage * stage_bytes;
        const uint64_t units = matrix_at(weights);
        products_begin();
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
          const uint64_t some = matrix_at(weights + WEIGHT_BYTES + (tile * warpgroups + warpgroup) * 8 * ATOM_BYTES);
#pragma unroll
          for (int k = 0; k < COLUMNS / 16; ++k) {
            product<T, N>(products[tile], some + k * SIXTEEN_COLUMNS, units + k * SIXTEEN_COLUMNS);
          }
        }
        products_commit();
        products_wait<1>();
        if (before >= 0) release(before);
        before = turn.stage;
      }
      products_wait<0>();
      release(before);
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
        for (int i = 0; i < N / 2; ++i) asm volatile("" : "+f"(products[tile][i])::"memory");  // not read any earlier
      }
      if (unit_tile >= head.tiles) return;  // the cluster's last one may have none
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float sum = 0;
#pragma unroll
          for (int i = 0; i < N / 4; ++i) {
            const float z = products[tile][i / 2 * 4 + 2 * half + i % 2] + to_float(mine.b1[i]);
            sum = fmaf(to_float(mine.w2[i]), z < 0 ? 0 : z, sum);  // not fmaxf, which turns a NaN into 0
          }
          // A feature that is not finite makes every product so, also those that ReLU swallows.
          sum = fmaf(products[tile][2 * half], 0.0f, sum);
          sum += __shfl_xor_sync(~0u, sum, 1);
          sum += __shfl_xor_sync(~0u, sum, 2);
          const int octet = (tile * warpgroups + warpgroup) * 8 + warp * 2 + half;
          const int row = quad == 0 && octet < n ? rows.row_at(first + octet, lane / 4) : -1;
          if (row >= 0) sums[static_cast<int64_t>(row) * head.line() + unit_tile] = sum;
        }
      }
    });
  }

  __device__ __forceinline__ static int own_rank() {
    int rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
  }

  __device__ __forceinline__ void run() const {
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < depth; ++stage) {
        barrier_init(full + stage, 1);
        barrier_init(empty + stage, 4 * warpgroups * sharers);
      }
      barriers_made();
    }
    __syncthreads();
    if (in_cluster()) meet_cluster();
    const int warpgroup = threadIdx.x / (4 * WARP);
    if (threadIdx.x >= H::CONSUMERS) {
      produce();
    } else if (warpgroup < warpgroups) {
      consume(warpgroup);
    }
    __syncthreads();
    if (in_cluster()) meet_cluster();  // nobody leaves while others may still arrive at its barriers
  }
};

#endif

}  // namespace sm90

// As the general one. Rows have places: `rows.octets()` times 8, of which the first `rows.octets_in_order()` octets are
// those of maps.eight from its beginning; rows.octet(maps, o) is where octet o is, rows.row_at(o, i) which row its place i
// has, or -1.
template <class T, class Rows>
__device__ __forceinline__ void partial_sums(const Sm90Head<T>& head, const typename Sm90Head<T>::Maps& maps, const Rows& rows, int,
                             float* sums, const Ring& ring) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const int octets = rows.octets();
  // Inlined: a call would have the products wait for each other.
  const auto of_groups = [&](auto groups) __attribute__((always_inline)) {
    const auto run = [&](auto tiles, int warpgroups, int sharers) __attribute__((always_inline)) {
      sm90::Pass<Sm90Head<T>, Rows, decltype(groups)::value, decltype(tiles)::value>(head, maps, rows, octets, sums, ring,
                                                                                      warpgroups, sharers)
          .run();
    };
    using One = std::integral_constant<int, 1>;
    using Two = std::integral_constant<int, 2>;
    if (octets <= 8) return run(One{}, 1, 1);
    if (octets <= 16) return run(One{}, 2, Sm90Head<T>::CLUSTER);
    run(Two{}, 2, Sm90Head<T>::CLUSTER);
  };
  switch (head.groups) {
    case 1: return of_groups(std::integral_constant<int, 1>{});
    case 2: return of_groups(std::integral_constant<int, 2>{});
    case 3: return of_groups(std::integral_constant<int, 3>{});
    case 4: return of_groups(std::integral_constant<int, 4>{});
    default: return of_groups(std::integral_constant<int, 5>{});
  }
#else
  __trap();
#endif
}

}  // namespace reflective

#endif
