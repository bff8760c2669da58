// Sums over the lanes of vectors.
#ifndef MOEFAST_CPU_AVX512_SUM_H
#define MOEFAST_CPU_AVX512_SUM_H

#include <immintrin.h>

namespace moefast {
namespace {

static inline __m128 sum_quarters(__m512 v) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// [sum a, sum b, sum c, sum d]. Each in the same order of additions as sum1.
static inline __m128 sum4(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 abcd = _mm512_add_ps(
      _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))),
      _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))));
  return sum_quarters(abcd);
}

static inline float sum1(__m512 a) {
  return _mm_cvtss_f32(sum4(a, a, a, a));
}

}  // namespace
}  // namespace moefast

#endif
