// A tile of a matrix product, by one threadgroup: up to HEIGHT rows of x times rows of one or two
// weight matrices of one expert, which are dequantised into threadgroup memory on the way.
#ifndef MOEFAST_TILE_H
#define MOEFAST_TILE_H

#include <metal_simdgroup_matrix>

#include "dequantize.h"

namespace moefast {

constexpr constant int kTileThreads = 128;
// Columns of x and of the weights that are in threadgroup memory at a time: two threads to a row of
// weights.
constexpr constant int kTileDepth = 2 * kDequantized;
// Rows of weights, of one matrix or two: 32 x 64 is what pays on Apple GPUs from 32 rows of x on.
constexpr constant int kTileWidth = kTileThreads / 2;

// How the four simdgroups share a tile of HEIGHT x WIDTH results, for each of the matrices. Side by
// side they all have work where a tile is not full. At 64 rows two below one another load 8 of 8x8
// for 16 products, four side by side would load 10; at 32 it is 6 for 8 either way.
template <int HEIGHT, int WIDTH>
struct TileShape {
  static constant constexpr const int kSimdgroupsDown = HEIGHT > 32 ? 2 : 1;
  static constant constexpr const int kSimdgroupsAcross = 4 / kSimdgroupsDown;
  // 8x8 matrices of one simdgroup.
  static constant constexpr const int kDown = HEIGHT / 8 / kSimdgroupsDown;
  static constant constexpr const int kAcross = WIDTH / 8 / kSimdgroupsAcross;
};

// Rows are apart so that eight of them begin in different banks.
template <typename T, int HEIGHT>
struct TileMemory {
  static constant constexpr const int kPitch = kTileDepth + 16 / int(sizeof(T));
  alignas(16) T x[HEIGHT * kPitch];
  alignas(16) T weights[kTileWidth * kPitch];
};

// A simdgroup's results: of each matrix kDown x kAcross of 8x8.
template <int HEIGHT, int MATRICES>
struct TileSums {
  using Shape = TileShape<HEIGHT, kTileWidth / MATRICES>;
  simdgroup_matrix<float, 8, 8> of[MATRICES][Shape::kDown][Shape::kAcross];
};

struct TileThread {
  uint index, simdgroup, lane;
};

// Where a simdgroup's 8x8 matrices are in the tile, and a lane's two neighbouring elements in
// those: the layout that MLX builds on too.
template <int HEIGHT, int MATRICES>
struct TilePlace {
  using Shape = typename TileSums<HEIGHT, MATRICES>::Shape;
  uint down, across, lane_row, lane_column;

  explicit TilePlace(TileThread at) thread
      : down(at.simdgroup / Shape::kSimdgroupsAcross * Shape::kDown * 8),
        across(at.simdgroup % Shape::kSimdgroupsAcross * Shape::kAcross * 8),
        lane_row((at.lane / 4 & 4) + at.lane / 2 % 4),
        lane_column((at.lane / 4 & 2) * 2 + at.lane % 2 * 2) {}

  uint row(int i) const thread { return down + i * 8 + lane_row; }

  uint column(int j, int element) const thread { return across + j * 8 + lane_column + element; }
};

// The part of a row of x that a thread copies in every step.
template <int HEIGHT>
struct TileShare {
  static constant constexpr const int kEach = HEIGHT * kTileDepth / kTileThreads;
  static inline uint row(uint thread_index) { return thread_index / (kTileDepth / kEach); }
  static inline uint column(uint thread_index) {
    return thread_index % (kTileDepth / kEach) * kEach;
  }
};

// Columns from `depth` on of a row of x, zeros where there are none. `rows` are there; of 8x8
// matrices that have none of them nothing is written.
template <int HEIGHT, int COLUMNS, typename T, typename Row>
inline void load_row(
    threadgroup TileMemory<T, HEIGHT>& memory, Row row, uint rows, uint depth, uint thread_index) {
  using Share = TileShare<HEIGHT>;
  const uint first = Share::column(thread_index), mine = Share::row(thread_index);
  const bool exists = mine < rows;
  if (mine / 8 * 8 >= rows) {
    return;
  }
  threadgroup T* to = memory.x + mine * TileMemory<T, HEIGHT>::kPitch + first;
#pragma unroll
  for (uint i = 0; i < Share::kEach; i++) {
    const uint column = depth + first + i;
    to[i] = exists && (COLUMNS % kTileDepth == 0 || column < COLUMNS) ? T(row[column]) : T(0);
  }
}

// One expert's matrix of a stack.
template <typename Stack>
struct Matrix {
  Stack stack;
  uint expert;
  float global_scale;
};

template <typename Stack>
inline Matrix<Stack> matrix_of(Stack stack, uint expert) {
  return {stack, expert, global_scale_of(stack.global_scale, expert)};
}

inline None matrix_of(None, uint) {
  return {};
}

// Loads kTileDepth columns, from `depth` on, of WIDTH rows of a matrix [ROWS, COLUMNS], from
// `first_row` on, a multiple of WIDTH: a thread loads its share, half of one row.
template <int WIDTH, int ROWS, int COLUMNS, int PITCH, typename T, typename Stack>
inline void load_weights(
    threadgroup T* to, Matrix<Stack> matrix, uint first_row, uint depth, uint share) {
  const uint row = first_row + share / 2, first = share % 2 * kDequantized;
  T values[kDequantized];
  if ((ROWS % WIDTH == 0 || row < ROWS) && (COLUMNS % kTileDepth == 0 || depth + first < COLUMNS)) {
    dequantize<COLUMNS>(matrix.stack, size_t(matrix.expert) * ROWS + row, depth + first,
                        matrix.global_scale, values);
  } else {
#pragma unroll
    for (int i = 0; i < kDequantized; i++) {
      values[i] = T(0);
    }
  }
#pragma unroll
  for (int i = 0; i < kDequantized; i++) {
    to[share / 2 * PITCH + first + i] = values[i];
  }
}

// Adds the products of what is in threadgroup memory. 8x8 matrices without one of the tile's `rows`
// rows are left out.
template <int HEIGHT, int MATRICES, typename T>
inline void multiply(threadgroup TileMemory<T, HEIGHT>& memory,
                     uint rows,
                     TilePlace<HEIGHT, MATRICES> place,
                     thread TileSums<HEIGHT, MATRICES>& sums) {
  using Shape = typename TileSums<HEIGHT, MATRICES>::Shape;
  constexpr int kPitch = TileMemory<T, HEIGHT>::kPitch;
#pragma unroll
  for (int k = 0; k < kTileDepth; k += 8) {
    simdgroup_matrix<T, 8, 8> x[Shape::kDown];
#pragma unroll
    for (int i = 0; i < Shape::kDown; i++) {
      if (place.down + i * 8 < rows) {
        simdgroup_load(x[i], memory.x + (place.down + i * 8) * kPitch + k, kPitch);
      }
    }
#pragma unroll
    for (int m = 0; m < MATRICES; m++) {
#pragma unroll
      for (int j = 0; j < Shape::kAcross; j++) {
        const uint row = m * (kTileWidth / MATRICES) + place.across + j * 8;
        simdgroup_matrix<T, 8, 8> w;
        simdgroup_load(w, memory.weights + row * kPitch + k, kPitch, ulong2(0, 0), true);
#pragma unroll
        for (int i = 0; i < Shape::kDown; i++) {
          if (place.down + i * 8 < rows) {
            simdgroup_multiply_accumulate(sums.of[m][i][j], x[i], w, sums.of[m][i][j]);
          }
        }
      }
    }
  }
}

template <int HEIGHT, int MATRICES>
inline void clear(thread TileSums<HEIGHT, MATRICES>& sums) {
  using Shape = typename TileSums<HEIGHT, MATRICES>::Shape;
#pragma unroll
  for (int m = 0; m < MATRICES; m++) {
#pragma unroll
    for (int i = 0; i < Shape::kDown; i++) {
#pragma unroll
      for (int j = 0; j < Shape::kAcross; j++) {
        sums.of[m][i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
      }
    }
  }
}

}  // namespace moefast

#endif
