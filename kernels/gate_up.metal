// Gate and up projections and the activation between them and down, for every route of a few
// tokens, in one launch.
//
//   x        T [tokens, K]
//   indices  uint [tokens, TOP_K]: the expert of each route; one that does not exist gives 0
//   gate, up stacks [E, N, K] in formats of their own; no gate for activations without one
//   inner    T [tokens * TOP_K, N]
//
// Grid: x the lanes, y SIMDGROUPS simdgroups for every SIMDGROUPS * ROWS rows of N, z a threadgroup
// for each route. A simdgroup owns ROWS rows of both matrices of one route's expert.
// Memory: each weight, scale and offset of the chosen experts is read once per route; x once for
// each simdgroup. No threadgroup memory.
// Equal to the bit to MLX's gather_qmv (FAST: gather_qmv_fast) of both, expert biases, and the
// compiled activation.
//
// `shared_gate_up` is the same for the shared expert: matrices [N, K], a token where there was a
// route, inner T [tokens, N]. It also computes the logit of the output gate, T [tokens], where
// there is one, by the simdgroup after the last rows. It may share a launch with `gate_up`.
#include "activation.h"
#include "dot.h"

namespace moefast {

// ROWS rows of one expert, from `row` on, of which `count` are there. Lane r has the value of row
// r.
template <typename T,
          int ROWS,
          int K,
          int N,
          bool GATE_FAST,
          bool UP_FAST,
          typename X,
          typename Gate,
          typename Up,
          typename F>
T activated(X x, Gate gate, Up up, F f, uint expert, int row, int count, int lane) {
  auto gate_rows = rows_of<GATE_FAST, K, N>(gate, expert, row);
  auto up_rows = rows_of<UP_FAST, K, N>(up, expert, row);
  float gate_sums[ROWS] = {}, up_sums[ROWS] = {};
  products<ROWS, N, K>(x, gate_rows, up_rows, count, lane, gate_sums, up_sums);
  const T g = of_lane<T>(gate_sums, gate_rows.global_scale, lane);
  const T u = of_lane<T>(up_sums, up_rows.global_scale, lane);
  if (lane >= count) {
    return T(0);
  }
  const size_t at = size_t(expert) * N + row + lane;
  return activate(f, with_bias(gate.bias, at, g), with_bias(up.bias, at, u));
}

template <typename T,
          int ROWS,
          int K,
          int N,
          bool GATE_FAST,
          bool UP_FAST,
          typename X,
          typename Up,
          typename F>
T activated(X x, None, Up up, F f, uint expert, int row, int count, int lane) {
  return activate(f, projected<T, ROWS, K, N, UP_FAST>(x, up, expert, row, count, lane));
}

// What simdgroup `position.y` of route `position.z` does.
template <typename T,
          int ROWS,
          int K,
          int N,
          int E,
          int TOP_K,
          bool GATE_FAST,
          bool UP_FAST,
          typename X,
          typename Indices,
          typename Gate,
          typename Up,
          typename F>
void gate_up(
    X x, Indices indices, Gate gate, Up up, F f, device T* inner, int group, uint route, int lane) {
  const int row = group * ROWS, count = min(ROWS, N - row);
  if (count <= 0) {
    return;
  }
  const uint expert = indices[route];
  T value = T(0);
  if (expert < uint(E)) {
    value = activated<T, ROWS, K, N, GATE_FAST, UP_FAST>(x + size_t(route / TOP_K) * K, gate, up, f,
                                                         expert, row, count, lane);
  }
  if (lane < count) {
    inner[size_t(route) * N + row + lane] = value;
  }
}

template <typename T, int K, bool FAST, typename X>
void output_gate(X, None, None, uint, int) {}

template <typename T, int K, bool FAST, typename X, typename Gate>
void output_gate(X x, Gate gate, device T* logits, uint token, int lane) {
  const T logit = projected<T, 1, K, 1, FAST>(x, gate, 0, 0, 1, lane);
  if (lane == 0) {
    logits[token] = logit;
  }
}

// What simdgroup `group` of a token does.
template <typename T,
          int ROWS,
          int K,
          int N,
          bool GATE_FAST,
          bool UP_FAST,
          bool OUTPUT_FAST,
          typename X,
          typename Gate,
          typename Up,
          typename F,
          typename OutputGate,
          typename Logits>
void shared_gate_up(X x,
                    Gate gate,
                    Up up,
                    F f,
                    OutputGate output,
                    device T* inner,
                    Logits logits,
                    int group,
                    uint token,
                    int lane) {
  const int row = group * ROWS, count = min(ROWS, N - row);
  auto mine = x + size_t(token) * K;
  if (count > 0) {
    const T value =
        activated<T, ROWS, K, N, GATE_FAST, UP_FAST>(mine, gate, up, f, 0, row, count, lane);
    if (lane < count) {
      inner[size_t(token) * N + row + lane] = value;
    }
  } else if (count > -ROWS) {
    output_gate<T, K, OUTPUT_FAST>(mine, output, logits, token, lane);
  }
}

}  // namespace moefast

#ifndef MOEFAST_JIT

using namespace moefast;

// Affine weights, as their buffers are bound.
template <typename T, int BITS, int GROUP, int K, int N, int E, int TOP_K, int ROWS, bool FAST>
[[kernel]] void swiglu_experts(const device T* x [[buffer(0)]],
                               const device uint* indices [[buffer(1)]],
                               const device uint* gate_weight [[buffer(2)]],
                               const device T* gate_scales [[buffer(3)]],
                               const device T* gate_biases [[buffer(4)]],
                               const device uint* up_weight [[buffer(5)]],
                               const device T* up_scales [[buffer(6)]],
                               const device T* up_biases [[buffer(7)]],
                               device T* inner [[buffer(8)]],
                               uint3 position [[threadgroup_position_in_grid]],
                               uint simdgroups [[simdgroups_per_threadgroup]],
                               uint simdgroup [[simdgroup_index_in_threadgroup]],
                               uint lane [[thread_index_in_simdgroup]]) {
  auto gate = stack_of<kAffine, BITS, GROUP>(gate_weight, gate_scales, gate_biases, None{}, None{});
  auto up = stack_of<kAffine, BITS, GROUP>(up_weight, up_scales, up_biases, None{}, None{});
  gate_up<T, ROWS, K, N, E, TOP_K, FAST, FAST>(x, indices, gate, up, Swiglu{}, inner,
                                               int(position.y * simdgroups + simdgroup), position.z,
                                               int(lane));
}

// Granite 3.1 3B-A800M and GLM-4.5-Air.
template [[host_name("swiglu_experts_half_4bit_g64_1536_512")]] [[kernel]]
decltype(swiglu_experts<half, 4, 64, 1536, 512, 40, 8, 4, true>)
    swiglu_experts<half, 4, 64, 1536, 512, 40, 8, 4, true>;
template [[host_name("swiglu_experts_bfloat_4bit_g64_4096_1408")]] [[kernel]]
decltype(swiglu_experts<bfloat, 4, 64, 4096, 1408, 128, 8, 4, true>)
    swiglu_experts<bfloat, 4, 64, 4096, 1408, 128, 8, 4, true>;

#endif
