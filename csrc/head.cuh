// A head of one hidden layer on a GPU: W1 streamed once through shared memory, over tensor cores, into one partial sum a
// row and a tile of units. Shared by the kernels of score_rows, logit_rows, flush and decode_step.
//
// A block owns a tile of up to 5 groups of 16 units. Four of its warps load: a ring of stages of W1's rows and the
// features' columns, 16 bytes a copy, up to 15 stages ahead. Four multiply: mma.m16n8k16 with the units as its rows and
// the features as its columns, so that 8 features cost what 1 does. Nothing of [rows, units] leaves the registers.
//
// The order of every sum is fixed by the head and the device's number of multiprocessors: a (unit, row) product walks
// the width once, in one chain; 16 units are summed by a butterfly, groups and then tiles in order. The number of rows
// chooses who computes a product and how many are in flight, never their order, so a row has the same bits in any
// batch.
#pragma once

#include "head_products.cuh"
#include "head_ring.cuh"
#include "head_sums.cuh"
#include "head_tile.cuh"

namespace reflective {

// The consumer, the first four warps: multiplies each stage when it is there and adds up each item's products when it
// ends.
template <class H, class S>
__device__ __forceinline__ void TilePass<H, S>::consume() const {
  Products<T> products[S::WARP_GROUPS][S::TILES], folded[S::WARP_GROUPS][S::TILES];
  const auto each_sum = [](auto& some, auto& others, const auto& visit) {
#pragma unroll
    for (int i = 0; i < S::WARP_GROUPS; ++i) {
#pragma unroll
      for (int tile = 0; tile < S::TILES; ++tile) {
#pragma unroll
        for (int j = 0; j < 2 * Products<T>::ROWS; ++j) visit(some[i][tile].sums[j], others[i][tile].sums[j]);
      }
    }
  };
  const auto clear = [&] { each_sum(products, folded, [](float& sum, float& total) { sum = total = 0; }); };
  const auto fold = [&] { each_sum(products, folded, [](float& sum, float& total) { total += sum, sum = 0; }); };
  clear();
  // Two buffers of group_sums: an item may end while a slower warp still gathers the one before.
  int buffer = 0, waiting_tile = -1, waiting_row0 = 0;
  const auto group_sums = [&] { return ring.group_sums + buffer * MAX_GROUPS * MAX_SPLIT_ROWS; };
  const auto gather_waiting = [&] {
    if (S::SPLIT_UNITS && waiting_tile >= 0) {
      gather(waiting_tile, waiting_row0, group_sums());
      buffer ^= 1;
      waiting_tile = -1;
    }
  };
  for (Walk<H, S> at(*this); !at.done(); at.advance()) {
    meet<H::THREADS>();
    gather_waiting();
    multiply_stage(at.stage, products);
    if (!H::TENSOR_CORES && (at.last_column() || (at.column + COLUMNS) % FOLD_COLUMNS == 0)) fold();
    if (at.last_column()) {
      reduce(at, H::TENSOR_CORES ? products : folded, group_sums());
      waiting_tile = at.unit_tile, waiting_row0 = at.row0;
      clear();
    }
  }
  meet<H::THREADS>();
  gather_waiting();
}

// What head_sm90.cuh needs done early.
template <class W, class T>
__device__ __forceinline__ void prepare(const DeviceHead<W, T>&, const Ring&) {}

// sums[m, tile] = sum over the tile's units u of w2[u] act(W1[u] . f[m] + b1[u]) for every row m < count, f[m] =
// feature_row(m); NaN if f[m] is not finite. All threads of all blocks call it with the same arguments; sums [count,
// line] are complete when all blocks are through.
template <class H, class FeatureRow>
__device__ void partial_sums(const H& head, const typename H::Maps&, const FeatureRow& feature_row, int count, float* sums,
                             const Ring& ring) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if constexpr (H::TENSOR_CORES && std::is_same_v<typename H::W, typename H::T> && !H::CURVED) {
    __trap();  // head_sm90.cuh has these
    return;
  }
#endif
  const auto run = [&](auto shape) {
    using S = decltype(shape);
    const TilePass<H, S> pass(head, count, sums, ring);
    if (threadIdx.x < COMPUTE_THREADS) {
      pass.consume();
    } else {
      pass.produce(feature_row);
    }
  };
  if (count <= 8) return run(Shape<1, true, 2>{});
  if constexpr (!H::TENSOR_CORES) {
    run(Shape<2, true, 2>{});
  } else {
    if (count <= 16) return run(Shape<2, true, 2>{});
    if constexpr (H::CURVED) {  // no larger tiles: heads of other activations are small, and compiling them takes as long
      run(Shape<8, true, 2>{});
    } else {
      if (count <= 64) return run(Shape<8, true, 2>{});
      if (count <= 128) return run(Shape<4, false, 2>{});
      run(Shape<8, false, 1>{});
    }
  }
}

}  // namespace reflective
