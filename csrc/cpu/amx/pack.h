// Activations as the second operand of tile products.
//
// A pack holds 16 rows of activations side by side, as tile products want their columns: for each
// 32 values of the rows one tile of 16 x 16 dwords, in which dword [p][r] is the pair p of row r.
// Layout:
//
//   [rows / 16, rounded up][blocks of 128][4 tiles][16 pairs][16 rows][2] bfloat16
//
// with two blocks sharing two pages as pages.h says, from the first page that begins in the pack.
// Within a block of 128 values tiles take them in one of two orders: as they come (tile t has
// values 32 t to 32 t + 31), or as 4-bit codes leave their words (tile t has values t, 4 + t, 8 +
// t, ... of the block), so that weights need no shuffling.
#ifndef MOEFAST_CPU_AMX_PACK_H
#define MOEFAST_CPU_AMX_PACK_H

#include <immintrin.h>

#include "../types.h"
#include "pages.h"
#include "transpose.h"

namespace moefast {
namespace {

enum ValueOrder { kAsTheyCome, kEveryFourth };

constexpr int64_t kTileBlock = 128;             // values
constexpr int64_t kTileBytes = 1024;            // of a tile
constexpr uint32_t kTileLeastRow = 0x179abe15;  // 1e-24f: the tile unit takes denormals for zero
constexpr uint32_t kTileMost = 0x7e967699;      // 1e38f: what is above may round to infinity

static inline int64_t tile_blocks(int64_t in) {
  return (in + kTileBlock - 1) / kTileBlock;
}

// Of 16 rows, in bfloat16 values.
static inline int64_t column_size(int64_t in) {
  return (tile_blocks(in) + 1) / 2 * 2 * kPage;
}

static inline int64_t pack_bytes(int64_t in, int64_t count) {
  return round_up(count, 16) / 16 * column_size(in) * 2 + kPageBytes;  // to begin at a page
}

// 32 values as bfloat16, those from `left` on 0; `magnitude` collects the largest.
static inline __m512i load_bfloat16(int dtype, const uint8_t* p, int64_t left, __m512i* magnitude) {
  const auto mask = [](int64_t n) {
    return n >= 16 ? __mmask16(0xffff) : n <= 0 ? __mmask16(0) : __mmask16((1u << n) - 1);
  };
  const __m512i all_but_sign = _mm512_set1_epi32(0x7fffffff);
  __m512 low, high;
  if (dtype == MOEFAST_FLOAT32) {
    low = _mm512_maskz_loadu_ps(mask(left), p);
    high = _mm512_maskz_loadu_ps(mask(left - 16), p + 64);
  } else {
    const __m256i a = _mm256_maskz_loadu_epi16(mask(left), p);
    const __m256i b = _mm256_maskz_loadu_epi16(mask(left - 16), p + 32);
    if (dtype == MOEFAST_FLOAT16) {
      low = _mm512_cvtph_ps(a);
      high = _mm512_cvtph_ps(b);
    } else {
      low = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(a), 16));
      high = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16));
    }
  }
  *magnitude =
      _mm512_max_epu32(*magnitude, _mm512_and_si512(_mm512_castps_si512(low), all_but_sign));
  *magnitude =
      _mm512_max_epu32(*magnitude, _mm512_and_si512(_mm512_castps_si512(high), all_but_sign));
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

// The 128 values v[0..4), reordered so that v[t] has those of tile t.
static inline void every_fourth(__m512i* v) {
  alignas(64) static constexpr struct Picks {
    uint16_t of[4][32];
    constexpr Picks() : of() {
      for (int t = 0; t < 4; ++t) {
        for (int i = 0; i < 32; ++i) {
          of[t][i] = static_cast<uint16_t>(4 * (i % 16) + t);  // of two vectors, 64 values
        }
      }
    }
  } kPicks;
  __m512i out[4];
  for (int t = 0; t < 4; ++t) {
    const __m512i pick = _mm512_load_si512(kPicks.of[t]);
    const __m512i low = _mm512_permutex2var_epi16(v[0], pick, v[1]);
    const __m512i high = _mm512_permutex2var_epi16(v[2], pick, v[3]);
    out[t] = _mm512_mask_blend_epi32(0xff00, low, high);
  }
  for (int t = 0; t < 4; ++t) {
    v[t] = out[t];
  }
}

// False: a row is so small that its values are denormal, or so large that they may overflow.
static inline bool pack_rows(
    ValueOrder order, int dtype, const void* const* rows, int64_t count, int64_t in, void* pack) {
  uint16_t* to = page_from(pack);
  const int64_t blocks = tile_blocks(in), size = size_of(dtype);
  bool fit = true;
  for (int64_t first = 0; first < count; first += 16) {
    __m512i magnitude[16];
    for (int r = 0; r < 16; ++r) {
      magnitude[r] = _mm512_setzero_si512();
    }
    const int64_t here = count - first < 16 ? count - first : 16;
    uint16_t* column = to + first / 16 * column_size(in);
    for (int64_t b = 0; b < blocks; ++b) {
      uint16_t* block = column + 2 * kPage * (b / 2) + kHalfPage * (b % 2);
      __m512i tiles[4][16];
      for (int r = 0; r < 16; ++r) {
        __m512i v[4];
        for (int q = 0; q < 4; ++q) {
          const int64_t at = b * kTileBlock + 32 * q;
          v[q] = r < here ? load_bfloat16(dtype,
                                          static_cast<const uint8_t*>(rows[first + r]) + at * size,
                                          in - at, magnitude + r)
                          : _mm512_setzero_si512();
        }
        if (order == kEveryFourth) {
          every_fourth(v);
        }
        for (int t = 0; t < 4; ++t) {
          tiles[t][r] = v[t];
        }
      }
      for (int t = 0; t < 4; ++t) {
        transpose16(tiles[t]);
        for (int p = 0; p < 16; ++p) {
          _mm512_store_si512(block + tile_in_block(t) + p * 32, tiles[t][p]);
        }
      }
    }
    for (int r = 0; r < here; ++r) {
      const uint32_t largest = _mm512_reduce_max_epu32(magnitude[r]);
      const bool finite = largest < 0x7f800000;
      fit = fit && (largest == 0 || largest >= kTileLeastRow) && !(finite && largest > kTileMost);
    }
  }
  return fit;
}

}  // namespace
}  // namespace moefast

#endif
