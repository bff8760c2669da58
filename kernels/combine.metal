// A token's experts combined: the sum of its TOP_K rows, times their weights. Nothing is scattered:
// a token's rows are neighbours.
//
// combined: sum_k weights[token, k] * y[token, k].
//   y [tokens, TOP_K, HIDDEN] T; weights [tokens, TOP_K], any float type, cast to C first
//   Products and sums are of type P, the promoted one of T and C, each rounded; the sum is rounded
//   to T. The order is that of MLX's reduction (col_reduce_small) up to 31 experts, so that the
//   bits are: eight sums, of every eighth row, added in order; beyond, one row after another.
// Then, in this order and each rounded to T, where a model has them:
// add_identity: x times the weights of the token's experts from EXPERTS on, which return their
// input.
//   x [tokens, HIDDEN] T; indices [tokens, TOP_K], any integers. The sum of weights is of their own
//   type.
// scale: times a factor, rounded to T.
// add_shared: plus shared [tokens, HIDDEN] T, the output of the expert of every token, times
//   sigmoid(gate [tokens]) where it has a gate.
//
// Launch: a thread has kCombineColumns neighbouring columns of one token; grid x counts these, y
// tokens. Memory: everything once, but for weights, indices and gate: once for each thread of the
// token. Reference: combine, moe and identity_share of moefast/backends/reference/experts.py.
#include "activation.h"

namespace moefast {

constexpr constant int kCombineColumns = 4;

// Columns of one token, from `column` on.
template <typename T>
struct Columns {
  T of[kCombineColumns];
};

// Of the last columns of a row there may be fewer.
template <int HIDDEN>
inline bool is_column(uint column) {
  return HIDDEN % kCombineColumns == 0 || column < HIDDEN;
}

template <int TOP_K, int HIDDEN, typename T, typename C, typename P, typename Y, typename Weights>
inline Columns<T> combined(Y y, Weights weights, uint token, uint column) {
  constexpr int kSums = TOP_K > 8 && TOP_K < 32 ? 8 : 1;
  P sums[kSums][kCombineColumns];
#pragma unroll
  for (int s = 0; s < kSums; s++) {
#pragma unroll
    for (int i = 0; i < kCombineColumns; i++) {
      sums[s][i] = P(0);
    }
  }
  for (int first = 0; first < TOP_K; first += kSums) {
#pragma unroll
    for (int s = 0; s < kSums; s++) {
      const int k = first + s;
      if (k < TOP_K) {  // no break: the loop must unroll, or sums would lie in memory
        const P weight = P(C(weights[size_t(token) * TOP_K + k]));
        auto from = y + (size_t(token) * TOP_K + k) * HIDDEN;
#pragma unroll
        for (int i = 0; i < kCombineColumns; i++) {
          if (is_column<HIDDEN>(column + i)) {
            const P product = P(P(from[column + i]) * weight);
            sums[s][i] = P(product + sums[s][i]);
          }
        }
      }
    }
  }
  Columns<T> out;
#pragma unroll
  for (int i = 0; i < kCombineColumns; i++) {
    P sum = sums[0][i];
#pragma unroll
    for (int s = 1; s < kSums; s++) {
      sum = P(sums[s][i] + sum);
    }
    out.of[i] = T(sum);
  }
  return out;
}

// P: the promoted type of T and of the weights.
template <int TOP_K,
          int EXPERTS,
          int HIDDEN,
          typename P,
          typename T,
          typename W,
          typename X,
          typename Weights,
          typename Indices>
inline Columns<T> add_identity(
    Columns<T> sum, X x, Weights weights, Indices indices, uint token, uint column) {
  W kept = W(0);
  for (int k = 0; k < TOP_K; k++) {
    if (indices[token * TOP_K + k] >= EXPERTS) {
      kept = W(kept + weights[token * TOP_K + k]);
    }
  }
#pragma unroll
  for (int i = 0; i < kCombineColumns; i++) {
    if (is_column<HIDDEN>(column + i)) {
      const P share = P(P(x[size_t(token) * HIDDEN + column + i]) * P(kept));
      sum.of[i] = T(sum.of[i] + T(share));
    }
  }
  return sum;
}

template <typename T>
inline Columns<T> scale(Columns<T> sum, float factor) {
#pragma unroll
  for (int i = 0; i < kCombineColumns; i++) {
    sum.of[i] = T(sum.of[i] * T(factor));
  }
  return sum;
}

template <int HIDDEN, typename T, typename Shared>
inline Columns<T> add_shared(Columns<T> sum, Shared shared, uint token, uint column) {
#pragma unroll
  for (int i = 0; i < kCombineColumns; i++) {
    if (is_column<HIDDEN>(column + i)) {
      sum.of[i] = T(sum.of[i] + shared[size_t(token) * HIDDEN + column + i]);
    }
  }
  return sum;
}

template <int HIDDEN, typename T, typename Shared, typename Gate>
inline Columns<T> add_shared(Columns<T> sum, Shared shared, Gate gate, uint token, uint column) {
  const T open = sigmoid(gate[token]);
#pragma unroll
  for (int i = 0; i < kCombineColumns; i++) {
    if (is_column<HIDDEN>(column + i)) {
      sum.of[i] = T(sum.of[i] + T(open * shared[size_t(token) * HIDDEN + column + i]));
    }
  }
  return sum;
}

template <int HIDDEN, typename T>
inline void store(Columns<T> sum, device T* out, uint token, uint column) {
#pragma unroll
  for (int i = 0; i < kCombineColumns; i++) {
    if (is_column<HIDDEN>(column + i)) {
      out[size_t(token) * HIDDEN + column + i] = sum.of[i];
    }
  }
}

}  // namespace moefast

#ifndef MOEFAST_JIT

using namespace moefast;

template <typename T, int TOP_K, int HIDDEN>
[[kernel]] void combine(const device T* y [[buffer(0)]],
                        const device float* weights [[buffer(1)]],
                        device T* out [[buffer(2)]],
                        uint3 at [[thread_position_in_grid]]) {
  const uint column = at.x * kCombineColumns;
  if (column < HIDDEN) {
    store<HIDDEN>(combined<TOP_K, HIDDEN, T, float, float>(y, weights, at.y, column), out, at.y,
                  column);
  }
}

// clang-format off
template [[host_name("combine_k4_2048_bfloat")]] [[kernel]] decltype(combine<bfloat, 4, 2048>) combine<bfloat, 4, 2048>;
template [[host_name("combine_k8_4096_half")]] [[kernel]] decltype(combine<half, 8, 4096>) combine<half, 8, 4096>;
// clang-format on

#endif
