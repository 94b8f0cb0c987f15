// The SPRM head in 16 bits on Hopper: what head.cuh does, with the copy engine (TMA) and warpgroup products (wgmma).
//
// A block owns a tile of up to 5 groups of 16 units. Two warps produce: boxes of 64 columns, of the tile's weights and of
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

#include "gpu_sm90.cuh"
#include "head.cuh"

#if defined(__CUDACC__) && defined(REFLECTIVE_SM90A)

namespace reflective {

template <class T_>
struct Sm90Head : Tiling {
  using W = T_;
  using T = T_;
  using Bias = T_;
  static constexpr int CONSUMERS = 2 * 4 * WARP;
  static constexpr int THREADS = CONSUMERS + 2 * WARP;
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
    CUtensorMap single;     // one of the others
  };

  const T *w1, *b1, *w2, *b2;
  int units, width;
};

namespace sm90 {

constexpr int MAX_STAGES = 24;
constexpr int CLUSTER_WARPGROUPS = 2;  // that consume where blocks share their rows
constexpr int BARRIER_BYTES = 3 * MAX_STAGES * sizeof(uint64_t);

// A stage's barriers, at the beginning of the ring: `full` when its bytes are there; `empty` when all that read it have, of
// which there are more in a cluster than in a block alone.
struct Barriers {
  uint64_t *full, *empty_alone, *empty_in_cluster;  // [MAX_STAGES]

  __device__ explicit Barriers(const Ring& ring)
      : full(reinterpret_cast<uint64_t*>(ring.stages)),
        empty_alone(full + MAX_STAGES),
        empty_in_cluster(empty_alone + MAX_STAGES) {}
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

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
    const Barriers barriers(ring);
    full = barriers.full;
    empty = in_cluster() ? barriers.empty_in_cluster : barriers.empty_alone;
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

    __device__ __forceinline__ void advance(int depth, int stages) {
      parity ^= (stage + stages) / depth & 1;
      stage = (stage + stages) % depth;
    }
  };

  // The box of rows that a lane of the producing warp brings into every stage; none if it has no map. The places of the
  // stage are at most 32 octets, so there is a lane for each.
  struct Share {
    typename H::Maps::Octet from;
    int offset, bytes;  // in the stage's features
  };

  __device__ __forceinline__ Share share(int first, int n) const {
    const int lane = threadIdx.x % WARP;
    const int large = max(0, min(first + n, rows.octets_in_order()) - first) / 8;  // boxes of 8 octets
    if (in_cluster() || large > 0) {
      const int box = rank + sharers * lane, octet = 8 * large + box - large;
      if (box < large) return {{&maps.eights, 0, 8 * (first + 8 * box)}, 8 * box * ATOM_BYTES, 8 * ATOM_BYTES};
      if (octet < n) return {rows.octet(maps, first + octet), octet * ATOM_BYTES, ATOM_BYTES};
      return {{nullptr, 0, 0}, 0, 0};
    }
    // No more than 8 octets. Of one with one or two rows these alone, by two lanes: all blocks read them from the same lines
    // of the second-level cache.
    const int octet = lane / 2, which = lane % 2;
    if (octet >= n) return {{nullptr, 0, 0}, 0, 0};
    typename H::Maps::Octet from = rows.octet(maps, first + octet);
    const int few = from.map == &maps.scattered ? rows.few_of(first + octet) : 0;
    if (few == 0) return {{which == 0 ? from.map : nullptr, from.plane, from.row}, octet * ATOM_BYTES, which == 0 ? ATOM_BYTES : 0};
    if (which >= few) return {{nullptr, 0, 0}, 0, 0};
    const int place = rows.place_of(first + octet, which);
    return {{&maps.single, from.plane, from.row + place}, octet * ATOM_BYTES + place * ROW_BYTES, ROW_BYTES};
  }

  __device__ __forceinline__ static Share of_lane(const Share& mine, int lane) {
    const auto map = __shfl_sync(~0u, reinterpret_cast<unsigned long long>(mine.from.map), lane);
    return {{reinterpret_cast<const CUtensorMap*>(map), __shfl_sync(~0u, mine.from.plane, lane),
             __shfl_sync(~0u, mine.from.row, lane)},
            __shfl_sync(~0u, mine.offset, lane),
            __shfl_sync(~0u, mine.bytes, lane)};
  }

  // Two warps produce, one the weights and one the rows, and both find beforehand what is the same in every stage: to ask
  // for a stage is what bounds narrow tiles. Measured on an H200: 390 ns a stage by one warp that looked for its boxes in every
  // stage, 246 by one that did not, where the bytes of 32 units take 94.
  __device__ __forceinline__ void produce_weights() const {
    Turn turn;
    each_item([&](int unit_tile, int first, int n) __attribute__((always_inline)) {
      const int bytes = WEIGHT_BYTES + (in_cluster() ? n * ATOM_BYTES : static_cast<int>(__reduce_add_sync(~0u, share(first, n).bytes)));
      if (elected()) {
        Turn at = turn;
        for (int column = 0; column < head.width; column += COLUMNS, at.advance(depth)) {
          wait_for(empty + at.stage, at.parity ^ 1);
          expect_bytes(full + at.stage, bytes);
          copy_box(stages + at.stage * stage_bytes, &maps.w1, column, unit_tile * N, full + at.stage);
        }
      }
      __syncwarp();
      turn.advance(depth, (head.width + COLUMNS - 1) / COLUMNS);
    });
  }

  __device__ __forceinline__ void produce_rows() const {
    Turn turn;
    each_item([&](int unit_tile, int first, int n) __attribute__((always_inline)) {
      Share mine = share(first, n);
      const unsigned have = __ballot_sync(~0u, mine.from.map != nullptr);
      if (!in_cluster() && __popc(have) == 1) {  // as a rule
        mine = of_lane(mine, __ffs(have) - 1);
        if (elected()) {
          Turn at = turn;
          for (int column = 0; column < head.width; column += COLUMNS, at.advance(depth)) {
            wait_for(empty + at.stage, at.parity ^ 1);
            copy_rows(stages + at.stage * stage_bytes + WEIGHT_BYTES + mine.offset, mine.from.map, column, mine.from.plane,
                      mine.from.row, full + at.stage);
          }
        }
        __syncwarp();
        turn.advance(depth, (head.width + COLUMNS - 1) / COLUMNS);
        return;
      }
      for (int column = 0; column < head.width; column += COLUMNS, turn.advance(depth)) {
        wait_for(empty + turn.stage, turn.parity ^ 1);
        if (mine.from.map != nullptr) {
          unsigned char* const to = stages + turn.stage * stage_bytes + WEIGHT_BYTES + mine.offset;
          if (in_cluster()) {
            copy_rows_to((1 << sharers) - 1, to, mine.from.map, column, mine.from.plane, mine.from.row, full + turn.stage);
          } else {
            copy_rows(to, mine.from.map, column, mine.from.plane, mine.from.row, full + turn.stage);
          }
        }
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
      if (in_cluster()) {
        if (lane < sharers) arrive_at(empty + stage, lane);
      } else if (lane == 0) {
        arrive_here(empty + stage);
      }
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
          const int row = octet < n ? rows.row_at(first + octet, lane / 4) : -1;
          if (quad == 0 && row >= 0) sums[static_cast<int64_t>(row) * head.line() + unit_tile] = sum;
        }
      }
    });
  }

  __device__ __forceinline__ void run() const {
    if (in_cluster()) meet_cluster_first();
    const int warpgroup = threadIdx.x / (4 * WARP);
    if (threadIdx.x >= H::CONSUMERS + WARP) {
      produce_rows();
    } else if (threadIdx.x >= H::CONSUMERS) {
      produce_weights();
    } else if (warpgroup < warpgroups) {
      consume(warpgroup);
    }
    __syncthreads();
    if (in_cluster()) meet_cluster();  // no block leaves while another may still arrive at its `empty` barriers
  }
};

#endif

}  // namespace sm90

// Makes the ring's barriers; a barrier of the block must lie between this and partial_sums. By one thread of each producing
// warp, which does nothing else meanwhile; one lane after the other of a warp, each behind a fence of its own, took 1.4 us.
template <class T>
__device__ __forceinline__ void prepare(const Sm90Head<T>&, const Ring& ring) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using H = Sm90Head<T>;
  const sm90::Barriers barriers(ring);
  if (threadIdx.x == H::CONSUMERS) {
    for (int stage = 0; stage < sm90::MAX_STAGES; ++stage) {
      sm90::barrier_init(barriers.full + stage, 1);
      sm90::barrier_init(barriers.empty_alone + stage, 4);
    }
    sm90::barriers_made();
  } else if (threadIdx.x == H::CONSUMERS + WARP) {
    for (int stage = 0; stage < sm90::MAX_STAGES; ++stage) {
      sm90::barrier_init(barriers.empty_in_cluster + stage, 4 * sm90::CLUSTER_WARPGROUPS * H::CLUSTER);
    }
    sm90::barriers_made();
  }
#endif
}

// As the general one. Rows have places: `rows.octets()` times 8, of which the first `rows.octets_in_order()` octets are
// those of maps.eight from its beginning; rows.octet(maps, o) is where octet o is, rows.row_at(o, i) which row its place i
// has, or -1, asked by a warp of one octet with i = lane / 4. Of the octets that are scattered, rows.few_of(o) is how many
// rows one has, if they are one or two, else 0; rows.place_of(o, i) where the i-th of them is.
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
    if (octets <= 16) return run(One{}, sm90::CLUSTER_WARPGROUPS, Sm90Head<T>::CLUSTER);
    run(Two{}, sm90::CLUSTER_WARPGROUPS, Sm90Head<T>::CLUSTER);
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
