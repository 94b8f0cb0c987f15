// A head as the kernels of score_rows, logit_rows, flush and decode_step take it, how its units are shared out among
// blocks and warps, and how rows of W1 and of features lie in shared memory.
#pragma once

#include <type_traits>

#include "curve.h"
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
  static constexpr bool CURVED = false;
  struct Maps {};
  using Bias = std::conditional_t<sizeof(W) == 1, float, W>;

  const W* w1;  // [units, width]
  const Bias *b1, *w2, *b2;
  int units, width;
};

// The same with another activation than ReLU. As an argument of the kernel the curve costs no register.
template <class W_, class T_>
struct CurvedHead : DeviceHead<W_, T_> {
  static constexpr bool CURVED = true;

  Curve curve;
};

// Rows of 32 columns, 16-byte piece by piece, in an order in which reads meet no bank twice: of 16-bit rows 8 below
// each other, of float32 rows two.
template <class E>
__device__ __forceinline__ unsigned char* piece_at(unsigned char* rows, int row, int piece) {
  if constexpr (sizeof(E) == 2) piece ^= row / 2 % 4;
  if constexpr (sizeof(E) == 4) piece ^= row % 2;
  return rows + (row * QUAD_COLUMNS * static_cast<int>(sizeof(E)) + piece * 16);
}

// Where row `row` of a slice begins, for multiples of 8: the order of pieces repeats there.
template <class E>
__device__ __forceinline__ unsigned char* eighth_row(unsigned char* slice, int row) {
  return slice + row * QUAD_COLUMNS * static_cast<int>(sizeof(E));
}

// How the four multiplying warps share a tile: with few rows each takes some groups and every row, with many each takes
// all groups and some rows. TILES: tiles of 8 rows a warp. SLICES: of 32 columns a stage.
template <int TILES_, bool SPLIT_UNITS_, int SLICES_>
struct Shape {
  static constexpr int TILES = TILES_, SLICES = SLICES_;
  static constexpr bool SPLIT_UNITS = SPLIT_UNITS_;
  static constexpr int ROWS = 8 * TILES * (SPLIT_UNITS ? 1 : 4);
  static constexpr int WARP_GROUPS = SPLIT_UNITS ? 2 : MAX_GROUPS;
};

}  // namespace reflective
