// Scales of a row of codes, spread over the lanes of their block's partial sums.
//
// A block is 128 codes (of 4 bits) or 64 (of a byte); its 16 int32 or float32 lanes hold the sums
// of 8 or 4 codes that follow one another. A group of codes thus covers 1, 2, 4, 8 or 16 whole
// lanes.
#ifndef MOEFAST_CPU_AVX512_SCALES_H
#define MOEFAST_CPU_AVX512_SCALES_H

#include <immintrin.h>
#include <string.h>

#include "../types.h"

namespace moefast {
namespace {

// What scales are made of: the three float dtypes of affine scales, and the exponents of mxfp4 and
// nvfp4.
enum ScaleKind { kScaleFloat32, kScaleFloat16, kScaleBfloat16, kScaleE8m0, kScaleE4m3 };

constexpr int scale_size(ScaleKind kind) {
  return kind == kScaleFloat32 ? 4 : kind == kScaleE8m0 || kind == kScaleE4m3 ? 1 : 2;
}

// e4m3 codes are read as the float16 of the same bits, which has another exponent bias.
constexpr float scale_unit(ScaleKind kind) {
  return kind == kScaleE4m3 ? 256.0f : 1.0f;
}

// Byte shuffles that put scale i of a block into lanes [i * kLanes, (i + 1) * kLanes).
struct alignas(64) Spread {
  uint8_t byte[64];
};

constexpr Spread spread_into_dwords(int size, int lanes, int lowest) {
  Spread s{};
  for (int lane = 0; lane < 16; ++lane) {
    for (int b = 0; b < 4; ++b) {
      const bool from_scale = b >= lowest && b < lowest + size;
      s.byte[lane * 4 + b] =
          from_scale ? static_cast<uint8_t>((lane / lanes) * size + b - lowest) : 0x80;
    }
  }
  return s;
}

constexpr Spread spread_into_words(int size, int lanes, int lowest) {
  Spread s{};
  for (int lane = 0; lane < 16; ++lane) {
    for (int b = 0; b < 2; ++b) {
      const bool from_scale = b >= lowest && b < lowest + size;
      s.byte[lane * 2 + b] =
          from_scale ? static_cast<uint8_t>((lane / lanes) * size + b - lowest) : 0x80;
    }
  }
  return s;
}

static inline __m512 from_e8m0(__m512i exponent_bits) {
  // Exponent 0 is 2^-127, a denormal.
  return _mm512_castsi512_ps(_mm512_max_epu32(exponent_bits, _mm512_set1_epi32(0x00400000)));
}

static inline __m512 from_e4m3(__m256i high_bytes) {
  const __m256i sign = _mm256_and_si256(high_bytes, _mm256_set1_epi16(static_cast<short>(0x8000)));
  const __m256i rest =
      _mm256_srli_epi16(_mm256_and_si256(high_bytes, _mm256_set1_epi16(0x7f00)), 1);
  return _mm512_cvtph_ps(_mm256_or_si256(sign, rest));
}

// Scales of `kGroup` codes each, for blocks of `kBlock` codes.
template <ScaleKind kKind, int kGroup, int kBlock>
struct LaneScales {
  static constexpr int kSize = scale_size(kKind);
  static constexpr int kPerBlock = kGroup >= kBlock ? 1 : kBlock / kGroup;
  static constexpr int kLanes = 16 / kPerBlock;

  // Where a block's first scale is.
  static inline const uint8_t* of_block(const uint8_t* row, int64_t block) {
    return row + (kGroup >= kBlock ? block / (kGroup >= kBlock ? kGroup / kBlock : 1)
                                   : block * kPerBlock) *
                     kSize;
  }

  // The kPerBlock scales at `p`, each over its lanes.
  static inline __m512 spread(const uint8_t* p) {
    if constexpr (kKind == kScaleFloat32) {
      if constexpr (kPerBlock == 1) {
        float s;
        memcpy(&s, p, sizeof s);
        return _mm512_set1_ps(s);
      } else if constexpr (kPerBlock == 2) {
        const __m512i lanes = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
        double both;
        memcpy(&both, p, sizeof both);
        return _mm512_permutexvar_ps(lanes, _mm512_castpd_ps(_mm512_set1_pd(both)));
      } else {
        static_assert(kPerBlock == 4);
        const __m512i lanes = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
        const __m128 four = _mm_loadu_ps(reinterpret_cast<const float*>(p));
        return _mm512_permutexvar_ps(lanes, _mm512_castps128_ps512(four));
      }
    } else if constexpr (kKind == kScaleBfloat16) {
      static constexpr Spread kSpread = spread_into_dwords(2, kLanes, 2);
      return _mm512_castsi512_ps(_mm512_shuffle_epi8(repeated(p), of(kSpread)));
    } else if constexpr (kKind == kScaleE8m0) {
      static constexpr Spread kSpread = spread_into_dwords(1, kLanes, 3);
      return from_e8m0(_mm512_srli_epi32(_mm512_shuffle_epi8(repeated(p), of(kSpread)), 1));
    } else {
      static constexpr Spread kSpread =
          spread_into_words(kSize, kLanes, kKind == kScaleE4m3 ? 1 : 0);
      const __m256i words =
          _mm256_shuffle_epi8(_mm512_castsi512_si256(repeated(p)),
                              _mm256_load_si256(reinterpret_cast<const __m256i*>(kSpread.byte)));
      return kKind == kScaleE4m3 ? from_e4m3(words) : _mm512_cvtph_ps(words);
    }
  }

  // 16 scales that follow one another, those outside `some` 0.
  static inline __m512 in_a_row(const uint8_t* p, __mmask16 some) {
    if constexpr (kKind == kScaleFloat32) {
      return _mm512_maskz_loadu_ps(some, p);
    } else if constexpr (kKind == kScaleBfloat16) {
      return _mm512_castsi512_ps(
          _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, p)), 16));
    } else if constexpr (kKind == kScaleFloat16) {
      return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, p));
    } else {
      const __m128i bytes = _mm_maskz_loadu_epi8(some, p);
      if constexpr (kKind == kScaleE8m0) {
        return _mm512_maskz_mov_ps(some,
                                   from_e8m0(_mm512_slli_epi32(_mm512_cvtepu8_epi32(bytes), 23)));
      } else {
        return from_e4m3(_mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 8));
      }
    }
  }

 private:
  static inline __m512i of(const Spread& s) {
    return _mm512_load_si512(reinterpret_cast<const __m512i*>(s.byte));
  }

  // The scales of a block, over and over.
  static inline __m512i repeated(const uint8_t* p) {
    if constexpr (kPerBlock * kSize == 8) {
      int64_t bits;
      memcpy(&bits, p, sizeof bits);
      return _mm512_set1_epi64(bits);
    } else if constexpr (kPerBlock * kSize == 4) {
      int32_t bits;
      memcpy(&bits, p, sizeof bits);
      return _mm512_set1_epi32(bits);
    } else if constexpr (kPerBlock * kSize == 2) {
      int16_t bits;
      memcpy(&bits, p, sizeof bits);
      return _mm512_set1_epi16(bits);
    } else {
      return _mm512_set1_epi8(static_cast<char>(*p));
    }
  }
};

}  // namespace
}  // namespace moefast

#endif
