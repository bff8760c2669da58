// The down projection of every route of a few tokens, alone or with everything that follows it.
//
//   inner    T [tokens * TOP_K, K]: inner activations of each route
//   indices  uint [tokens, TOP_K]: the expert of each route; one that does not exist gives 0
//   down     a stack [E, N, K]
//
// `down`: every route's output, T [tokens * TOP_K, N].
//   Grid: x the lanes, y SIMDGROUPS simdgroups for every SIMDGROUPS * ROWS rows, z routes. A
//   simdgroup owns ROWS rows of one route.
//
// `down_combine`: their sum, weighted, and what the block adds to it, T [tokens, N]:
//   T(sum_k weight_k * y_k)  [+ identity share]  * scale  [+ [sigmoid(logit) *] shared output]
//   weights  a float type [tokens, TOP_K]; cast to C, then multiplied and summed in A, the type to
//            which MLX promotes T and C
//   shared   T [tokens, K'] inner activations of the shared expert, its down projection [N, K'] and
//            T [tokens], the logit of its output gate, if it has one
//   x        T [tokens, N]: what experts past the end return, in models that have those
//   Grid: x the lanes, y SIMDGROUPS simdgroups for every ROWS rows, z tokens. A threadgroup owns
//   ROWS rows of one token, a simdgroup those of one route at a time; the shared expert counts as
//   SHARED_TASKS routes of ROWS / SHARED_TASKS rows.
//   Threadgroup memory: T [TOP_K + 1, ROWS].
//
// Memory: each weight, scale and offset of the chosen experts is read once per route; inner once
// for each simdgroup. Equal to the bit to MLX's gather_qmv (FAST: gather_qmv_fast), its product and
// its sum over k (col_reduce_small, below 32), and the element-wise operations after it.
#include "activation.h"
#include "dot.h"

namespace moefast {

// What simdgroup `group` of route `route` does.
template <typename T,
          int ROWS,
          int K,
          int N,
          int E,
          bool FAST,
          typename Inner,
          typename Indices,
          typename Down>
void down(
    Inner inner, Indices indices, Down stack, device T* out, int group, uint route, int lane) {
  const int row = group * ROWS, count = min(ROWS, N - row);
  if (count <= 0) {
    return;
  }
  const uint expert = indices[route];
  T value = T(0);
  if (expert < uint(E)) {
    value =
        projected<T, ROWS, K, N, FAST>(inner + size_t(route) * K, stack, expert, row, count, lane);
  }
  if (lane < count) {
    out[size_t(route) * N + row + lane] = value;
  }
}

// The shared expert's part of a combination; `logits` of its output gate or None.
template <bool FAST, int K, int TASKS, typename Inner, typename Down, typename Logits>
struct SharedDown {
  static constexpr constant int kTasks = TASKS;

  Inner inner;
  Down stack;
  Logits logits;

  // Task `task` of TASKS: its rows go to `slots` [ROWS].
  template <typename T, int ROWS, int N>
  void run(threadgroup T* slots, uint token, int task, int row, int lane) const thread {
    static_assert(TASKS == 1 || N % ROWS == 0, "a task without rows would read past the matrix");
    constexpr int SHARE = ROWS / TASKS;
    const int first = row + task * SHARE, count = clamp(N - first, 0, SHARE);
    const T value =
        projected<T, SHARE, K, N, FAST>(inner + size_t(token) * K, stack, 0, first, count, lane);
    if (lane < count) {
      slots[task * SHARE + lane] = value;
    }
  }
};

template <bool FAST, int K, int TASKS, typename Inner, typename Down, typename Logits>
SharedDown<FAST, K, TASKS, Inner, Down, Logits> shared_down(Inner inner,
                                                            Down stack,
                                                            Logits logits) {
  return {inner, stack, logits};
}

struct NoSharedDown {
  static constexpr constant int kTasks = 0;

  template <typename T, int ROWS, int N>
  void run(threadgroup T*, uint, int, int, int) const thread {}
};

template <typename T>
T gated(None, uint, T value) {
  return value;
}

template <typename T, typename Logits>
T gated(Logits logits, uint token, T value) {
  return T(sigmoid(T(logits[token])) * value);
}

// sum_k weight_k * y_k of one output; y_k is at slots[k * ROWS]. Up to 8 terms MLX adds in order,
// to 0; of more, terms 8 apart are added first.
template <typename A, typename C, int TOP_K, int ROWS, typename T, typename Weights>
A weighted_sum(const threadgroup T* slots, Weights weights) {
  if (TOP_K == 1) {
    return A(A(slots[0]) * A(C(weights[0])));
  }
  constexpr int PARTS = TOP_K < 8 ? TOP_K : 8;
  A parts[PARTS] = {};
#pragma unroll
  for (int k = 0; k < TOP_K; k++) {
    const A term = A(A(slots[k * ROWS]) * A(C(weights[k])));
    parts[k % PARTS] = A(term + parts[k % PARTS]);
  }
  A sum = parts[0];
#pragma unroll
  for (int i = 1; i < PARTS; i++) {
    sum = A(parts[i] + sum);
  }
  return sum;
}

// y plus x times the weights of experts past the end; I is the promoted type of T and the weights.
template <typename I, int E, int TOP_K, typename T, typename Indices, typename Weights>
T with_identity(None, size_t, Indices, Weights, T y) {
  return y;
}

template <typename I, int E, int TOP_K, typename T, typename X, typename Indices, typename Weights>
T with_identity(X x, size_t at, Indices indices, Weights weights, T y) {
  auto kept = weights[0];
  kept = 0;
  for (int k = 0; k < TOP_K; k++) {
    kept = indices[k] >= uint(E) ? kept + weights[k] : kept;
  }
  return T(y + T(I(I(x[at]) * I(kept))));
}

// What simdgroup `simdgroup` of SIMDGROUPS does; `slots` [TOP_K + 1, ROWS].
template <typename C,
          typename A,
          typename I,
          int ROWS,
          int SIMDGROUPS,
          int K,
          int N,
          int E,
          int TOP_K,
          bool FAST,
          typename T,
          typename Inner,
          typename Indices,
          typename Weights,
          typename Down,
          typename Shared,
          typename X>
void down_combine(Inner inner,
                  Indices indices,
                  Weights weights,
                  Down stack,
                  Shared shared,
                  X x,
                  float scale,
                  device T* out,
                  threadgroup T* slots,
                  int group,
                  uint token,
                  int simdgroup,
                  int lane) {
  const int row = group * ROWS, count = min(ROWS, N - row);
  const size_t first = size_t(token) * TOP_K;
  for (int task = simdgroup; task < TOP_K + Shared::kTasks; task += SIMDGROUPS) {
    if (task < TOP_K) {
      const uint expert = indices[first + task];
      T value = T(0);
      if (expert < uint(E)) {
        value = projected<T, ROWS, K, N, FAST>(inner + (first + task) * K, stack, expert, row,
                                               count, lane);
      }
      if (lane < count) {
        slots[task * ROWS + lane] = value;
      }
    } else {
      shared.template run<T, ROWS, N>(slots + TOP_K * ROWS, token, task - TOP_K, row, lane);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup == 0 && lane < count) {
    const size_t at = size_t(token) * N + row + lane;
    T y = T(weighted_sum<A, C, TOP_K, ROWS>(slots + lane, weights + first));
    y = with_identity<I, E, TOP_K>(x, at, indices + first, weights + first, y);
    y = T(y * T(scale));
    if constexpr (Shared::kTasks != 0) {
      y = T(y + gated(shared.logits, token, slots[TOP_K * ROWS + lane]));
    }
    out[at] = y;
  }
}

}  // namespace moefast

#ifndef MOEFAST_JIT

using namespace moefast;

template <typename T,
          typename W,
          typename A,
          int BITS,
          int GROUP,
          int K,
          int N,
          int E,
          int TOP_K,
          int ROWS,
          bool FAST>
[[kernel]] void combined_experts(const device T* inner [[buffer(0)]],
                                 const device uint* indices [[buffer(1)]],
                                 const device W* weights [[buffer(2)]],
                                 const device uint* down_weight [[buffer(3)]],
                                 const device T* down_scales [[buffer(4)]],
                                 const device T* down_biases [[buffer(5)]],
                                 device T* out [[buffer(6)]],
                                 uint3 position [[threadgroup_position_in_grid]],
                                 uint simdgroup [[simdgroup_index_in_threadgroup]],
                                 uint lane [[thread_index_in_simdgroup]]) {
  threadgroup T slots[TOP_K * ROWS];
  auto stack =
      stack_of<kAffine, BITS, GROUP>(down_weight, down_scales, down_biases, None{}, None{});
  down_combine<W, A, A, ROWS, TOP_K, K, N, E, TOP_K, FAST>(
      inner, indices, weights, stack, NoSharedDown{}, None{}, 1.0f, out, slots, int(position.y),
      position.z, int(simdgroup), int(lane));
}

// Granite 3.1 3B-A800M and GLM-4.5-Air.
template [[host_name("combined_experts_half_4bit_g64_512_1536")]] [[kernel]]
decltype(combined_experts<half, float, float, 4, 64, 512, 1536, 40, 8, 4, true>)
    combined_experts<half, float, float, 4, 64, 512, 1536, 40, 8, 4, true>;
template [[host_name("combined_experts_bfloat_4bit_g64_1408_4096")]] [[kernel]]
decltype(combined_experts<bfloat, float, float, 4, 64, 1408, 4096, 128, 8, 4, false>)
    combined_experts<bfloat, float, float, 4, 64, 1408, 4096, 128, 8, 4, false>;

#endif
