// Sums of codes times 15-bit activations with AVX2: what generic/int15.h asks for.
//
// Codes are spread to 16 bits and multiplied by madd, which adds pairs: exact. A vector of 256 bits
// has 16 words of P = 16 / kBits codes each; shifting and masking gives P vectors, of the words'
// first codes, second codes, and so on. Activations lie in that order: for each vector of codes,
// [P][16] int16. Every 32-bit sum is then of 2 P codes that follow one another.
#ifndef MOEFAST_CPU_AVX2_CODES_H
#define MOEFAST_CPU_AVX2_CODES_H

#include <immintrin.h>

#include "../generic/int15_product.h"

namespace moefast {
namespace {

// The steps of the eight sums of a vector of kCount codes: of its first unit on.
template <int kUnit, int kCount>
inline __m256 spread_steps(const float* steps) {
  if constexpr (kCount <= kUnit) {
    return _mm256_broadcast_ss(steps);
  } else if constexpr (kCount == 2 * kUnit) {
    const __m128 pair = _mm_castpd_ps(_mm_load_sd(reinterpret_cast<const double*>(steps)));
    return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(pair),
                                    _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
  } else {
    static_assert(kCount == 4 * kUnit);
    return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(steps)),
                                    _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
  }
}

// Unsigned codes of 2, 4 or 8 bits.
template <int kCodeBits>
struct UnsignedCodes {
  static constexpr int kBits = kCodeBits;
  static constexpr int kPhases = 16 / kBits;
  static constexpr int kFineUnit = 32;
  static constexpr float kFactor = 1.0f;

  static inline void split(__m256i packed, __m256i* codes) {
    const __m256i mask = _mm256_set1_epi16((1 << kBits) - 1);
    for (int p = 0; p < kPhases; ++p) {
      const __m256i low = p == 0 ? packed : _mm256_srli_epi16(packed, p * kBits);
      codes[p] = p == kPhases - 1 ? low : _mm256_and_si256(low, mask);
    }
  }
};

// e2m1 codes, as 512 times their values: twice that, in the upper half of a word.
struct E2m1Codes {
  static constexpr int kBits = 4;
  static constexpr int kPhases = 4;
  static constexpr int kFineUnit = 16;
  static constexpr float kFactor = 1.0f / 512;

  static inline void split(__m256i packed, __m256i* codes) {
    const __m256i mask = _mm256_set1_epi8(15), high = _mm256_set1_epi16(static_cast<short>(0xff00));
    const __m256i twice = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12));
    const __m256i even = _mm256_shuffle_epi8(twice, _mm256_and_si256(packed, mask));
    const __m256i odd =
        _mm256_shuffle_epi8(twice, _mm256_and_si256(_mm256_srli_epi16(packed, 4), mask));
    codes[0] = _mm256_slli_epi16(even, 8);
    codes[1] = _mm256_slli_epi16(odd, 8);
    codes[2] = _mm256_and_si256(even, high);
    codes[3] = _mm256_and_si256(odd, high);
  }
};

// Every other word: those of even places, and of odd ones.
inline void deal_out(__m256i a, __m256i b, __m256i* even, __m256i* odd) {
  const __m256i order = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
  a = _mm256_shuffle_epi8(a, order);
  b = _mm256_shuffle_epi8(b, order);
  *even = _mm256_permute4x64_epi64(_mm256_unpacklo_epi64(a, b), 0xd8);
  *odd = _mm256_permute4x64_epi64(_mm256_unpackhi_epi64(a, b), 0xd8);
}

// kPhases vectors of words -> every kPhases-th word, from the first on, the second, and so on.
template <int kPhases>
inline void deal(const __m256i* words, __m256i* to, int stride) {
  if constexpr (kPhases == 1) {
    *to = *words;
  } else {
    __m256i even[kPhases / 2], odd[kPhases / 2];
    for (int i = 0; i < kPhases / 2; ++i) {
      deal_out(words[2 * i], words[2 * i + 1], even + i, odd + i);
    }
    deal<kPhases / 2>(even, to, 2 * stride);
    deal<kPhases / 2>(odd, to + stride, 2 * stride);
  }
}

template <class Split>
struct Avx2Codes : Split {
  using Split::kBits;
  using Split::kPhases;
  static constexpr int kCount = 16 * kPhases;  // codes in a vector
  static constexpr int kVectors = kSpan / kCount;
  static constexpr int kLayout = 300 + kPhases;

  typedef __m256 Sum;

  static inline void arrange(const int32_t* q, int8_t* to) {
    const __m256i* from = reinterpret_cast<const __m256i*>(q);
    __m256i* vectors = reinterpret_cast<__m256i*>(to);
    for (int v = 0; v < kVectors; ++v) {
      __m256i words[kPhases];
      for (int p = 0; p < kPhases; ++p, from += 2) {
        const __m256i packed = _mm256_packs_epi32(from[0], from[1]);
        words[p] = _mm256_permute4x64_epi64(packed, 0xd8);  // packs works by halves
      }
      deal<kPhases>(words, vectors + v * kPhases, 1);
    }
  }

  template <int kUnit, int kRows>
  static inline void span(const uint8_t* packed,
                          const Int15Row* rows,
                          int64_t at,
                          const float (*steps)[kMostUnits],
                          int64_t unit,
                          Sum* sums) {
    for (int v = 0; v < kVectors; ++v) {
      __m256i codes[kPhases];
      Split::split(load(packed, v), codes);
      for (int r = 0; r < kRows; ++r) {
        const __m256i products = multiply(codes, rows[r].codes + at, v);
        sums[r] = scaled<kUnit>(products, steps[r] + unit, v, sums[r]);
      }
    }
  }

  template <int kUnit>
  static inline void two(const uint8_t* packed,
                         const uint8_t* other,
                         const int8_t* values,
                         const float* steps,
                         const float* other_steps,
                         Sum* sums) {
    for (int v = 0; v < kVectors; ++v) {
      __m256i codes[kPhases], other_codes[kPhases];
      Split::split(load(packed, v), codes);
      Split::split(load(other, v), other_codes);
      sums[0] = scaled<kUnit>(multiply(codes, values, v), steps, v, sums[0]);
      sums[1] = scaled<kUnit>(multiply(other_codes, values, v), other_steps, v, sums[1]);
    }
  }

 private:
  static inline __m256i load(const uint8_t* packed, int v) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed) + v);
  }

  // Those of the v-th vector of a span's codes.
  static inline __m256i multiply(const __m256i* codes, const int8_t* values, int v) {
    const __m256i* q = reinterpret_cast<const __m256i*>(values) + v * kPhases;
    __m256i sum = _mm256_madd_epi16(codes[0], _mm256_load_si256(q));
    for (int p = 1; p < kPhases; ++p) {
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(codes[p], _mm256_load_si256(q + p)));
    }
    return sum;
  }

  template <int kUnit>
  static inline __m256 scaled(__m256i products, const float* steps, int v, __m256 sum) {
    const __m256 step = spread_steps<kUnit, kCount>(steps + v * kCount / kUnit);
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(products), step, sum);
  }
};

}  // namespace
}  // namespace moefast

#endif
