// AMX tiles. Compiled, but never yet executed on a processor that has them: no such machine was at hand. The kernel
// around the tiles is tested through their emulation (score_rows_amx_emulated.cpp).
#include "capability.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "target.h"
REFLECTIVE_TARGET("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,amx-tile,amx-bf16")
#include "score_rows_tile.h"

namespace reflective {
namespace {

// Registers 0-3: Z (units 0-15 and 16-31 by rows 0-15 and 16-31); 4, 5: weights; 6, 7: rows.
class AmxTiles {
 public:
  AmxTiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  ~AmxTiles() { _tile_release(); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;

  void clear() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }

  // Z += weights [32, 32] * panel [16 pairs, 32 rows]; the right half only if `wide`.
  void multiply_add(const bfloat16* weights, int64_t stride, const bfloat16* panel, bool wide) {
    _tile_loadd(4, weights, stride * sizeof(bfloat16));
    _tile_loadd(5, weights + 16 * stride, stride * sizeof(bfloat16));
    _tile_loadd(6, panel, 128);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    if (!wide) return;
    _tile_loadd(7, panel + 32, 128);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }

  void store(float* z) const {
    _tile_stored(0, z, 128);
    _tile_stored(1, z + 16, 128);
    _tile_stored(2, z + 16 * 32, 128);
    _tile_stored(3, z + 16 * 32 + 16, 128);
  }
};

}  // namespace

const ScoreKernel amx_bfloat16{panel_bytes, pack_panels, tile_partial_sums<AmxTiles>};

}  // namespace reflective
REFLECTIVE_TARGET_END
#endif
