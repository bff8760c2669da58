// Weights as the first operand of tile products: 16 rows, rounded to bfloat16.
//
// A panel holds values of 32 rows as tiles, block by block: [half][4 tiles][16 rows][32 values]
// bfloat16, the 128 values of a block in the order of the pack that it is multiplied with (pack.h).
// Values past the end of a row, and rows past the last, are zero.
#ifndef MOEFAST_CPU_AMX_WEIGHTS_H
#define MOEFAST_CPU_AMX_WEIGHTS_H

#include <immintrin.h>

#include "../avx512/int15.h"
#include "../avx512/scales.h"
#include "../generic/unpack.h"
#include "pack.h"

namespace moefast {
namespace {

constexpr int64_t kPanelValues = 2048;
constexpr int64_t kHalf = 2 * kPage;  // from one half to the other, in bfloat16 values
constexpr int64_t kPanelSize = kPanelValues / kTileBlock * kHalf;

// Where blocks are kept: all of them for those who come later, or the last two in turn, which stay
// in the nearest cache. `data` begins a page; two blocks share four pages, two to each half.
struct Panel {
  uint16_t* data;
  int64_t mask;

  inline uint16_t* block(int64_t b) const {
    b &= mask;
    return data + b / 2 * (2 * kHalf) + b % 2 * kHalfPage;
  }
};

static inline __m512i rounded(const float* low) {
  return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(low + 16), _mm512_loadu_ps(low));
}

static inline __mmask64 bytes_left(int64_t count) {
  return count >= 64 ? ~0ull : count <= 0 ? 0 : (1ull << count) - 1;
}

template <ScaleKind kKind>
static inline void widen_scales(const uint8_t* from, int64_t count, float* to) {
  using S = LaneScales<kKind, 64, 64>;
  for (int64_t i = 0; i < count; i += 16) {
    const __m512 some = S::in_a_row(from + i * S::kSize, first_of_16(count - i));
    _mm512_store_ps(to + i, _mm512_mul_ps(some, _mm512_set1_ps(scale_unit(kKind))));
  }
}

static inline void widen_scales(int dtype, const uint8_t* from, int64_t count, float* to) {
  switch (dtype) {
    case MOEFAST_FLOAT32:
      return widen_scales<kScaleFloat32>(from, count, to);
    case MOEFAST_FLOAT16:
      return widen_scales<kScaleFloat16>(from, count, to);
    default:
      return widen_scales<kScaleBfloat16>(from, count, to);
  }
}

// Scales of values [from, from + count) of a row, and zeros up to a whole block.
static inline void panel_scales(
    const Matrix& w, int64_t n, int64_t from, int64_t count, Scales& to) {
  const Format& format = w.format;
  if (format.mode == MOEFAST_PLAIN) {
    return;
  }
  const int64_t first = from / format.group, groups = count / format.group;
  const uint8_t* scales = w.scales + n * w.scale_bytes;
  if (format.mode == MOEFAST_AFFINE) {
    const int64_t skip = first * size_of(format.dtype);
    widen_scales(format.dtype, scales + skip, groups, to.scale);
    widen_scales(format.dtype, w.biases + n * w.scale_bytes + skip, groups, to.offset);
  } else if (format.mode == MOEFAST_NVFP4) {
    widen_scales<kScaleE4m3>(scales + first, groups, to.scale);
  } else {
    widen_scales<kScaleE8m0>(scales + first, groups, to.scale);
  }
}

// 4-bit codes, kTables groups to a block of 128: a table of the 16 values that a code can stand
// for, made for each group, and looked up by all its codes at once. A word of four codes gives one
// value to each of the block's four tiles.
template <int kTables, bool kE2m1>
struct TableWeights {
  static constexpr ValueOrder kOrder = kEveryFourth;

  static inline __m512 values() {
    return kE2m1 ? _mm512_set_ps(-6, -4, -3, -2, -1.5f, -1, -0.5f, -0.0f, 6, 4, 3, 2, 1.5f, 1, 0.5f,
                                 0)
                 : _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  }

  static inline __m512 table(const float* scale, const float* offset, int i) {
    const __m512 s = _mm512_set1_ps(scale[i]);
    return kE2m1 ? _mm512_mul_ps(values(), s)
                 : _mm512_fmadd_ps(values(), s, _mm512_set1_ps(offset[i]));
  }

  // Where in the tables the codes of each word look.
  static inline __m512i bases() {
    alignas(64) static constexpr struct Bases {
      uint16_t of[32];
      constexpr Bases() : of() {
        for (int i = 0; i < 32; ++i) {
          of[i] = static_cast<uint16_t>(i * kTables / 32 * 16);
        }
      }
    } kBases;
    return _mm512_load_si512(kBases.of);
  }

  static inline void block(__m512i codes, const float* scale, const float* offset, uint16_t* to) {
    const __m512i low = _mm512_set1_epi16(15), base = bases();
    const __m512 t0 = table(scale, offset, 0);
    const __m512 t1 = kTables > 1 ? table(scale, offset, 1) : t0;
    const __m512i first = (__m512i)_mm512_cvtne2ps_pbh(t1, t0);
    __m512i second = first;
    if constexpr (kTables == 4) {
      second = (__m512i)_mm512_cvtne2ps_pbh(table(scale, offset, 3), table(scale, offset, 2));
    }
    for (int t = 0; t < 4; ++t) {
      // (codes >> 4 t & 15) | base
      const __m512i at =
          _mm512_ternarylogic_epi32(_mm512_srli_epi16(codes, 4 * t), low, base, 0xea);
      const __m512i found = kTables == 4 ? _mm512_permutex2var_epi16(first, at, second)
                                         : _mm512_permutexvar_epi16(at, first);
      _mm512_store_si512(to + tile_in_block(t), found);
    }
  }

  static inline void row(
      const Format&, const uint8_t* at, int64_t b, int64_t left, const Scales& s, uint16_t* to) {
    const __m512i codes = left >= kTileBlock ? _mm512_loadu_si512(at)
                                             : _mm512_maskz_loadu_epi8(bytes_left(left / 2), at);
    block(codes, s.scale + b * kTables, s.offset + b * kTables, to);
  }
};

// Any other format, through float32.
template <class Values>
struct ReadWeights {
  static constexpr ValueOrder kOrder = kAsTheyCome;

  static inline void row(const Format& format,
                         const uint8_t* at,
                         int64_t b,
                         int64_t left,
                         const Scales& s,
                         uint16_t* to) {
    alignas(64) float values[kTileBlock];
    const int here = static_cast<int>(left < kTileBlock ? left : kTileBlock);
    const uint8_t* row = at - b * kTileBlock * format.bits / 8;
    const float* read = Values::read(format, row, b * kTileBlock, here, s, values);
    if (here < kTileBlock) {
      if (read != values) {
        __builtin_memcpy(values, read, static_cast<size_t>(here) * 4);
        read = values;
      }
      __builtin_memset(values + here, 0, static_cast<size_t>(kTileBlock - here) * 4);
    }
    for (int t = 0; t < 4; ++t) {
      _mm512_store_si512(to + tile_in_block(t), rounded(read + 32 * t));
    }
  }
};

// bfloat16 as it is.
struct PlainWeights {
  static constexpr ValueOrder kOrder = kAsTheyCome;

  static inline void row(
      const Format&, const uint8_t* at, int64_t, int64_t left, const Scales&, uint16_t* to) {
    for (int t = 0; t < 4; ++t) {
      const __mmask64 some = bytes_left((left - t * 32) * 2);
      _mm512_store_si512(to + tile_in_block(t), _mm512_maskz_loadu_epi8(some, at + t * 64));
    }
  }
};

// Values [from, from + count) of rows [row, row + 32) of a weight, on their way into a panel. Rows
// from `end` on are zero. The 32 rows that come next are fetched meanwhile, line after line (what
// the hardware's own prefetchers like best), and a line at a time: a core can wait for 16 lines,
// and tiles on their way from the second cache need those, too.
template <class Weights>
class Filler {
 public:
  Filler(const Matrix& w,
         int64_t row,
         int64_t end,
         int64_t from,
         int64_t count,
         const Ahead& ahead,
         const Panel& panel)
      : format_(w.format),
        count_(count),
        block_bytes_(kTileBlock * w.format.bits / 8),
        row_bytes_(w.row_bytes),
        rows_(end - row < 32 ? end - row : 32),
        part_(w.weight + row * w.row_bytes + from * w.format.bits / 8),
        panel_(panel) {
    const int64_t next = row + 32;
    const uint8_t* later = next < end                ? w.weight + next * w.row_bytes
                           : ahead.weight != nullptr ? ahead.weight + (next - end) * w.row_bytes
                                                     : w.weight + row * w.row_bytes;
    later_ = later + 32 * (from * w.format.bits / 8);
    for (int64_t r = 0; r < rows_; ++r) {
      panel_scales(w, row + r, from, count, scales_[r]);
    }
  }

  // Whether block b has all 32 rows and all values.
  inline bool whole(int64_t b) const { return rows_ == 32 && (b + 1) * kTileBlock <= count_; }

  // Fetches what takes the place of block b of rows [first, first + 8).
  [[gnu::always_inline]] inline void fetch(int64_t b, int first) const {
    const uint8_t* later = later_ + (4 * b + first / 8) * 8 * block_bytes_;
    for (int64_t i = 0; i < 8 * block_bytes_; i += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(later + i), _MM_HINT_T1);
    }
  }

  // Block b, a whole one, of rows [first, first + count); fetches what takes its place.
  inline __attribute__((always_inline)) void fill_rows(int64_t b, int64_t first, int count) const {
    const uint8_t* part = part_ + first * row_bytes_ + b * block_bytes_;
    uint16_t* to = panel_.block(b) + (first / 16) * kHalf + (first % 16) * 32;
    const uint8_t* later = later_ + (32 * b + first) * block_bytes_;
    for (int r = 0; r < count; ++r) {
      for (int64_t i = 0; i < block_bytes_; i += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(later + r * block_bytes_ + i), _MM_HINT_T1);
      }
      Weights::row(format_, part + r * row_bytes_, b, kTileBlock, scales_[first + r], to + r * 32);
    }
  }

  // Block b of rows [first, first + 8), whatever there is of it.
  inline void fill(int64_t b, int first) const {
    fetch(b, first);
    uint16_t* to = panel_.block(b) + (first / 16) * kHalf + (first % 16) * 32;
    const uint8_t* part = part_ + first * row_bytes_ + b * block_bytes_;
    for (int r = 0; r < 8; ++r, to += 32) {
      if (first + r < rows_) {
        Weights::row(format_, part + r * row_bytes_, b, count_ - b * kTileBlock, scales_[first + r],
                     to);
        continue;
      }
      for (int t = 0; t < 4; ++t) {
        _mm512_store_si512(to + tile_in_block(t), _mm512_setzero_si512());
      }
    }
  }

 private:
  const Format format_;
  const int64_t count_;
  const int64_t block_bytes_;
  const int64_t row_bytes_;
  const int64_t rows_;
  const uint8_t* const part_;
  const uint8_t* later_;
  const Panel panel_;
  Scales scales_[32];
};

}  // namespace
}  // namespace moefast

#endif
