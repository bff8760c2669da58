// Scores of a router, as MLX's kernels compute them on a GPU: every result is rounded to its type,
// and functions of half compute in float within one operation.
//
// sigmoid, sqrt_softplus, tanh_of: unary_ops.h and binary_ops.h of MLX. softmax_of_slots and
// softmax_of_lanes: softmax.h, with its order of summation. Equal to the bit where exp, log, sqrt
// and tanh are the same functions.
#ifndef MOEFAST_SCORE_H
#define MOEFAST_SCORE_H

#include "slots.h"

namespace moefast {
namespace router {

enum Score { kSoftmax = 0, kSigmoid = 1, kSqrtSoftplus = 2 };

// What MLX's functions of T compute in: a function of half returns float, one of bfloat bfloat.
template <typename T>
struct Intermediate {
  using type = T;
};

template <>
struct Intermediate<half> {
  using type = float;
};

template <typename T>
inline T sigmoid(T x) {
  using U = typename Intermediate<T>::type;
  U e = U(precise::exp(abs(float(x))));
  U y = U(U(1) / U(U(1) + e));
  return T(x < T(0) ? y : U(U(1) - y));
}

template <typename T>
inline T tanh_of(T x) {
  return T(precise::tanh(float(x)));
}

// A function of bfloat is one of float, rounded; that of half is its own. `precise`, because what
// is compiled at run time has fast functions otherwise, and MLX's logaddexp, compiled beforehand,
// has not: a fast logarithm near 1 may have lost the small scores.
template <typename T>
inline T exp_of(T x) {
  return T(precise::exp(float(x)));
}

template <>
inline half exp_of(half x) {
  return exp(x);
}

// log(1 + x). MLX has it of float, and rounds a bfloat's once.
inline float log1p_of(float x) {
  float sum = 1.0f + x;
  return sum == 1.0f ? x : x * (precise::log(sum) / (sum - 1.0f));
}

// sqrt(log(1 + exp(x))); the logarithm is MLX's logaddexp(x, 0).
template <typename T>
inline T sqrt_softplus(T x) {
  using U = typename Intermediate<T>::type;
  if (isnan(float(x))) {
    return x;
  }
  T high = x > T(0) ? x : T(0);
  T low = x > T(0) ? T(0) : x;
  T sum = high;
  if (!isinf(float(x))) {
    U log1p = U(log1p_of(float(exp_of(T(low - high)))));
    sum = T(U(high) + log1p);
  }
  return T(precise::sqrt(float(sum)));
}

// One that stands for itself. Softmax is of all of them.
template <int score, typename T>
inline T score_of_one(T x) {
  return score == kSigmoid ? sigmoid(x) : sqrt_softplus(x);
}

// simd_sum of half adds half, of bfloat float.
template <typename T>
inline T sum_of_lanes(T x) {
  return simd_sum(x);
}

template <>
inline bfloat sum_of_lanes(bfloat x) {
  return bfloat(simd_sum(float(x)));
}

template <typename T>
inline T shuffled(T x, int lane) {
  return T(simd_shuffle(float(x), ushort(lane)));
}

// exp(x - largest), in Acc.
template <typename Acc>
inline Acc softmax_power(Acc x, Acc largest) {
  return Acc(fast::exp(float(Acc(x - largest))));
}

// MLX starts from the lowest finite number: a row of -inf is 0 / 0 either way.
template <typename Acc>
inline Acc largest_of_lanes(float x) {
  return Acc(simd_max(max(x, float(numeric_limits<Acc>::lowest()))));
}

// The softmax of a token's logits, in place. MLX's simdgroup i has the experts of block i, four to
// a lane: a lane adds up its four, a simdgroup its lanes, the first simdgroup the others.
template <typename Acc, typename Slots, typename T>
inline void softmax_of_slots(thread T (&x)[Slots::count], int lane) {
  static_assert(Slots::width == 4, "the order of summation is that of four experts to a lane");
  float most = -INFINITY;
#pragma clang loop unroll(full)
  for (int slot = 0; slot < Slots::count; slot++) {
    bool more = Slots::expert(slot, lane) < Slots::experts && most < float(x[slot]);  // NaN is not
    most = more ? float(x[slot]) : most;
  }
  Acc largest = largest_of_lanes<Acc>(most);
  Acc powers[Slots::count];
  Acc sums = Acc(0);  // of block i in lane i
#pragma clang loop unroll(full)
  for (int block = 0; block < Slots::blocks; block++) {
    Acc sum = Acc(0);
#pragma clang loop unroll(full)
    for (int slot = 4 * block; slot < 4 * block + 4; slot++) {
      bool there = Slots::expert(slot, lane) < Slots::experts;
      powers[slot] = there ? softmax_power(Acc(x[slot]), largest) : Acc(0);
      sum = Acc(sum + powers[slot]);
    }
    sum = sum_of_lanes(sum);
    sums = Slots::blocks == 1 || lane == block ? sum : sums;
  }
  Acc total = Slots::blocks == 1 ? sums : sum_of_lanes(sums);
  Acc factor = Acc(Acc(1) / total);
#pragma clang loop unroll(full)
  for (int slot = 0; slot < Slots::count; slot++) {
    x[slot] = T(Acc(powers[slot] * factor));
  }
}

// The softmax of the first count lanes' numbers, at most 32. MLX gives four to each lane.
template <typename Acc, int count, typename T>
inline T softmax_of_lanes(T x, int lane) {
  bool there = lane < count;
  Acc largest = largest_of_lanes<Acc>(there && !isnan(float(x)) ? float(x) : -INFINITY);
  Acc power = there ? softmax_power(Acc(x), largest) : Acc(0);
  Acc sum = Acc(0);
#pragma clang loop unroll(full)
  for (int i = 0; i < 4; i++) {
    int from = 4 * lane + i;
    Acc other = shuffled(power, from % kLanes);
    sum = Acc(sum + (from < count ? other : Acc(0)));
  }
  Acc total = sum_of_lanes(sum);
  return T(Acc(power * Acc(Acc(1) / total)));
}

}  // namespace router
}  // namespace moefast

#endif
