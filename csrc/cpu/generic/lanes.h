// Moves between the lanes of several vectors at once.
#ifndef MOEFAST_CPU_GENERIC_LANES_H
#define MOEFAST_CPU_GENERIC_LANES_H

#include "vector.h"

namespace moefast {
namespace {

// a0 b0 a1 b1 ..., and the other half of that.
template <int kLeft, int... kLanes>
struct Interleave : Interleave<kLeft - 1, kLeft - 1, kLanes...> {};

template <int... kLanes>
struct Interleave<0, kLanes...> {
  static Floats low(Floats a, Floats b) {
#if __has_builtin(__builtin_shufflevector)
    return __builtin_shufflevector(a, b, (kLanes % 2 * kFloats + kLanes / 2)...);
#else
    return Floats{(kLanes % 2 ? b : a)[kLanes / 2]...};
#endif
  }
  static Floats high(Floats a, Floats b) {
#if __has_builtin(__builtin_shufflevector)
    return __builtin_shufflevector(a, b, (kLanes % 2 * kFloats + (kLanes + kFloats) / 2)...);
#else
    return Floats{(kLanes % 2 ? b : a)[(kLanes + kFloats) / 2]...};
#endif
  }
};

// Lane i of the result combines all lanes of v[i].
template <class Combine>
[[gnu::always_inline]] inline Floats fold(Floats* v, Combine combine) {
  for (int half = kFloats / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) {
      v[i] = combine(Interleave<kFloats>::low(v[i], v[i + half]),
                     Interleave<kFloats>::high(v[i], v[i + half]));
    }
  }
  return v[0];
}

// The last `count` lanes.
inline Ints last_lanes(int64_t count) {
  Ints lane;
  for (int k = 0; k < kFloats; ++k) {
    lane[k] = k;
  }
  return lane >= kFloats - static_cast<int32_t>(count);
}

// to[i] = the sum of the lanes of v[i], for four vectors, each in the same order of additions.
[[gnu::always_inline]] inline void sum_four(const Floats* v, float* to) {
#if defined(MOEFAST_VECTOR_AVX2)
  const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps((__m256)v[0], (__m256)v[1]),
                                  _mm256_unpackhi_ps((__m256)v[0], (__m256)v[1]));
  const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps((__m256)v[2], (__m256)v[3]),
                                  _mm256_unpackhi_ps((__m256)v[2], (__m256)v[3]));
  const __m256d low = _mm256_unpacklo_pd((__m256d)ab, (__m256d)cd);
  const __m256d high = _mm256_unpackhi_pd((__m256d)ab, (__m256d)cd);
  const __m256 sums = _mm256_add_ps((__m256)low, (__m256)high);
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
#elif defined(__aarch64__)
  const float32x4_t ab = vpaddq_f32((float32x4_t)v[0], (float32x4_t)v[1]);
  const float32x4_t cd = vpaddq_f32((float32x4_t)v[2], (float32x4_t)v[3]);
  vst1q_f32(to, vpaddq_f32(ab, cd));
#else
  for (int i = 0; i < 4; ++i) {
    to[i] = sum_across(v[i]);
  }
#endif
}

// Lane i of v[j] and lane j of v[i] change places: each round turns the bits of an element's
// address (row, lane) by one.
[[gnu::always_inline]] inline void transpose(Floats* v) {
  for (int round = 1; round < kFloats; round *= 2) {
    Floats to[kFloats];
    for (int i = 0; i < kFloats / 2; ++i) {
      to[2 * i] = Interleave<kFloats>::low(v[i], v[i + kFloats / 2]);
      to[2 * i + 1] = Interleave<kFloats>::high(v[i], v[i + kFloats / 2]);
    }
    for (int i = 0; i < kFloats; ++i) {
      v[i] = to[i];
    }
  }
}

}  // namespace
}  // namespace moefast

#endif
