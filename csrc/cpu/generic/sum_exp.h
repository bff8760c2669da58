// The largest of some values, and the sum of their exponentials relative to it.
#ifndef MOEFAST_CPU_GENERIC_SUM_EXP_H
#define MOEFAST_CPU_GENERIC_SUM_EXP_H

#include "../isa.h"
#include "elementwise.h"

namespace moefast {
namespace {

// Vectors that are added up side by side: the additions of one need not wait for those of another.
constexpr int kSideBySide = 4;

// `combine` of all of x[0..count), each through `map` first. `none`, what -inf is mapped to,
// changes no result: the last vector is filled up with it.
template <class Map, class Combine>
inline float reduced(const float* x, int64_t count, float none, Map map, Combine combine) {
  Floats lanes[kSideBySide];
  for (Floats& one : lanes) {
    one = splat<Floats>(none);
  }
  int64_t i = 0;
  for (; i + kSideBySide * kFloats <= count; i += kSideBySide * kFloats) {
    for (int k = 0; k < kSideBySide; ++k) {
      lanes[k] = combine(lanes[k], map(load_floats(x + i + k * kFloats)));
    }
  }
  for (; i < count; i += kFloats) {
    const int64_t left = count - i < kFloats ? count - i : kFloats;
    Floats last = splat<Floats>(-__builtin_inff());
    __builtin_memcpy(&last, x + i, static_cast<size_t>(left) * sizeof(float));
    lanes[0] = combine(lanes[0], map(last));
  }
  return across(combine(combine(lanes[0], lanes[1]), combine(lanes[2], lanes[3])), combine);
}

// See SumExp. A shift that is not finite would make NaN of infinities.
inline SumExp sum_exp(const float* x, int64_t count) {
  const float infinity = __builtin_inff();
  const auto larger = [](auto a, auto b) { return b > a ? b : a; };
  const auto same = [](Floats values) { return values; };
  const float largest = reduced(x, count, -infinity, same, larger);
  const float shift = largest == infinity || largest == -infinity ? 0.0f : largest;
  const float sum = reduced(
      x, count, 0.0f, [=](Floats values) { return exp(values - shift); },
      [](auto a, auto b) { return a + b; });
  return {largest, sum};
}

}  // namespace
}  // namespace moefast

#endif
