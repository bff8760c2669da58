// Sums of codes times 15-bit activations with NEON's dot products: what generic/int15.h asks for.
//
// An activation is 128 * high + low, each a signed byte. A vector of 128 bits has 16 bytes of
// P = 8 / kBits codes each; shifting and masking gives P vectors, of the bytes' first codes, second
// codes, and so on. Activations lie in that order: for each vector of codes, [P][16] high bytes,
// then [P][16] low ones. A dot product adds up four bytes: every 32-bit sum is of 4 P codes that
// follow one another.
#ifndef MOEFAST_CPU_NEON_CODES_H
#define MOEFAST_CPU_NEON_CODES_H

#include <arm_neon.h>

#include "../generic/int15_product.h"

namespace moefast {
namespace {

// Unsigned codes of 2 or 4 bits.
template <int kCodeBits>
struct UnsignedCodes {
  static constexpr int kBits = kCodeBits;
  static constexpr int kPhases = 8 / kBits;
  static constexpr int kFineUnit = 32;
  static constexpr float kFactor = 1.0f;
  typedef int8x16_t Bytes;

  static inline void split(uint8x16_t packed, Bytes* codes) {
    const uint8x16_t mask = vdupq_n_u8((1 << kBits) - 1);
    for (int p = 0; p < kPhases; ++p) {
      const uint8x16_t low = vshlq_u8(packed, vdupq_n_s8(static_cast<int8_t>(-p * kBits)));
      codes[p] = vreinterpretq_s8_u8(vandq_u8(low, mask));
    }
  }
  static inline int32x4_t dot(int32x4_t sum, Bytes codes, int8x16_t x) {
    return vdotq_s32(sum, codes, x);
  }
};

// Unsigned codes of 8 bits, and a product of unsigned with signed bytes.
struct ByteCodes {
  static constexpr int kBits = 8;
  static constexpr int kPhases = 1;
  static constexpr int kFineUnit = 32;
  static constexpr float kFactor = 1.0f;
  typedef uint8x16_t Bytes;

  static inline void split(uint8x16_t packed, Bytes* codes) { codes[0] = packed; }
  static inline int32x4_t dot(int32x4_t sum, Bytes codes, int8x16_t x) {
    return vusdotq_s32(sum, codes, x);
  }
};

// e2m1 codes, as twice their values.
struct E2m1Codes {
  static constexpr int kBits = 4;
  static constexpr int kPhases = 2;
  static constexpr int kFineUnit = 16;
  static constexpr float kFactor = 0.5f;
  typedef int8x16_t Bytes;

  static inline void split(uint8x16_t packed, Bytes* codes) {
    static constexpr int8_t kTwice[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
    const int8x16_t twice = vld1q_s8(kTwice);
    codes[0] = vqtbl1q_s8(twice, vandq_u8(packed, vdupq_n_u8(15)));
    codes[1] = vqtbl1q_s8(twice, vshrq_n_u8(packed, 4));
  }
  static inline int32x4_t dot(int32x4_t sum, Bytes codes, int8x16_t x) {
    return vdotq_s32(sum, codes, x);
  }
};

template <class Split>
struct NeonCodes : Split {
  using Split::kBits;
  using Split::kPhases;
  using Bytes = typename Split::Bytes;
  static constexpr int kCount = 16 * kPhases;  // codes in a vector
  static constexpr int kLayout = 400 + kPhases;

  typedef float32x4_t Sum;

  static inline void arrange(const int32_t* q, int8_t* to) {
    for (int v = 0; v < kSpan / kCount; ++v) {
      for (int p = 0; p < kPhases; ++p) {
        int8_t* high = to + v * 2 * kCount + p * 16;
        int8_t* low = high + kCount;
        for (int lane = 0; lane < 16; ++lane) {
          const int32_t value = q[v * kCount + lane * kPhases + p];
          const int32_t upper = (value + 64) >> 7;
          high[lane] = static_cast<int8_t>(upper);
          low[lane] = static_cast<int8_t>(value - upper * 128);
        }
      }
    }
  }

  // The vectors of a unit, or one vector of several units, are added up before they are scaled.
  template <int kUnit, int kRows>
  static inline void span(const uint8_t* packed,
                          const Int15Row* rows,
                          int64_t at,
                          const float (*steps)[kMostUnits],
                          int64_t unit,
                          Sum* sums) {
    constexpr int kVectors = vectors(kUnit);
    for (int first = 0; first < kSpan / kCount; first += kVectors) {
      Bytes codes[kVectors * kPhases];
      split_vectors<kVectors>(packed, first, codes);
      for (int r = 0; r < kRows; ++r) {
        const int32x4_t products = multiply<kVectors>(codes, rows[r].codes + at, first);
        sums[r] = scaled<kUnit>(products, steps[r] + unit, first, sums[r]);
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
    constexpr int kVectors = vectors(kUnit);
    for (int first = 0; first < kSpan / kCount; first += kVectors) {
      Bytes codes[kVectors * kPhases], other_codes[kVectors * kPhases];
      split_vectors<kVectors>(packed, first, codes);
      split_vectors<kVectors>(other, first, other_codes);
      const int32x4_t products = multiply<kVectors>(codes, values, first);
      const int32x4_t others = multiply<kVectors>(other_codes, values, first);
      sums[0] = scaled<kUnit>(products, steps, first, sums[0]);
      sums[1] = scaled<kUnit>(others, other_steps, first, sums[1]);
    }
  }

 private:
  static constexpr int vectors(int unit) { return unit > kCount ? unit / kCount : 1; }

  template <int kVectors>
  static inline void split_vectors(const uint8_t* packed, int first, Bytes* codes) {
    for (int v = 0; v < kVectors; ++v) {
      Split::split(vld1q_u8(packed + 16 * (first + v)), codes + v * kPhases);
    }
  }

  // Those of kVectors vectors of a span's codes, from the one numbered `first` on.
  template <int kVectors>
  static inline int32x4_t multiply(const Bytes* codes, const int8_t* values, int first) {
    const int8_t* high = values + first * 2 * kCount;
    int32x4_t sum = vdupq_n_s32(0);
    for (int i = 0; i < kVectors * kPhases; ++i) {
      sum = Split::dot(sum, codes[i], vld1q_s8(high + offset(i)));
    }
    sum = vshlq_n_s32(sum, 7);
    for (int i = 0; i < kVectors * kPhases; ++i) {
      sum = Split::dot(sum, codes[i], vld1q_s8(high + offset(i) + kCount));
    }
    return sum;
  }

  // Where the i-th vector of high bytes begins.
  static constexpr int offset(int i) { return i / kPhases * 2 * kCount + i % kPhases * 16; }

  template <int kUnit>
  static inline Sum scaled(int32x4_t products, const float* steps, int first, Sum sum) {
    const float32x4_t values = vcvtq_f32_s32(products);
    const float* step = steps + first * kCount / kUnit;
    if constexpr (kUnit >= kCount) {
      return vfmaq_n_f32(sum, values, *step);
    } else {
      static_assert(kCount == 2 * kUnit);
      const float32x2_t pair = vld1_f32(step);
      return vfmaq_f32(sum, values, vcombine_f32(vdup_lane_f32(pair, 0), vdup_lane_f32(pair, 1)));
    }
  }
};

}  // namespace
}  // namespace moefast

#endif
