// The experts of a large step, as two grouped products over a plan (plan.metal). A tile is up to
// HEIGHT routes of one expert; its threadgroup reads the expert's weights once.
//
// grouped_gate_up: activation(x gate^T, x up^T) of every route, or activation(x up^T) without a
// gate.
//   x [tokens, HIDDEN] T; its rows are read where they are, that of a route r is r / TOP_K
//   order [routes], tiles [n, 3] uint32: the plan's
//   gate, up [EXPERTS, WIDTH, HIDDEN], any format (dequantize.h)
//   inner [routes, WIDTH] T, in the plan's order: what reads it next reads it in that order. Routes
//   of experts that do not exist are left out, and nobody reads theirs.
// grouped_down: inner down^T, each row to its route, so that a token's rows are neighbours for
// combine.metal.
//   down [EXPERTS, HIDDEN, WIDTH], any format
//   out [routes, HIDDEN] T; 0 for routes of experts that do not exist
//
// Launch: threadgroups of 128 threads, four simdgroups; x counts columns of the result, 64 at a
// time (32 where there are two matrices), y counts tiles; tiles without rows return at once.
// Neighbouring threadgroups share rows of x. A simdgroup owns all rows of a tile of 32 and a fourth
// of its columns, or half of both of a tile of 64.
//
// Memory: a tile reads its packed weights once, and its rows of x once for each 64 (32) columns.
// Threadgroup: (HEIGHT + 64) rows of 32 values and 16 bytes: 18 KB for 64 rows of float, 7.5 KB for
// 32 of half.
//
// Weights are rounded to T, products added in float, column after column: the bits of a route
// depend neither on HEIGHT nor on other routes. What a projection gives is rounded to T before and
// after its bias is added, and so is every step of the activation:
// moefast/backends/reference/experts.py, within the bounds of moefast/testing.py.
#include "activation.h"
#include "tile.h"

namespace moefast {

// A tile of the plan.
struct PlanTile {
  uint expert, first, rows;
};

template <typename Tiles>
inline PlanTile tile_at(Tiles tiles, uint index) {
  return {tiles[3 * index], tiles[3 * index + 1], tiles[3 * index + 2]};
}

template <typename Gate>
struct Matrices {
  static constant constexpr const int kCount = 2;
};

template <>
struct Matrices<None> {
  static constant constexpr const int kCount = 1;
};

// Rows of both matrices of an expert, half of the threads each, or of the only one.
template <int ROWS, int COLUMNS, typename T, int HEIGHT, typename Gate, typename Up>
inline void load_both(threadgroup TileMemory<T, HEIGHT>& memory,
                      Gate gate,
                      Up up,
                      uint first_row,
                      uint depth,
                      uint thread_index) {
  constexpr int kEach = kTileWidth / 2, kPitch = TileMemory<T, HEIGHT>::kPitch;
  constexpr uint kThreads = kTileThreads / 2;  // whole simdgroups
  if (thread_index < kThreads) {
    load_weights<kEach, ROWS, COLUMNS, kPitch>(memory.weights, gate, first_row, depth,
                                               thread_index);
  } else {
    load_weights<kEach, ROWS, COLUMNS, kPitch>(memory.weights + kEach * kPitch, up, first_row,
                                               depth, thread_index - kThreads);
  }
}

template <int ROWS, int COLUMNS, typename T, int HEIGHT, typename Up>
inline void load_both(threadgroup TileMemory<T, HEIGHT>& memory,
                      None,
                      Up up,
                      uint first_row,
                      uint depth,
                      uint thread_index) {
  load_weights<kTileWidth, ROWS, COLUMNS, TileMemory<T, HEIGHT>::kPitch>(
      memory.weights, up, first_row, depth, thread_index);
}

// The activation of an element of the results, whose sums are still without bias.
template <typename T, typename Activation, typename Gate, typename Up, typename Sums>
inline T activated(
    Activation activation, Gate gate, Up up, size_t row, thread Sums& sums, int i, int j, int e) {
  const T g = with_bias(gate.bias, row, T(sums.of[0][i][j].thread_elements()[e]));
  const T u = with_bias(up.bias, row, T(sums.of[1][i][j].thread_elements()[e]));
  return activate(activation, g, u);
}

template <typename T, typename Activation, typename Up, typename Sums>
inline T activated(
    Activation activation, None, Up up, size_t row, thread Sums& sums, int i, int j, int e) {
  return activate(activation, with_bias(up.bias, row, T(sums.of[0][i][j].thread_elements()[e])));
}

template <int EXPERTS,
          int TOP_K,
          int HIDDEN,
          int WIDTH,
          int HEIGHT,
          typename T,
          typename Activation,
          typename Gate,
          typename Up,
          typename X,
          typename Order,
          typename Tiles>
inline void grouped_gate_up(Activation activation,
                            Gate gate,
                            Up up,
                            X x,
                            Order order,
                            Tiles tiles,
                            device T* inner,
                            threadgroup TileMemory<T, HEIGHT>& memory,
                            uint2 group,
                            TileThread at) {
  constexpr int kMatrices = Matrices<Gate>::kCount, kColumns = kTileWidth / kMatrices;
  using Shape = typename TileSums<HEIGHT, kMatrices>::Shape;
  const PlanTile tile = tile_at(tiles, group.y);
  if (tile.rows == 0 || tile.expert == EXPERTS) {
    return;
  }
  const uint first_column = group.x * kColumns;
  const uint mine = TileShare<HEIGHT>::row(at.index);
  const bool exists = mine < tile.rows;
  auto row = x + (exists ? size_t(order[tile.first + mine] / TOP_K) * HIDDEN : 0);
  const auto gate_matrix = matrix_of(gate, tile.expert);
  const auto up_matrix = matrix_of(up, tile.expert);
  const TilePlace<HEIGHT, kMatrices> place(at);
  TileSums<HEIGHT, kMatrices> sums;
  clear(sums);
  for (uint depth = 0; depth < HIDDEN; depth += kTileDepth) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    load_row<HEIGHT, HIDDEN>(memory, row, tile.rows, depth, at.index);
    load_both<WIDTH, HIDDEN>(memory, gate_matrix, up_matrix, first_column, depth, at.index);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    multiply(memory, tile.rows, place, sums);
  }
#pragma unroll
  for (int i = 0; i < Shape::kDown; i++) {
#pragma unroll
    for (int j = 0; j < Shape::kAcross; j++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const uint r = place.row(i), column = first_column + place.column(j, e);
        if (r < tile.rows && (WIDTH % kColumns == 0 || column < WIDTH)) {
          inner[size_t(tile.first + r) * WIDTH + column] = activated<T>(
              activation, gate, up, size_t(tile.expert) * WIDTH + column, sums, i, j, e);
        }
      }
    }
  }
}

template <int EXPERTS,
          int HIDDEN,
          int WIDTH,
          int HEIGHT,
          typename T,
          typename Down,
          typename Inner,
          typename Order,
          typename Tiles>
inline void grouped_down(Down down,
                         Inner inner,
                         Order order,
                         Tiles tiles,
                         device T* out,
                         threadgroup TileMemory<T, HEIGHT>& memory,
                         uint2 group,
                         TileThread at) {
  using Shape = typename TileSums<HEIGHT, 1>::Shape;
  const PlanTile tile = tile_at(tiles, group.y);
  if (tile.rows == 0) {
    return;
  }
  const uint first_column = group.x * kTileWidth;
  const TilePlace<HEIGHT, 1> place(at);
  TileSums<HEIGHT, 1> sums;
  clear(sums);
  if (tile.expert < EXPERTS) {
    const uint mine = TileShare<HEIGHT>::row(at.index);
    const bool exists = mine < tile.rows;
    const auto matrix = matrix_of(down, tile.expert);
    auto row = inner + (exists ? size_t(tile.first + mine) * WIDTH : 0);
    for (uint depth = 0; depth < WIDTH; depth += kTileDepth) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
      load_row<HEIGHT, WIDTH>(memory, row, tile.rows, depth, at.index);
      load_weights<kTileWidth, HIDDEN, WIDTH, TileMemory<T, HEIGHT>::kPitch>(
          memory.weights, matrix, first_column, depth, at.index);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      multiply(memory, tile.rows, place, sums);
    }
  }
#pragma unroll
  for (int i = 0; i < Shape::kDown; i++) {
    const uint r = place.row(i);
    if (r >= tile.rows) {
      continue;
    }
    device T* to = out + size_t(order[tile.first + r]) * HIDDEN;
#pragma unroll
    for (int j = 0; j < Shape::kAcross; j++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const uint column = first_column + place.column(j, e);
        if (HIDDEN % kTileWidth != 0 && column >= HIDDEN) {
          continue;
        }
        const T value = T(sums.of[0][i][j].thread_elements()[e]);
        to[column] = tile.expert < EXPERTS
                         ? with_bias(down.bias, size_t(tile.expert) * HIDDEN + column, value)
                         : T(0);
      }
    }
  }
}

}  // namespace moefast

#ifndef MOEFAST_JIT

using namespace moefast;

// 4-bit weights in groups of 64, scales and biases like x.
template <typename T, int EXPERTS, int TOP_K, int HIDDEN, int WIDTH, int HEIGHT>
[[kernel]] void grouped_gate_up_affine4(const device T* x [[buffer(0)]],
                                        const device uint* order [[buffer(1)]],
                                        const device uint* tiles [[buffer(2)]],
                                        const device uint* gate_weight [[buffer(3)]],
                                        const device T* gate_scales [[buffer(4)]],
                                        const device T* gate_biases [[buffer(5)]],
                                        const device uint* up_weight [[buffer(6)]],
                                        const device T* up_scales [[buffer(7)]],
                                        const device T* up_biases [[buffer(8)]],
                                        device T* inner [[buffer(9)]],
                                        uint3 group [[threadgroup_position_in_grid]],
                                        uint index [[thread_index_in_threadgroup]],
                                        uint simdgroup [[simdgroup_index_in_threadgroup]],
                                        uint lane [[thread_index_in_simdgroup]]) {
  threadgroup TileMemory<T, HEIGHT> memory;
  moefast::grouped_gate_up<EXPERTS, TOP_K, HIDDEN, WIDTH>(
      Swiglu{}, stack_of<kAffine, 4, 64>(gate_weight, gate_scales, gate_biases, None{}, None{}),
      stack_of<kAffine, 4, 64>(up_weight, up_scales, up_biases, None{}, None{}), x, order, tiles,
      inner, memory, group.xy, {index, simdgroup, lane});
}

template <typename T, int EXPERTS, int HIDDEN, int WIDTH, int HEIGHT>
[[kernel]] void grouped_down_affine4(const device T* inner [[buffer(0)]],
                                     const device uint* order [[buffer(1)]],
                                     const device uint* tiles [[buffer(2)]],
                                     const device uint* weight [[buffer(3)]],
                                     const device T* scales [[buffer(4)]],
                                     const device T* biases [[buffer(5)]],
                                     device T* out [[buffer(6)]],
                                     uint3 group [[threadgroup_position_in_grid]],
                                     uint index [[thread_index_in_threadgroup]],
                                     uint simdgroup [[simdgroup_index_in_threadgroup]],
                                     uint lane [[thread_index_in_simdgroup]]) {
  threadgroup TileMemory<T, HEIGHT> memory;
  moefast::grouped_down<EXPERTS, HIDDEN, WIDTH>(
      stack_of<kAffine, 4, 64>(weight, scales, biases, None{}, None{}), inner, order, tiles, out,
      memory, group.xy, {index, simdgroup, lane});
}

// Qwen1.5-MoE-A2.7B.
// clang-format off
template [[host_name("grouped_gate_up_e60_k4_2048_1408_h32_bfloat")]] [[kernel]]
decltype(grouped_gate_up_affine4<bfloat, 60, 4, 2048, 1408, 32>) grouped_gate_up_affine4<bfloat, 60, 4, 2048, 1408, 32>;
template [[host_name("grouped_down_e60_2048_1408_h32_bfloat")]] [[kernel]]
decltype(grouped_down_affine4<bfloat, 60, 2048, 1408, 32>) grouped_down_affine4<bfloat, 60, 2048, 1408, 32>;
// clang-format on

#endif
