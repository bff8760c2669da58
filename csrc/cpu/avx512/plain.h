// Products of plain weights (float32, float16, bfloat16) with activations in float32.
//
// A prepared row is float32, padded with zeros to whole blocks of 32 values. For bfloat16 weights a
// block holds its even values first, then its odd ones: the two halves of each dword of the weight
// become floats by a shift and a mask.
#ifndef MOEFAST_CPU_AVX512_PLAIN_H
#define MOEFAST_CPU_AVX512_PLAIN_H

#include <immintrin.h>

#include "../isa.h"
#include "fetch.h"
#include "int15.h"
#include "sum.h"

namespace moefast {
namespace {

template <int kType>
struct PlainProduct {
  static constexpr int64_t kBlock = 32;
  static constexpr int64_t kBytes = kType == MOEFAST_FLOAT32 ? 4 : 2;

  static int64_t prepared_bytes(const Format&, int64_t in, int64_t count) {
    return round_up(in, kBlock) * 4 * count;
  }

  static bool prepare(const Format&,
                      int dtype,
                      const void* const* rows,
                      int64_t count,
                      int64_t in,
                      void* prepared) {
    const __m512i even =
        _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
    auto* to = static_cast<float*>(prepared);
    const int64_t size = size_of(dtype);
    for (int64_t r = 0; r < count; ++r) {
      const auto* x = static_cast<const uint8_t*>(rows[r]);
      for (int64_t i = 0; i < in; i += kBlock, to += kBlock) {
        __m512 low = load_values(dtype, x + i * size, first_of_16(in - i));
        __m512 high = load_values(dtype, x + (i + 16) * size, first_of_16(in - i - 16));
        if constexpr (kType == MOEFAST_BFLOAT16) {
          const __m512 evens = _mm512_permutex2var_ps(low, even, high);
          high = _mm512_permutex2var_ps(low, odd, high);
          low = evens;
        }
        _mm512_store_ps(to, low);
        _mm512_store_ps(to + 16, high);
      }
    }
    return true;
  }

  // A block of weights as floats, in the order of the prepared rows; values from `left` on are 0.
  static inline void load(const uint8_t* p, int64_t left, __m512* low, __m512* high) {
    const __mmask16 some = first_of_16(left), more = first_of_16(left - 16);
    if constexpr (kType == MOEFAST_FLOAT32) {
      *low = _mm512_maskz_loadu_ps(some, p);
      *high = _mm512_maskz_loadu_ps(more, p + 64);
    } else if constexpr (kType == MOEFAST_FLOAT16) {
      *low = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, p));
      *high = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(more, p + 32));
    } else {
      const auto all = static_cast<__mmask32>(some | static_cast<uint32_t>(more) << 16);
      const __m512i pairs = _mm512_maskz_loadu_epi16(all, p);
      *low = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
      *high = _mm512_castsi512_ps(
          _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
    }
  }

  // Row n of the weight times each of x[0..kRows).
  template <int kRows, bool kFetch>
  static inline void row(
      const Matrix& w, int64_t n, const float* const* x, const Fetch& fetch, __m512* sums) {
    const uint8_t* weight = w.weight + n * w.row_bytes;
    const uint8_t* later = kFetch ? fetch.from(weight) : nullptr;
    __m512 others[kRows];
    for (int r = 0; r < kRows; ++r) {
      sums[r] = others[r] = _mm512_setzero_ps();
    }
    for (int64_t i = 0; i < w.in; i += kBlock) {
      if constexpr (kFetch) {
        for (int64_t line = 0; line < kBlock * kBytes; line += 64) {
          _mm_prefetch(reinterpret_cast<const char*>(later + i * kBytes + line), _MM_HINT_T0);
        }
      }
      __m512 low, high;
      load(weight + i * kBytes, w.in - i, &low, &high);
      for (int r = 0; r < kRows; ++r) {
        sums[r] = _mm512_fmadd_ps(low, _mm512_load_ps(x[r] + i), sums[r]);
        others[r] = _mm512_fmadd_ps(high, _mm512_load_ps(x[r] + i + 16), others[r]);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      sums[r] = _mm512_add_ps(sums[r], others[r]);
    }
  }

  template <int kRows, bool kFetch>
  static inline void some(const Matrix& w,
                          int64_t begin,
                          int64_t end,
                          const void* const* rows,
                          float* y,
                          int64_t ldy,
                          const Ahead& ahead) {
    const Fetch fetch{w.weight + end * w.row_bytes, ahead};
    const float* x[kRows];
    for (int r = 0; r < kRows; ++r) {
      x[r] = static_cast<const float*>(rows[r]);
    }
    for (int64_t n = begin; n < end; ++n) {
      __m512 sums[kRows];
      row<kRows, kFetch>(w, n, x, fetch, sums);
      for (int r = 0; r < kRows; ++r) {
        y[r * ldy + n - begin] = sum1(sums[r]) * w.factor;
      }
    }
  }

  static void multiply(const Matrix& w,
                       int64_t begin,
                       int64_t end,
                       const void* const* rows,
                       int64_t count,
                       float* y,
                       int64_t ldy,
                       const Ahead& ahead) {
    if (count == 0) {
      return;
    }
    int64_t r = 0;
    // The first pass brings the weights into the cache; the others find them there.
    if (count >= 8) {
      some<8, true>(w, begin, end, rows, y, ldy, ahead);
      r = 8;
    } else if (count >= 4) {
      some<4, true>(w, begin, end, rows, y, ldy, ahead);
      r = 4;
    } else {
      some<1, true>(w, begin, end, rows, y, ldy, ahead);
      r = 1;
    }
    for (; r + 8 <= count; r += 8) {
      some<8, false>(w, begin, end, rows + r, y + r * ldy, ldy, ahead);
    }
    for (; r + 4 <= count; r += 4) {
      some<4, false>(w, begin, end, rows + r, y + r * ldy, ldy, ahead);
    }
    for (; r < count; ++r) {
      some<1, false>(w, begin, end, rows + r, y + r * ldy, ldy, ahead);
    }
  }
};

}  // namespace
}  // namespace moefast

#endif
