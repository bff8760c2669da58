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
