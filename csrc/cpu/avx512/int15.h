// Activations as 15-bit integers.
//
// 128 values share a factor f = max|x| / 16256. Each becomes v = round(x / f), kept as two bytes hi
// and lo with v = 128 * hi + lo: hi in -127..127, lo in -64..63. Products of either byte with
// unsigned codes are summed exactly in int32 by vpdpbusd. What x loses is a uniform error of at
// most f / 2, some 5e-5 of a normal block's RMS: less than the rounding of a float16 result.
//
// A prepared row, in this order (n = blocks of 128):
//   planes [n][256] int8   `kNibbles`: hi of even values, hi of odd, lo of even, lo of odd (64
//   each);
//                          `kBytes`: hi of values 0-63, lo of 0-63, hi of 64-127, lo of 64-127
//   factor [n] float32, padded to 16
//   sum    [in / group] float32, padded to 16: the sum of a group of v * f, for the groups' offsets
#ifndef MOEFAST_CPU_AVX512_INT15_H
#define MOEFAST_CPU_AVX512_INT15_H

#include <immintrin.h>

#include "../types.h"

namespace moefast {
namespace {

enum PlaneOrder { kNibbles, kBytes };

constexpr int64_t kInt15Block = 128;
constexpr float kInt15Steps = 16256.0f;  // 127 * 128
// Blocks below are taken for zero, rows below or above are not taken at all.
constexpr float kInt15LeastBlock = 1e-33f;
constexpr float kInt15LeastRow = 1e-24f;
constexpr float kInt15Most = 1e30f;

struct Int15Row {
  const int8_t* planes;
  const float* factor;
  const float* sum;
};

static inline int64_t int15_blocks(int64_t in) {
  return (in + kInt15Block - 1) / kInt15Block;
}

static inline int64_t int15_bytes(int64_t in, int64_t group) {
  const int64_t n = int15_blocks(in);
  return n * 256 + round_up(n, 16) * 4 + round_up((in + group - 1) / group, 16) * 4;
}

static inline Int15Row int15_row(const void* prepared, int64_t in) {
  const int64_t n = int15_blocks(in);
  const auto* planes = static_cast<const int8_t*>(prepared);
  const auto* factor = reinterpret_cast<const float*>(planes + n * 256);
  return {planes, factor, factor + round_up(n, 16)};
}

// 16 values of `dtype`, those outside `some` 0.
static inline __m512 load_values(int dtype, const uint8_t* p, __mmask16 some) {
  if (dtype == MOEFAST_FLOAT32) {
    return _mm512_maskz_loadu_ps(some, p);
  }
  const __m256i half = _mm256_maskz_loadu_epi16(some, p);
  if (dtype == MOEFAST_FLOAT16) {
    return _mm512_cvtph_ps(half);
  }
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

static inline __mmask16 first_of_16(int64_t count) {
  return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

static inline void store_planes(PlaneOrder order,
                                const int8_t* bytes,
                                int8_t* first,
                                int8_t* second) {
  const __m512i low = _mm512_load_si512(bytes), high = _mm512_load_si512(bytes + 64);
  if (order == kBytes) {
    _mm512_store_si512(first, low);
    _mm512_store_si512(second, high);
    return;
  }
  _mm256_store_si256(reinterpret_cast<__m256i*>(first), _mm512_cvtepi16_epi8(low));
  _mm256_store_si256(reinterpret_cast<__m256i*>(first + 32), _mm512_cvtepi16_epi8(high));
  _mm256_store_si256(reinterpret_cast<__m256i*>(second),
                     _mm512_cvtepi16_epi8(_mm512_srli_epi16(low, 8)));
  _mm256_store_si256(reinterpret_cast<__m256i*>(second + 32),
                     _mm512_cvtepi16_epi8(_mm512_srli_epi16(high, 8)));
}

// Prepares one row; false where its values are infinite, NaN or extreme.
static inline bool int15_prepare(
    PlaneOrder order, int dtype, const void* row, int64_t in, int64_t group, void* prepared) {
  const int64_t n = int15_blocks(in);
  auto* planes = static_cast<int8_t*>(prepared);
  auto* factors = reinterpret_cast<float*>(planes + n * 256);
  float* sums = factors + round_up(n, 16);
  const int64_t sums_size = round_up((in + group - 1) / group, 16);
  for (int64_t i = n; i < round_up(n, 16); ++i) {
    factors[i] = 0.0f;
  }
  for (int64_t i = 0; i < sums_size; ++i) {
    sums[i] = 0.0f;
  }
  const int64_t size = size_of(dtype);
  const auto* x = static_cast<const uint8_t*>(row);
  float most = 0.0f;
  for (int64_t b = 0; b < n; ++b, planes += 256) {
    __m512 values[8];
    __m512i magnitude = _mm512_setzero_si512();
    for (int j = 0; j < 8; ++j) {
      const int64_t at = b * kInt15Block + 16 * j;
      values[j] = load_values(dtype, x + at * size, first_of_16(in - at));
      const __m512i bits =
          _mm512_and_si512(_mm512_castps_si512(values[j]), _mm512_set1_epi32(0x7fffffff));
      magnitude = _mm512_max_epu32(magnitude, bits);
    }
    // Bits of magnitudes are ordered like the magnitudes, with infinity and NaN above all.
    const float largest = _mm512_cvtss_f32(_mm512_castsi512_ps(
        _mm512_set1_epi32(static_cast<int>(_mm512_reduce_max_epu32(magnitude)))));
    if (!(largest <= kInt15Most)) {
      return false;
    }
    most = largest > most ? largest : most;
    const bool zero = largest < kInt15LeastBlock;
    const float factor = zero ? 0.0f : largest / kInt15Steps;
    const __m512 inverse = _mm512_set1_ps(zero ? 0.0f : kInt15Steps / largest);
    factors[b] = factor;
    alignas(64) int8_t hi[128], lo[128];
    for (int j = 0; j < 8; ++j) {
      const __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(values[j], inverse));
      const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(64)), 7);
      const __m512i lower = _mm512_sub_epi32(v, _mm512_slli_epi32(upper, 7));
      _mm_store_si128(reinterpret_cast<__m128i*>(hi + 16 * j), _mm512_cvtepi32_epi8(upper));
      _mm_store_si128(reinterpret_cast<__m128i*>(lo + 16 * j), _mm512_cvtepi32_epi8(lower));
      const int64_t at = b * kInt15Block + 16 * j;
      if (at < in) {
        sums[at / group] += static_cast<float>(_mm512_reduce_add_epi32(v)) * factor;
      }
    }
    if (order == kNibbles) {
      store_planes(order, hi, planes, planes + 64);
      store_planes(order, lo, planes + 128, planes + 192);
    } else {
      store_planes(order, hi, planes, planes + 128);
      store_planes(order, lo, planes + 64, planes + 192);
    }
  }
  return most == 0.0f || most >= kInt15LeastRow;
}

}  // namespace
}  // namespace moefast

#endif
