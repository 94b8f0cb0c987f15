// The ring of stages in shared memory through which W1 and the features stream, and the four warps that fill it.
//
// A stage holds SLICES slices of 32 columns: of the tile's units first, then of the tile's rows of features. Producer and
// consumer walk the same stages in the same order and meet once a stage.
#pragma once

#include "head_tile.cuh"

namespace reflective {

// Shared memory that partial_sums needs beside the ring.
constexpr int MAX_SPLIT_ROWS = 64;
constexpr int GROUP_SUM_BYTES = 2 * MAX_GROUPS * MAX_SPLIT_ROWS * sizeof(float);

struct Ring {
  float* group_sums;  // [2, MAX_GROUPS, MAX_SPLIT_ROWS]
  unsigned char* stages;
  int bytes;
};

template <class T>
struct Products;  // see head_products.cuh

template <class H, class S>
struct Walk;

// A pass over this block's items, a tile of units and a tile of rows each, stage by stage through the ring.
template <class H, class S>
struct TilePass {
  using W = typename H::W;
  using T = typename H::T;
  static constexpr int COLUMNS = S::SLICES * QUAD_COLUMNS;
  static constexpr int FEATURE_SLICE = S::ROWS * QUAD_COLUMNS * static_cast<int>(sizeof(T));

  const H& head;
  const int count;  // rows
  float* const sums;
  const Ring& ring;
  int weight_slice, stage_bytes, depth, row_tiles;

  __device__ TilePass(const H& head, int count, float* sums, const Ring& ring)
      : head(head), count(count), sums(sums), ring(ring) {
    weight_slice = head.groups * GROUP * QUAD_COLUMNS * static_cast<int>(sizeof(W));
    stage_bytes = S::SLICES * (weight_slice + FEATURE_SLICE);
    // Known only at the launch: a tile's groups follow from the number of multiprocessors, and a block has 99 KB of
    // shared memory on an 8.6, 227 on a 9.0.
    depth = min(MAX_STAGES, ring.bytes / stage_bytes);
    row_tiles = (count + S::ROWS - 1) / S::ROWS;
  }

  // Of the tile's groups of units, this warp's i-th.
  __device__ __forceinline__ int group_of(int i) const {
    return S::SPLIT_UNITS ? static_cast<int>(threadIdx.x) / WARP + 4 * i : i;
  }

  // Of the tile's rows, the first in this warp's `tile`.
  __device__ __forceinline__ int row_of(int tile) const {
    return 8 * (S::SPLIT_UNITS ? tile : static_cast<int>(threadIdx.x) / WARP * S::TILES + tile);
  }

  // Of b1 or w2; 0 behind the last unit.
  __device__ __forceinline__ float bias_at(const typename H::Bias* values, int unit) const {
    return unit < head.units ? to_float(values[unit]) : 0;
  }

  // The producer: fills the ring, by the four warps behind the consumer's; below.
  template <class FeatureRow>
  __device__ __forceinline__ void produce(const FeatureRow& feature_row) const;

  // The consumer: empties the ring, by the first four warps; in head.cuh. What it does with a stage is in
  // head_products.cuh, with an item's products in head_sums.cuh.
  __device__ __forceinline__ void consume() const;
  __device__ __forceinline__ void multiply_stage(unsigned char* stage,
                                                 Products<T> (&products)[S::WARP_GROUPS][S::TILES]) const;
  __device__ __forceinline__ void reduce(const Walk<H, S>& at,
                                         const Products<T> (&products)[S::WARP_GROUPS][S::TILES],
                                         float* group_sums) const;
  __device__ __forceinline__ void gather(int unit_tile, int row0, const float* group_sums) const;
};

// A walk over this block's items, column by column and stage by stage.
template <class H, class S>
struct Walk {
  using Pass = TilePass<H, S>;

  const Pass& pass;
  int item, unit_tile, row0, column = 0;
  unsigned char* stage;

  __device__ explicit Walk(const Pass& pass) : pass(pass), stage(pass.ring.stages) { enter(blockIdx.x); }

  __device__ __forceinline__ void enter(int next) {
    item = next, unit_tile = item / pass.row_tiles, row0 = item % pass.row_tiles * S::ROWS;
  }

  __device__ __forceinline__ bool done() const { return unit_tile >= pass.head.tiles; }

  __device__ __forceinline__ bool last_column() const { return column + Pass::COLUMNS >= pass.head.width; }

  __device__ __forceinline__ void advance() {
    stage += pass.stage_bytes;
    if (stage == pass.ring.stages + pass.depth * pass.stage_bytes) stage = pass.ring.stages;
    if (last_column()) {
      column = 0;
      enter(item + gridDim.x);
    } else {
      column += Pass::COLUMNS;
    }
  }
};

// What a producing thread brings of `MAX_ROWS` rows of E: the same 16-byte piece of some of them. Their addresses are
// found once an item, so that a copy costs an addition.
template <class S, class E, int MAX_ROWS>
struct Source {
  static constexpr int PIECES = QUAD_COLUMNS * static_cast<int>(sizeof(E)) / 16;  // of a row of a slice
  static constexpr int STRIDE = COMPUTE_THREADS / (S::SLICES * PIECES);           // from row to row
  static constexpr int COPIES = (MAX_ROWS + STRIDE - 1) / STRIDE;

  const E* rows[COPIES];  // null: zeros instead
  int count;              // rows in all

  __device__ __forceinline__ static int piece() { return (threadIdx.x - COMPUTE_THREADS) % (S::SLICES * PIECES); }

  __device__ __forceinline__ static int row(int copy) {
    return (threadIdx.x - COMPUTE_THREADS) / (S::SLICES * PIECES) + copy * STRIDE;
  }

  template <class RowAt>
  __device__ __forceinline__ void enter(int rows_in_all, const RowAt& row_at) {
    count = rows_in_all;
#pragma unroll
    for (int copy = 0; copy < COPIES; ++copy) {
      if (row(copy) < count) {
        const E* const source = row_at(row(copy));
        rows[copy] = source ? source + piece() * (16 / static_cast<int>(sizeof(E))) : nullptr;
      }
    }
  }

  __device__ __forceinline__ void load(unsigned char* slices, int slice_bytes, int column, int width,
                                       const void* anywhere) const {
    unsigned char* const slice = slices + piece() / PIECES * slice_bytes;
    const bool inside = column + piece() * (16 / static_cast<int>(sizeof(E))) < width;
#pragma unroll
    for (int copy = 0; copy < COPIES; ++copy) {
      if (row(copy) < count) {
        const bool valid = inside && rows[copy];
        copy_async_16(piece_at<E>(slice, row(copy), piece() % PIECES), valid ? rows[copy] + column : anywhere, valid);
      }
    }
  }
};

// wait_group takes its number from the instruction.
template <int N = MAX_STAGES - 2>
__device__ __forceinline__ void wait_for_all_but(int groups) {
  if constexpr (N == 0) {
    copy_async_wait<0>();
  } else if (groups >= N) {
    copy_async_wait<N>();
  } else {
    wait_for_all_but<N - 1>(groups);
  }
}

// The producer, four warps behind the consumer's: copies each stage's slices of W1 and of the features, up to depth - 1
// stages ahead of the one that is being multiplied.
template <class H, class S>
template <class FeatureRow>
__device__ __forceinline__ void TilePass<H, S>::produce(const FeatureRow& feature_row) const {
  Source<S, W, MAX_GROUPS * GROUP> weights;
  Source<S, T, S::ROWS> features;
  Walk<H, S> ahead(*this);
  const auto load_next = [&] {
    if (!ahead.done()) {
      if (ahead.column == 0) {
        const int unit0 = ahead.unit_tile * head.groups * GROUP;
        weights.enter(head.groups * GROUP, [&](int row) -> const W* {
          return unit0 + row < head.units ? head.w1 + static_cast<int64_t>(unit0 + row) * head.width : nullptr;
        });
        // Rows that do not exist are not read: what lies in their places reaches no other row.
        features.enter(min(S::ROWS, count - ahead.row0), [&](int row) { return feature_row(ahead.row0 + row); });
      }
      weights.load(ahead.stage, weight_slice, ahead.column, head.width, head.w1);
      features.load(ahead.stage + S::SLICES * weight_slice, FEATURE_SLICE, ahead.column, head.width, head.w1);
      ahead.advance();
    }
    copy_async_commit();  // a group, empty where no stage is left: wait_for_all_but counts groups
  };
  for (int stage = 0; stage < depth - 1; ++stage) load_next();
  for (Walk<H, S> at(*this); !at.done(); at.advance()) {
    wait_for_all_but(depth - 2);
    meet<H::THREADS>();  // the copies into this stage have landed, and the consumer is through with the one before it
    load_next();
  }
  meet<H::THREADS>();
}

}  // namespace reflective
