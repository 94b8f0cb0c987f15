// The tile kernel on tiles of plain memory, so that it can be tested on every processor. TDPBF16PS as Intel's manual
// gives it: even and odd products have a sum each, added to the destination at the end of the 16 pairs.
#include "capability.h"
#include "score_rows_tile.h"

namespace reflective {
namespace {

class EmulatedTiles {
 public:
  void clear() { std::memset(z_, 0, sizeof z_); }

  void multiply_add(const bfloat16* weights, int64_t stride, const bfloat16* panel, bool wide) {
    const int64_t rows = wide ? TILE_ROWS : TILE_ROWS / 2;
    for (int64_t u = 0; u < UNIT_BLOCK; ++u) {
      float even[TILE_ROWS] = {}, odd[TILE_ROWS] = {};
      for (int64_t h = 0; h < TILE_DEPTH; h += 2) {
        const float w_even = to_float(weights[u * stride + h]), w_odd = to_float(weights[u * stride + h + 1]);
        const bfloat16* pairs = panel + h * TILE_ROWS;
        for (int64_t r = 0; r < rows; ++r) {
          even[r] += w_even * to_float(pairs[2 * r]);
          odd[r] += w_odd * to_float(pairs[2 * r + 1]);
        }
      }
      for (int64_t r = 0; r < rows; ++r) z_[u][r] += even[r] + odd[r];
    }
  }

  void store(float* z) const { std::memcpy(z, z_, sizeof z_); }

 private:
  float z_[UNIT_BLOCK][TILE_ROWS];
};

}  // namespace

const ScoreKernel amx_emulated_bfloat16{panel_bytes, pack_panels, tile_partial_sums<EmulatedTiles>};

}  // namespace reflective
