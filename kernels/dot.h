// Products of one vector with rows of a weight matrix, by the lanes of a simdgroup, in every
// format: what MLX's (gather_)qmv and (gather_)qmv_fast compute, to the bit.
//
// A block of the row is kLanes chunks, one for each lane, of kValues values: 8 bytes of weights
// (FAST) or 4. Which of the two MLX takes depends on shapes and is decided on the host. Within a
// chunk values are added up in the order below, chunks of a lane one after another, then the lanes
// (simd_sum). Free of all that are the rows of a simdgroup and who shares x.
// x is scaled down and codes are masked where they stand, as in MLX: both are exact.
#ifndef MOEFAST_DOT_H
#define MOEFAST_DOT_H

#include "dequantize.h"

namespace moefast {

// Values that fill whole bytes together, in MLX's words a pack.
constexpr int pack_values(int bits) {
  return bits == 3 || bits == 5 ? 8 : bits == 6 ? 4 : 32 / bits;
}

constexpr int lane_values(int mode, int bits, bool fast) {
  return mode == kPlain ? 8 : pack_values(bits) * (fast && bits != 2 ? 2 : 1);
}

// A lane's part of x, and its sum, which meets the offsets of affine weights.
template <int MODE, int BITS, int VALUES>
struct Chunk {
  float x[VALUES];
  float sum;

  // Of a plain matrix the last chunk may be short: `left` values are there.
  template <typename X>
  void load(X from, int left) thread {
    constexpr int TOGETHER = BITS == 8 ? 1 : BITS == 3 || BITS == 5 ? 8 : 4;
    constexpr int UNIT = BITS == 4 ? 16 : 8;  // bits of a word in which codes are masked
#pragma unroll
    for (int i = 0; i < VALUES; i++) {
      x[i] = MODE != kPlain || i < left ? float(from[i]) : 0.0f;
    }
    if constexpr (MODE == kAffine) {
      sum = 0;
#pragma unroll
      for (int i = 0; i < VALUES; i += TOGETHER) {
        float part = x[i];
#pragma unroll
        for (int j = 1; j < TOGETHER; j++) {
          part = part + x[i + j];
        }
        sum = sum + part;
      }
#pragma unroll
      for (int i = 0; i < VALUES; i++) {
        x[i] = x[i] * (1.0f / float(1 << i * BITS % UNIT));
      }
    }
  }
};

// The bytes of a lane's chunk of weights, in the widest words that they are aligned to.
template <typename Word, int COUNT>
struct Words {
  Word at[COUNT];

  template <typename Weight>
  void load(Weight weight, int byte) thread {
    auto from = memory_as<Word>(weight) + byte / int(sizeof(Word));
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      at[i] = from[i];
    }
  }

  // Bits from `bit` on, as far as the word goes.
  uint from(int bit) const thread {
    constexpr int WIDTH = 8 * sizeof(Word);
    return uint(at[bit / WIDTH]) >> bit % WIDTH;
  }
};

template <int BYTES,
          int ALIGNED = BYTES % 4 == 0   ? 4
                        : BYTES % 2 == 0 ? 2
                                         : 1>
struct ChunkWords : Words<uint, BYTES / 4> {};

template <int BYTES>
struct ChunkWords<BYTES, 2> : Words<ushort, BYTES / 2> {};

template <int BYTES>
struct ChunkWords<BYTES, 1> : Words<uchar, BYTES> {};

// The element with `code` in a floating-point format.
template <int BITS>
float element(uint code) {
  return BITS == 8 ? e4m3(code & 255) : e2m1(code & 15);
}

// Four products, as Apple's compiler fuses MLX's sum of them.
template <typename C>
float sum_of_four(const thread C& chunk, int i, float a, float b, float c, float d) {
  float sum = chunk.x[i + 1] * b;
  sum = fma(chunk.x[i], a, sum);
  sum = fma(chunk.x[i + 2], c, sum);
  return fma(chunk.x[i + 3], d, sum);
}

// The chunk times codes as they stand in their words (affine), or times elements.
template <int MODE, int BITS, int VALUES, typename W>
float product(const thread W& words, const thread Chunk<MODE, BITS, VALUES>& chunk) {
  constexpr uint MASK = (1u << BITS) - 1;
  float sum = 0;
  if constexpr (BITS == 2 || BITS == 4) {
#pragma unroll
    for (int i = 0; i < VALUES; i += 4) {
      uint four = words.from(i * BITS);
      if constexpr (MODE == kAffine) {
        sum = sum + sum_of_four(chunk, i, float(four & MASK), float(four & MASK << BITS),
                                float(four & MASK << 2 * BITS), float(four & MASK << 3 * BITS));
      } else {
        sum = sum + sum_of_four(chunk, i, element<BITS>(four), element<BITS>(four >> BITS),
                                element<BITS>(four >> 2 * BITS), element<BITS>(four >> 3 * BITS));
      }
    }
  } else if constexpr (MODE != kAffine) {
#pragma unroll
    for (int i = 0; i < VALUES; i++) {
      sum = fma(chunk.x[i], element<BITS>(words.from(i * BITS)), sum);
    }
  } else {
#pragma unroll
    for (int i = 0; i < VALUES; i++) {
      const int bit = i * BITS, shift = bit % 8;
      const int here = min(BITS, 8 - shift);  // bits of it in its first byte
      const uint mask = ((1u << here) - 1) << shift;
      sum = fma(float(words.from(bit - shift) & mask), chunk.x[i], sum);
      if (here < BITS) {
        const uint rest = words.from(bit - shift + 8) & ((1u << (BITS - here)) - 1);
        sum = fma(float(rest), chunk.x[i] * 256.0f, sum);
      }
    }
  }
  return sum;
}

// Rows of a stack's matrices [N, K], from a given one on, as a simdgroup reads them.
template <bool FAST, int K, typename S>
struct Rows;

template <bool FAST,
          int K,
          int MODE,
          int BITS,
          int GROUP,
          typename Weight,
          typename Scales,
          typename Biases,
          typename Bias,
          typename GlobalScale>
struct Rows<FAST, K, Stack<MODE, BITS, GROUP, Weight, Scales, Biases, Bias, GlobalScale>> {
  static constexpr constant int kMode = MODE;
  static constexpr constant int kBits = BITS;
  static constexpr constant int kValues = lane_values(MODE, BITS, FAST);
  static constexpr constant int kBlock = kValues * kLanes;
  using Part = Chunk<MODE, BITS, kValues>;

  Weight weight;
  Scales scales;
  Biases biases;
  float global_scale;

  // The part of row `row` that stands at `column`, times the chunk of x that does.
  float dot(int row, int column, const thread Part& chunk) const thread {
    if constexpr (MODE == kPlain) {
      float sum = 0;
#pragma unroll
      for (int i = 0; i < kValues; i++) {
        if (K % kValues == 0 || column + i < K) {
          sum = fma(float(weight[row * K + column + i]), chunk.x[i], sum);
        }
      }
      return sum;
    } else {
      ChunkWords<kValues * BITS / 8> words;
      words.load(weight, row * (K * BITS / 8) + column * BITS / 8);
      const int group = row * (K / GROUP) + column / GROUP;
      const float sum = product<MODE, BITS, kValues>(words, chunk);
      if constexpr (MODE == kAffine) {
        const float scale = float(scales[group]), bias = float(biases[group]);
        return fma(scale, sum, chunk.sum * bias);
      } else {
        const uint code = scales[group];
        return (MODE == kNvfp4 ? e4m3(code) : e8m0(code)) * sum;
      }
    }
  }
};

// A row of `first` comes before; sizes of stacks need 64 bits.
inline None moved(None, size_t) {
  return None{};
}

template <typename Pointer>
Pointer moved(Pointer from, size_t by) {
  return from + by;
}

// Rows from `row` of `expert` on; a matrix has N.
template <bool FAST,
          int K,
          int N,
          int MODE,
          int BITS,
          int GROUP,
          typename Weight,
          typename Scales,
          typename Biases,
          typename Bias,
          typename GlobalScale>
Rows<FAST, K, Stack<MODE, BITS, GROUP, Weight, Scales, Biases, Bias, GlobalScale>> rows_of(
    Stack<MODE, BITS, GROUP, Weight, Scales, Biases, Bias, GlobalScale> stack,
    uint expert,
    int row) {
  const size_t before = size_t(expert) * N + row;
  constexpr int WORDS = MODE == kPlain ? K : K / 32 * BITS + K % 32 * BITS / 32;
  constexpr int GROUPS = MODE == kPlain ? 0 : K / (MODE == kPlain ? 1 : GROUP);
  return {moved(stack.weight, before * WORDS), moved(stack.scales, before * GROUPS),
          moved(stack.biases, before * GROUPS), global_scale_of(stack.global_scale, expert)};
}

// This lane's share of the products of x [K] with ROWS rows, of which `count` are there.
template <int ROWS, int N, int K, typename X, typename R>
void products(X x, R rows, int count, int lane, thread float (&sums)[ROWS]) {
  typename R::Part chunk;
  for (int k = 0; k < K; k += R::kBlock) {
    const int column = k + lane * R::kValues;
    if (K % R::kBlock == 0 || column < K) {
      chunk.load(x + column, K - column);
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        if (N % ROWS == 0 || r < count) {
          sums[r] = sums[r] + rows.dot(r, column, chunk);
        }
      }
    }
  }
}

// The same with rows of two matrices, which share what is read of x where their chunks are alike.
template <int ROWS, int N, int K, typename X, typename R, typename S>
void products(X x,
              R rows,
              S others,
              int count,
              int lane,
              thread float (&sums)[ROWS],
              thread float (&other_sums)[ROWS]) {
  if constexpr (R::kMode == S::kMode && R::kBits == S::kBits && R::kValues == S::kValues) {
    typename R::Part chunk;
    for (int k = 0; k < K; k += R::kBlock) {
      const int column = k + lane * R::kValues;
      if (K % R::kBlock == 0 || column < K) {
        chunk.load(x + column, K - column);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
          if (N % ROWS == 0 || r < count) {
            sums[r] = sums[r] + rows.dot(r, column, chunk);
            other_sums[r] = other_sums[r] + others.dot(r, column, chunk);
          }
        }
      }
    }
  } else {
    products<ROWS, N, K>(x, rows, count, lane, sums);
    products<ROWS, N, K>(x, others, count, lane, other_sums);
  }
}

// Sums over all lanes: lane r has that of row r, rounded to T.
template <typename T, int ROWS>
T of_lane(thread float (&sums)[ROWS], float global_scale, int lane) {
  float mine = 0;
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const float sum = simd_sum(sums[r]);
    mine = lane == r ? sum : mine;
  }
  return T(mine * global_scale);
}

// Rows of one expert's projection of x, with its bias, `count` of them from `row` on. Lane r has
// the value of row r.
template <typename T, int ROWS, int K, int N, bool FAST, typename X, typename S>
T projected(X x, S stack, uint expert, int row, int count, int lane) {
  auto rows = rows_of<FAST, K, N>(stack, expert, row);
  float sums[ROWS] = {};
  products<ROWS, N, K>(x, rows, count, lane, sums);
  const T value = of_lane<T>(sums, rows.global_scale, lane);
  return lane < count ? with_bias(stack.bias, size_t(expert) * N + row + lane, value) : T(0);
}

}  // namespace moefast

#endif
