// The experts of 2 to 128 tokens, in two launches: an expert's weights are read once for up to
// HEIGHT of its routes, 2, 4 or 8, in whatever order the tokens come.
//
// band_gate_up: activation(gate(x), up(x)) of every route, or activation(up(x)) without a gate.
//   x        T [tokens, K]; its rows are read where they are
//   indices  uint [tokens, TOP_K]: the expert of each route; from E on there is none
//   gate, up stacks [E, N, K] in formats of their own
//   inner    T [tokens * TOP_K, N]; routes without an expert are left out, and nobody reads theirs
// band_down: down(inner) of every route.
//   inner    T [tokens * TOP_K, K]
//   down     a stack [E, N, K]
//   out      T [tokens * TOP_K, N]; 0 for routes without an expert
//
// Launch: x the lanes, y SIMDGROUPS simdgroups for every SIMDGROUPS * ROWS rows of N, z a
// threadgroup for each expert and one for routes without; or, where there are not more routes than
// experts, one for each route, of which the expert's first does the work and others return. A
// threadgroup finds its routes by reading all indices, so no launch has to sort them before. A
// simdgroup owns ROWS rows of its expert and goes over the routes, HEIGHT at a time.
//
// Memory: per HEIGHT routes of an expert each weight, scale and offset once; x (inner) once for
// each simdgroup; indices once for each threadgroup. Threadgroup: 256 TOP_K bytes and a few.
// Equal to the bit to MLX's gather_qmv (FAST: gather_qmv_fast) of each route, expert biases and the
// compiled activation: to gate_up.metal and down.metal.
#include "activation.h"
#include "band.h"

namespace moefast {

// Which expert threadgroup `slot` has.
template <int E, typename Indices>
inline uint expert_of_slot(Indices indices, uint routes, uint slot) {
  return routes <= uint(E) ? expert_of<E>(indices, slot) : slot;
}

// How many routes threadgroup `slot` works on: all those of the expert, or none.
template <int E, int TOP_K, int SIMDGROUPS, typename Indices>
inline uint routes_of_slot(Indices indices,
                           uint routes,
                           uint slot,
                           uint expert,
                           threadgroup BandMemory<TOP_K, SIMDGROUPS>& memory,
                           BandThread at) {
  return find_routes<E>(indices, routes, expert, routes <= uint(E) ? slot : 0, memory, at);
}

// Routes `first` and after; DIVISOR of them share a vector of K elements.
template <int HEIGHT, int DIVISOR, int K, int TOP_K, int SIMDGROUPS>
inline BandTile<HEIGHT> tile_of(const threadgroup BandMemory<TOP_K, SIMDGROUPS>& memory,
                                uint first,
                                uint count) {
  BandTile<HEIGHT> tile;
  tile.rows = min(uint(HEIGHT), count - first);
#pragma unroll
  for (int i = 0; i < HEIGHT; i++) {
    tile.at[i] = uint(i) < tile.rows ? memory.routes[first + i] / DIVISOR * K : 0;
  }
  return tile;
}

// Activations of a tile's vectors and `count` rows of `expert` from `row` on; lane i * ROWS + r has
// that of vector i and row r.
template <typename T,
          int ROWS,
          int K,
          int N,
          bool GATE_FAST,
          bool UP_FAST,
          int HEIGHT,
          typename X,
          typename Gate,
          typename Up,
          typename F>
inline T band_activated(X x,
                        const thread BandTile<HEIGHT>& tile,
                        Gate gate,
                        Up up,
                        F f,
                        uint expert,
                        int row,
                        int count,
                        int lane) {
  auto gate_rows = rows_of<GATE_FAST, K, N>(gate, expert, row);
  auto up_rows = rows_of<UP_FAST, K, N>(up, expert, row);
  BandSums<HEIGHT, ROWS> sums[2] = {};
  band_products_of_both<ROWS, N, K>(x, tile, gate_rows, up_rows, count, lane, sums);
  const T g = of_lane<T>(sums[0], tile.rows, gate_rows.global_scale, lane);
  const T u = of_lane<T>(sums[1], tile.rows, up_rows.global_scale, lane);
  if (lane / ROWS >= int(tile.rows) || lane % ROWS >= count) {
    return T(0);
  }
  const size_t at = size_t(expert) * N + row + lane % ROWS;
  return activate(f, with_bias(gate.bias, at, g), with_bias(up.bias, at, u));
}

// The same of one matrix, without an activation.
template <typename T, int ROWS, int K, int N, bool FAST, int HEIGHT, typename X, typename S>
inline T band_projected(
    X x, const thread BandTile<HEIGHT>& tile, S stack, uint expert, int row, int count, int lane) {
  auto rows = rows_of<FAST, K, N>(stack, expert, row);
  BandSums<HEIGHT, ROWS> sums[1] = {};
  band_products<1, ROWS, N, K>(x, tile, &rows, count, lane, sums);
  const T value = of_lane<T>(sums[0], tile.rows, rows.global_scale, lane);
  if (lane / ROWS >= int(tile.rows) || lane % ROWS >= count) {
    return T(0);
  }
  return with_bias(stack.bias, size_t(expert) * N + row + lane % ROWS, value);
}

template <typename T,
          int ROWS,
          int K,
          int N,
          bool GATE_FAST,
          bool UP_FAST,
          int HEIGHT,
          typename X,
          typename Up,
          typename F>
inline T band_activated(X x,
                        const thread BandTile<HEIGHT>& tile,
                        None,
                        Up up,
                        F f,
                        uint expert,
                        int row,
                        int count,
                        int lane) {
  return activate(f, band_projected<T, ROWS, K, N, UP_FAST>(x, tile, up, expert, row, count, lane));
}

// Each lane's value to the route whose it is.
template <int ROWS, int N, typename T, int TOP_K, int SIMDGROUPS>
inline void store_tile(T value,
                       device T* out,
                       const threadgroup BandMemory<TOP_K, SIMDGROUPS>& memory,
                       uint first,
                       uint rows,
                       int row,
                       int count,
                       int lane) {
  if (lane / ROWS < int(rows) && lane % ROWS < count) {
    out[size_t(memory.routes[first + lane / ROWS]) * N + row + lane % ROWS] = value;
  }
}

// What a threadgroup does: `group` of those along y and `slot` along z.
template <int HEIGHT,
          int ROWS,
          int K,
          int N,
          int E,
          bool GATE_FAST,
          bool UP_FAST,
          typename T,
          int TOP_K,
          int SIMDGROUPS,
          typename X,
          typename Indices,
          typename Gate,
          typename Up,
          typename F>
inline void band_gate_up(X x,
                         Indices indices,
                         uint routes,
                         Gate gate,
                         Up up,
                         F f,
                         device T* inner,
                         threadgroup BandMemory<TOP_K, SIMDGROUPS>& memory,
                         uint group,
                         uint slot,
                         BandThread at) {
  const uint expert = expert_of_slot<E>(indices, routes, slot);
  if (expert == uint(E)) {
    return;
  }
  const uint its = routes_of_slot<E>(indices, routes, slot, expert, memory, at);
  const int row = int(group * SIMDGROUPS + at.simdgroup) * ROWS, count = min(ROWS, N - row);
  const int lane = int(at.lane);
  for (uint first = 0; first < its && count > 0; first += HEIGHT) {
    const auto tile = tile_of<HEIGHT, TOP_K, K>(memory, first, its);
    const T value = band_activated<T, ROWS, K, N, GATE_FAST, UP_FAST>(x, tile, gate, up, f, expert,
                                                                      row, count, lane);
    store_tile<ROWS, N>(value, inner, memory, first, tile.rows, row, count, lane);
  }
}

template <int HEIGHT,
          int ROWS,
          int K,
          int N,
          int E,
          bool FAST,
          typename T,
          int TOP_K,
          int SIMDGROUPS,
          typename Inner,
          typename Indices,
          typename Down>
inline void band_down(Inner inner,
                      Indices indices,
                      uint routes,
                      Down stack,
                      device T* out,
                      threadgroup BandMemory<TOP_K, SIMDGROUPS>& memory,
                      uint group,
                      uint slot,
                      BandThread at) {
  const uint expert = expert_of_slot<E>(indices, routes, slot);
  const uint its = routes_of_slot<E>(indices, routes, slot, expert, memory, at);
  const int row = int(group * SIMDGROUPS + at.simdgroup) * ROWS, count = min(ROWS, N - row);
  const int lane = int(at.lane);
  for (uint first = 0; first < its && count > 0; first += HEIGHT) {
    const auto tile = tile_of<HEIGHT, 1, K>(memory, first, its);
    T value = T(0);
    if (expert < uint(E)) {
      value = band_projected<T, ROWS, K, N, FAST>(inner, tile, stack, expert, row, count, lane);
    }
    store_tile<ROWS, N>(value, out, memory, first, tile.rows, row, count, lane);
  }
}

}  // namespace moefast

#ifndef MOEFAST_JIT

using namespace moefast;

// 4-bit weights in groups of 64, scales and biases like x.
template <typename T, int HEIGHT, int K, int N, int E, int TOP_K, bool FAST>
[[kernel]] void band_gate_up_affine4(const device T* x [[buffer(0)]],
                                     const device uint* indices [[buffer(1)]],
                                     const constant uint& routes [[buffer(2)]],
                                     const device uint* gate_weight [[buffer(3)]],
                                     const device T* gate_scales [[buffer(4)]],
                                     const device T* gate_biases [[buffer(5)]],
                                     const device uint* up_weight [[buffer(6)]],
                                     const device T* up_scales [[buffer(7)]],
                                     const device T* up_biases [[buffer(8)]],
                                     device T* inner [[buffer(9)]],
                                     uint3 position [[threadgroup_position_in_grid]],
                                     uint simdgroup [[simdgroup_index_in_threadgroup]],
                                     uint lane [[thread_index_in_simdgroup]]) {
  threadgroup BandMemory<TOP_K, 4> memory;
  band_gate_up<HEIGHT, 2, K, N, E, FAST, FAST>(
      x, indices, routes,
      stack_of<kAffine, 4, 64>(gate_weight, gate_scales, gate_biases, None{}, None{}),
      stack_of<kAffine, 4, 64>(up_weight, up_scales, up_biases, None{}, None{}), Swiglu{}, inner,
      memory, position.y, position.z, {simdgroup, lane});
}

template <typename T, int HEIGHT, int K, int N, int E, int TOP_K, bool FAST>
[[kernel]] void band_down_affine4(const device T* inner [[buffer(0)]],
                                  const device uint* indices [[buffer(1)]],
                                  const constant uint& routes [[buffer(2)]],
                                  const device uint* weight [[buffer(3)]],
                                  const device T* scales [[buffer(4)]],
                                  const device T* biases [[buffer(5)]],
                                  device T* out [[buffer(6)]],
                                  uint3 position [[threadgroup_position_in_grid]],
                                  uint simdgroup [[simdgroup_index_in_threadgroup]],
                                  uint lane [[thread_index_in_simdgroup]]) {
  threadgroup BandMemory<TOP_K, 4> memory;
  band_down<HEIGHT, 4, K, N, E, FAST>(
      inner, indices, routes, stack_of<kAffine, 4, 64>(weight, scales, biases, None{}, None{}), out,
      memory, position.y, position.z, {simdgroup, lane});
}

// Qwen1.5-MoE-A2.7B.
// clang-format off
template [[host_name("band_gate_up_h4_e60_k4_2048_1408_bfloat")]] [[kernel]]
decltype(band_gate_up_affine4<bfloat, 4, 2048, 1408, 60, 4, true>) band_gate_up_affine4<bfloat, 4, 2048, 1408, 60, 4, true>;
template [[host_name("band_down_h4_e60_k4_1408_2048_bfloat")]] [[kernel]]
decltype(band_down_affine4<bfloat, 4, 1408, 2048, 60, 4, false>) band_down_affine4<bfloat, 4, 1408, 2048, 60, 4, false>;
// clang-format on

#endif
