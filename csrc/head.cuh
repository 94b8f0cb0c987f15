// The SPRM head on a GPU: W1 streamed once through shared memory, over tensor cores, into one partial sum a row and a
// tile of units. Shared by the kernels of score_rows, logit_rows, flush and decode_step.
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

#include <cmath>
#include <type_traits>

#include "gpu.cuh"
#include "head.h"
#include "layout.h"

namespace reflective {

struct E4m3 {
  uint8_t bits;
};

constexpr int WARP = 32;
constexpr int COMPUTE_THREADS = 4 * WARP;
constexpr int FINISH_THREADS = 8 * WARP;  // of blocks that stream nothing
constexpr int GROUP = UNIT_GROUP;
constexpr int MAX_GROUPS = 5;  // 80 units by 256 rows are 160 sums in each of 128 threads
constexpr int QUAD_COLUMNS = 32;
constexpr int MAX_STAGES = 16;
// Of float32: one chain over 16384 columns would gather 3 times the rounding of a BLAS.
constexpr int FOLD_COLUMNS = 512;

// How a head's units are shared out.
struct Tiling {
  int groups;  // of 16 units a tile
  int tiles;

  // Floats between the partial sums of one row and the next: a multiple of 16 bytes.
  __host__ __device__ int line() const { return (tiles + 3) / 4 * 4; }
};

// As the kernels take it: Head, typed, with its tiling. Bias is the type of b1, w2 and b2.
template <class W_, class T_>
struct DeviceHead : Tiling {
  using W = W_;  // of w1
  using T = T_;  // of the features
  static constexpr bool TENSOR_CORES = sizeof(T) == 2;
  static constexpr int THREADS = 2 * COMPUTE_THREADS;  // of a block: as many load
  static constexpr int COPIERS = COMPUTE_THREADS;      // of them, the first ones, that have time for something else
  static constexpr int CLUSTER = 1;
  struct Maps {};
  using Bias = std::conditional_t<sizeof(W) == 1, float, W>;

  const W* w1;  // [units, width]
  const Bias *b1, *w2, *b2;
  int units, width;
};

// -- shared memory ---------------------------------------------------------------------------------------------------

// Rows of 32 columns, 16-byte piece by piece, in an order in which reads meet no bank twice: of 16-bit rows 8 below
// each other, of float32 rows two.
template <class E>
__device__ __forceinline__ unsigned char* piece_at(unsigned char* rows, int row, int piece) {
  if constexpr (sizeof(E) == 2) piece ^= row / 2 % 4;
  if constexpr (sizeof(E) == 4) piece ^= row % 2;
  return rows + (row * QUAD_COLUMNS * static_cast<int>(sizeof(E)) + piece * 16);
}

// -- products --------------------------------------------------------------------------------------------------------

// 32 columns of 16 units, of 8 rows: two halves of 16 columns.
struct UnitFragment {
  uint32_t halves[2][4];
};

struct RowFragment {
  uint32_t halves[2][2];
};

// In float32 a thread has 8 columns of its own, of two units and of one row.
struct Wide {
  float values[8];
};

struct WideUnits {
  Wide low, high;
};

__device__ __forceinline__ Wide wide(unsigned char* rows, int row, int quad) {
  Wide wide;
  memcpy(wide.values, piece_at<float>(rows, row, 2 * quad), 16);
  memcpy(wide.values + 4, piece_at<float>(rows, row, 2 * quad + 1), 16);
  return wide;
}

// Where row `row` of a slice begins, for multiples of 8: the order of pieces repeats there.
template <class E>
__device__ __forceinline__ unsigned char* eighth_row(unsigned char* slice, int row) {
  return slice + row * QUAD_COLUMNS * static_cast<int>(sizeof(E));
}

// The 16 units at `weights`.
template <class W, class T>
__device__ __forceinline__ auto load_units(unsigned char* weights) {
  const int lane = threadIdx.x % WARP, quad = lane % 4;
  if constexpr (sizeof(W) == 4) {
    return WideUnits{wide(weights, lane / 4, quad), wide(weights, lane / 4 + 8, quad)};
  } else if constexpr (sizeof(W) == 2) {
    UnitFragment units;
    load_matrices(units.halves[0], piece_at<W>(weights, lane % 16, lane / 16));
    load_matrices(units.halves[1], piece_at<W>(weights, lane % 16, lane / 16 + 2));
    return units;
  } else {
    // Eight columns of two units: which of a product's 16 places a column takes is free, if the features agree.
    UnitFragment units;
#pragma unroll
    for (int unit = 0; unit < 2; ++unit) {
      const uint2 codes = *reinterpret_cast<const uint2*>(weights + (lane / 4 + 8 * unit) * QUAD_COLUMNS + quad * 8);
      uint32_t first[2], second[2];
      unpack_e4m3<T>(codes.x, first);
      unpack_e4m3<T>(codes.y, second);
      units.halves[0][unit] = first[0], units.halves[0][unit + 2] = first[1];
      units.halves[1][unit] = second[0], units.halves[1][unit + 2] = second[1];
    }
    return units;
  }
}

// The 8 rows at `features`, to go with units of W.
template <class W, class T>
__device__ __forceinline__ RowFragment load_features(unsigned char* features) {
  const int lane = threadIdx.x % WARP;
  if constexpr (sizeof(W) == 2) {
    uint32_t words[4];
    load_matrices(words, piece_at<T>(features, lane % 8, lane / 8));
    return {{{words[0], words[1]}, {words[2], words[3]}}};
  } else {
    const uint4 words = *reinterpret_cast<const uint4*>(piece_at<T>(features, lane / 4, lane % 4));
    return {{{words.x, words.y}, {words.z, words.w}}};
  }
}

// Sums of 16 units (this thread: unit lane / 4 and that + 8) with 8 rows. On tensor cores a thread has two of the rows,
// 2 quad and the next, [low, low, high, high]; else all 8, each over its own quarter of the columns, low ones first.
template <class T>
struct Products {
  static constexpr int ROWS = sizeof(T) == 2 ? 2 : 8;
  float sums[2 * ROWS];
};

// Eight columns by themselves, then to the sum.
__device__ __forceinline__ float dot(float sum, const Wide& a, const Wide& b) {
  float products = a.values[0] * b.values[0];
#pragma unroll
  for (int i = 1; i < 8; ++i) products = fmaf(a.values[i], b.values[i], products);
  return sum + products;
}

// -- the tile --------------------------------------------------------------------------------------------------------

// How the four multiplying warps share a tile: with few rows each takes some groups and every row, with many each takes
// all groups and some rows. TILES: tiles of 8 rows a warp. SLICES: of 32 columns a stage.
template <int TILES_, bool SPLIT_UNITS_, int SLICES_>
struct Shape {
  static constexpr int TILES = TILES_, SLICES = SLICES_;
  static constexpr bool SPLIT_UNITS = SPLIT_UNITS_;
  static constexpr int ROWS = 8 * TILES * (SPLIT_UNITS ? 1 : 4);
  static constexpr int WARP_GROUPS = SPLIT_UNITS ? 2 : MAX_GROUPS;
};

// Shared memory that partial_sums needs beside the ring.
constexpr int MAX_SPLIT_ROWS = 64;
constexpr int GROUP_SUM_BYTES = 2 * MAX_GROUPS * MAX_SPLIT_ROWS * sizeof(float);

struct Ring {
  float* group_sums;  // [2, MAX_GROUPS, MAX_SPLIT_ROWS]
  unsigned char* stages;
  int bytes;
};

template <class H, class S, class FeatureRow>
struct TilePass {
  using W = typename H::W;
  using T = typename H::T;
  static constexpr int COLUMNS = S::SLICES * QUAD_COLUMNS;
  static constexpr int FEATURE_SLICE = S::ROWS * QUAD_COLUMNS * static_cast<int>(sizeof(T));

  const H& head;
  const FeatureRow& feature_row;
  const int count;  // rows
  float* const sums;
  const Ring& ring;
  int weight_slice, stage_bytes, depth, row_tiles;

  __device__ TilePass(const H& head, const FeatureRow& feature_row, int count, float* sums, const Ring& ring)
      : head(head), feature_row(feature_row), count(count), sums(sums), ring(ring) {
    weight_slice = head.groups * GROUP * QUAD_COLUMNS * static_cast<int>(sizeof(W));
    stage_bytes = S::SLICES * (weight_slice + FEATURE_SLICE);
    depth = min(MAX_STAGES, ring.bytes / stage_bytes);
    row_tiles = (count + S::ROWS - 1) / S::ROWS;
  }

  // A walk over this block's items, a tile of units and a tile of rows each, column by column and stage by stage.
  struct Walk {
    const TilePass& pass;
    int item, unit_tile, row0, column = 0;
    unsigned char* stage;

    __device__ explicit Walk(const TilePass& pass) : pass(pass), stage(pass.ring.stages) { enter(blockIdx.x); }

    __device__ __forceinline__ void enter(int next) {
      item = next, unit_tile = item / pass.row_tiles, row0 = item % pass.row_tiles * S::ROWS;
    }

    __device__ __forceinline__ bool done() const { return unit_tile >= pass.head.tiles; }

    __device__ __forceinline__ bool last_column() const { return column + COLUMNS >= pass.head.width; }

    __device__ __forceinline__ void advance() {
      stage += pass.stage_bytes;
      if (stage == pass.ring.stages + pass.depth * pass.stage_bytes) stage = pass.ring.stages;
      if (last_column()) {
        column = 0;
        enter(item + gridDim.x);
      } else {
        column += COLUMNS;
      }
    }
  };

  // What a loading thread brings of `MAX_ROWS` rows of E: the same 16-byte piece of some of them. Their addresses are
  // found once an item, so that a copy costs an addition.
  template <class E, int MAX_ROWS>
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

  __device__ __forceinline__ int group_of(int i) const {
    return S::SPLIT_UNITS ? static_cast<int>(threadIdx.x) / WARP + 4 * i : i;
  }

  __device__ __forceinline__ int row_of(int tile) const {
    return 8 * (S::SPLIT_UNITS ? tile : static_cast<int>(threadIdx.x) / WARP * S::TILES + tile);
  }

  __device__ __forceinline__ void multiply_stage(unsigned char* stage,
                                                 Products<T> (&products)[S::WARP_GROUPS][S::TILES]) const {
#pragma unroll
    for (int slice = 0; slice < S::SLICES; ++slice) {
      unsigned char* const weights = stage + slice * weight_slice;
      unsigned char* const features = stage + S::SLICES * weight_slice + slice * FEATURE_SLICE;
      decltype(load_units<W, T>(weights)) units[S::WARP_GROUPS];
#pragma unroll
      for (int i = 0; i < S::WARP_GROUPS; ++i) {
        if (group_of(i) < head.groups) units[i] = load_units<W, T>(eighth_row<W>(weights, group_of(i) * GROUP));
      }
#pragma unroll
      for (int tile = 0; tile < S::TILES; ++tile) {
        if constexpr (H::TENSOR_CORES) {
          const RowFragment rows = load_features<W, T>(eighth_row<T>(features, row_of(tile)));
#pragma unroll
          for (int half = 0; half < 2; ++half) {  // outside, so that a product need not wait for the one before
#pragma unroll
            for (int i = 0; i < S::WARP_GROUPS; ++i) {
              if (group_of(i) < head.groups) {
                mma_16x8x16<T>(products[i][tile].sums, units[i].halves[half], rows.halves[half]);
              }
            }
          }
        } else {
#pragma unroll
          for (int r = 0; r < 8; ++r) {
            const Wide row = wide(eighth_row<T>(features, row_of(tile)), r, threadIdx.x % 4);
#pragma unroll
            for (int i = 0; i < S::WARP_GROUPS; ++i) {
              if (group_of(i) < head.groups) {
                float* const sums = products[i][tile].sums;
                sums[r] = dot(sums[r], units[i].low, row);
                sums[r + 8] = dot(sums[r + 8], units[i].high, row);
              }
            }
          }
        }
      }
    }
  }

  // sum over a group's 16 units of w2 relu(z + b1), in every thread of the quad column that has the row.
  __device__ __forceinline__ float group_sum(float low, float high, float b1_low, float b1_high, float w2_low,
                                             float w2_high) const {
    if constexpr (!H::TENSOR_CORES) {
#pragma unroll
      for (int mask = 1; mask < 4; mask *= 2) {
        low += __shfl_xor_sync(~0u, low, mask);
        high += __shfl_xor_sync(~0u, high, mask);
      }
    }
    low += b1_low, high += b1_high;
    // Not fmaxf, which turns a NaN into 0.
    float sum = fmaf(w2_high, high < 0 ? 0 : high, w2_low * (low < 0 ? 0 : low));
    sum = fmaf(low, 0.0f, sum);  // a feature that is not finite makes every product so, also those that ReLU swallows
#pragma unroll
    for (int mask = 4; mask < WARP; mask *= 2) sum += __shfl_xor_sync(~0u, sum, mask);
    return sum;
  }

  __device__ __forceinline__ float bias_at(const typename H::Bias* values, int unit) const {
    return unit < head.units ? to_float(values[unit]) : 0;
  }

  // The end of an item: partial sums of its rows, in `group_sums` where the groups are in several warps.
  __device__ __forceinline__ void reduce(const Walk& at, const Products<T> (&products)[S::WARP_GROUPS][S::TILES],
                                         float* group_sums) const {
    constexpr int ROWS = Products<T>::ROWS;
    const int lane = threadIdx.x % WARP, quad = lane % 4;
    float totals[S::TILES][ROWS] = {};
#pragma unroll
    for (int i = 0; i < S::WARP_GROUPS; ++i) {
      if (group_of(i) < head.groups) {
        const int unit = (at.unit_tile * head.groups + group_of(i)) * GROUP + lane / 4;
        const float b1_low = bias_at(head.b1, unit), b1_high = bias_at(head.b1, unit + 8);
        const float w2_low = bias_at(head.w2, unit), w2_high = bias_at(head.w2, unit + 8);
#pragma unroll
        for (int tile = 0; tile < S::TILES; ++tile) {
#pragma unroll
          for (int r = 0; r < ROWS; ++r) {
            const float sum = group_sum(products[i][tile].sums[r], products[i][tile].sums[r + ROWS], b1_low, b1_high,
                                        w2_low, w2_high);
            if constexpr (S::SPLIT_UNITS) {
              const int row = row_of(tile) + (H::TENSOR_CORES ? 2 * quad + r : r);
              if (lane < 4) group_sums[group_of(i) * MAX_SPLIT_ROWS + row] = sum;
            } else {
              totals[tile][r] += sum;
            }
          }
        }
      }
    }
    if constexpr (!S::SPLIT_UNITS) {
#pragma unroll
      for (int tile = 0; tile < S::TILES; ++tile) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          const int row = at.row0 + row_of(tile) + (H::TENSOR_CORES ? 2 * quad + r : r);
          if (lane < 4 && row < count) sums[static_cast<int64_t>(row) * head.line() + at.unit_tile] = totals[tile][r];
        }
      }
    }
  }

  // The groups' sums of a split item, once a barrier has made them visible.
  __device__ __forceinline__ void gather(int unit_tile, int row0, const float* group_sums) const {
    const int row = row0 + threadIdx.x;
    if (threadIdx.x < S::ROWS && row < count) {
      float total = 0;
      for (int group = 0; group < head.groups; ++group) total += group_sums[group * MAX_SPLIT_ROWS + threadIdx.x];
      sums[static_cast<int64_t>(row) * head.line() + unit_tile] = total;
    }
  }

  __device__ __forceinline__ void produce() const {
    Source<W, MAX_GROUPS * GROUP> weights;
    Source<T, S::ROWS> features;
    Walk ahead(*this);
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
      copy_async_commit();
    };
    for (int stage = 0; stage < depth - 1; ++stage) load_next();
    for (Walk at(*this); !at.done(); at.advance()) {
      wait_for_all_but(depth - 2);
      meet<H::THREADS>();  // this stage is there for all, and the one before it is free
      load_next();
    }
    meet<H::THREADS>();
  }

  __device__ __forceinline__ void consume() const {
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
    // Two buffers: an item may end while a slower warp still gathers the one before.
    int buffer = 0, waiting_tile = -1, waiting_row0 = 0;
    const auto group_sums = [&] { return ring.group_sums + buffer * MAX_GROUPS * MAX_SPLIT_ROWS; };
    const auto gather_waiting = [&] {
      if (S::SPLIT_UNITS && waiting_tile >= 0) {
        gather(waiting_tile, waiting_row0, group_sums());
        buffer ^= 1;
        waiting_tile = -1;
      }
    };
    for (Walk at(*this); !at.done(); at.advance()) {
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

  __device__ void run() const {
    if (threadIdx.x < COMPUTE_THREADS) {
      consume();
    } else {
      produce();
    }
  }

  // wait_group takes its number from the instruction.
  template <int N = MAX_STAGES - 2>
  __device__ __forceinline__ static void wait_for_all_but(int groups) {
    if constexpr (N == 0) {
      copy_async_wait<0>();
    } else if (groups >= N) {
      copy_async_wait<N>();
    } else {
      wait_for_all_but<N - 1>(groups);
    }
  }
};

// sums[m, tile] = sum over the tile's units u of w2[u] relu(W1[u] . f[m] + b1[u]) for every row m < count, f[m] =
// feature_row(m); NaN if f[m] is not finite. All threads of all blocks call it with the same arguments; sums [count,
// line] are complete when all blocks are through.
template <class H, class FeatureRow>
__device__ void partial_sums(const H& head, const typename H::Maps&, const FeatureRow& feature_row, int count, float* sums,
                             const Ring& ring) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if constexpr (H::TENSOR_CORES && std::is_same_v<typename H::W, typename H::T>) {
    __trap();  // head_sm90.cuh has these
    return;
  }
#endif
  const auto run = [&](auto shape) {
    TilePass<H, decltype(shape), FeatureRow>(head, feature_row, count, sums, ring).run();
  };
  if (count <= 8) return run(Shape<1, true, 2>{});
  if constexpr (!H::TENSOR_CORES) {
    run(Shape<2, true, 2>{});
  } else {
    if (count <= 16) return run(Shape<2, true, 2>{});
    if (count <= 64) return run(Shape<8, true, 2>{});
    if (count <= 128) return run(Shape<4, false, 2>{});
    run(Shape<8, false, 1>{});
  }
}

// b2 + sum over the tiles of sums[row], in a fixed order by one warp, for the rows first + i * stride < count; in lane
// i. BATCH rows at once: one after the other, each would wait for the second-level cache.
template <int BATCH, class H>
__device__ __forceinline__ float row_logits(const H& head, const float* sums, int first, int stride, int count) {
  const int lane = threadIdx.x % WARP;
  float totals[BATCH] = {};
  for (int place = 4 * lane; place < head.line(); place += 4 * WARP) {
    const int left = head.tiles - place;  // what lies behind the last tile was never written
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      const int row = first + i * stride;
      if (row < count) {
        const float4 four =
            load_fresh(reinterpret_cast<const float4*>(sums + static_cast<int64_t>(row) * head.line() + place));
        totals[i] += (four.x + (left > 1 ? four.y : 0)) + ((left > 2 ? four.z : 0) + (left > 3 ? four.w : 0));
      }
    }
  }
  float mine = 0;
#pragma unroll
  for (int i = 0; i < BATCH; ++i) {
#pragma unroll
    for (int mask = WARP / 2; mask > 0; mask /= 2) totals[i] += __shfl_xor_sync(~0u, totals[i], mask);
    if (lane == i) mine = totals[i];
  }
  return mine + (head.b2 ? to_float(*head.b2) : 0.0f);
}

// max(logsigmoid(logit), ln 1e-10); a NaN stays one.
__device__ __forceinline__ float device_log_score(float logit) {
  const float value = (logit < 0 ? logit : 0) - log1pf(expf(-fabsf(logit)));
  return value < static_cast<float>(LOG_FLOOR) ? static_cast<float>(LOG_FLOOR) : value;
}

}  // namespace reflective
