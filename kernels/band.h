// A simdgroup's products of several vectors with rows of one expert, each weight read once for up
// to HEIGHT vectors; and which routes are an expert's. For band.metal.
//
// Sums are those of dot.h, in its order: what a vector gives does not depend on those beside it.
#ifndef MOEFAST_BAND_H
#define MOEFAST_BAND_H

#include "dot.h"

namespace moefast {

// What a threadgroup of SIMDGROUPS simdgroups knows of one expert: its routes, in order, out of
// up to 128 * TOP_K.
template <int TOP_K, int SIMDGROUPS>
struct BandMemory {
  // Of 32 routes that a simdgroup looks at.
  static constexpr constant int kLooks = (4 * TOP_K + SIMDGROUPS - 1) / SIMDGROUPS;

  ushort routes[kLooks * SIMDGROUPS * kLanes];
  uint counts[SIMDGROUPS];
};

struct BandThread {
  uint simdgroup, lane;
};

// The expert of a route; E where that does not exist.
template <int E, typename Indices>
inline uint expert_of(Indices indices, uint route) {
  return min(uint(indices[route]), uint(E));
}

// Finds the routes of an expert and returns how many there are; 0 if there is one before `least`.
// Simdgroups share what is to be read: each looks at a run of routes.
template <int E, int TOP_K, int SIMDGROUPS, typename Indices>
inline uint find_routes(Indices indices,
                        uint routes,
                        uint expert,
                        uint least,
                        threadgroup BandMemory<TOP_K, SIMDGROUPS>& memory,
                        BandThread at) {
  constexpr int kLooks = BandMemory<TOP_K, SIMDGROUPS>::kLooks;
  constexpr uint kBefore = 1 << 16;  // more than there can be routes
  const uint share = ((routes + kLanes - 1) / kLanes + SIMDGROUPS - 1) / SIMDGROUPS;
  const uint first = at.simdgroup * share * kLanes + at.lane;
  uint found[kLooks];  // by this simdgroup, a bit for each lane
  uint mine = 0;
  bool before_least = false;
#pragma unroll
  for (int i = 0; i < kLooks; i++) {
    const uint route = first + i * kLanes;
    const bool is_its = uint(i) < share && route < routes && expert_of<E>(indices, route) == expert;
    found[i] = uint(simd_vote::vote_t(simd_ballot(is_its)));
    mine += popcount(found[i]);
    before_least = before_least || (is_its && route < least);
  }
  before_least = simd_any(before_least);
  if (at.lane == 0) {
    memory.counts[at.simdgroup] = before_least ? kBefore : mine;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  uint before = 0, total = 0;
  for (int s = 0; s < SIMDGROUPS; s++) {
    before += uint(s) < at.simdgroup ? memory.counts[s] : 0;
    total += memory.counts[s];
  }
  if (total == 0 || total >= kBefore) {
    return 0;
  }
#pragma unroll
  for (int i = 0; i < kLooks; i++) {
    if ((found[i] >> at.lane & 1) != 0) {
      const uint place = before + popcount(found[i] & ((1u << at.lane) - 1));
      memory.routes[place] = ushort(first + i * kLanes);
    }
    before += popcount(found[i]);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return total;
}

// Integers below 1024. The compiler cannot make a conversion from integer to float of it, and
// repeat that wherever the half is used.
inline half half_of(uint integer) {
  return as_type<half>(ushort(0x6400 | integer)) - half(1024);
}

// Codes of VALUES weights where they stand in their words (affine), or elements: what product of
// dot.h makes of them, for several vectors. All are exact in half, in half the registers of float.
template <int MODE, int BITS, int VALUES>
struct Codes {
  half at[VALUES];
  half rest[VALUES];  // what a code has in the next byte: where codes are no part of a byte

  // The first bit of code i, in its byte, and how many are there.
  static constexpr int shift(int i) { return i * BITS % 8; }
  static constexpr int here(int i) { return BITS < 8 - shift(i) ? BITS : 8 - shift(i); }
  static constexpr constant bool kByFour = BITS == 2 || BITS == 4;

  template <typename W>
  void unpack(const thread W& words) thread {
    constexpr uint MASK = (1u << BITS) - 1;
#pragma unroll
    for (int i = 0; i < VALUES; i++) {
      if constexpr (MODE != kAffine) {
        at[i] = half(element<BITS>(words.from(i * BITS)));
      } else if constexpr (kByFour) {
        at[i] = half_of(words.from(i * BITS) & MASK) * half(1 << i % 4 * BITS);
      } else {
        const int bit = i * BITS - shift(i);
        at[i] = half_of(words.from(bit) & ((1u << here(i)) - 1) << shift(i));
        if (here(i) < BITS) {
          rest[i] = half_of(words.from(bit + 8) & ((1u << (BITS - here(i))) - 1));
        }
      }
    }
  }

  float times(const thread Chunk<MODE, BITS, VALUES>& chunk) const thread {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < VALUES; i += kByFour ? 4 : 1) {
      if constexpr (kByFour) {
        sum = sum + sum_of_four(chunk, i, float(at[i]), float(at[i + 1]), float(at[i + 2]),
                                float(at[i + 3]));
      } else {
        sum = fma(float(at[i]), chunk.x[i], sum);
        if (MODE == kAffine && here(i) < BITS) {
          sum = fma(float(rest[i]), chunk.x[i] * 256.0f, sum);
        }
      }
    }
    return sum;
  }
};

// A lane's chunk of one row of weights, unpacked, in registers.
template <typename R>
struct RowChunk;

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
struct RowChunk<
    Rows<FAST, K, Stack<MODE, BITS, GROUP, Weight, Scales, Biases, Bias, GlobalScale>>> {
  using R = Rows<FAST, K, Stack<MODE, BITS, GROUP, Weight, Scales, Biases, Bias, GlobalScale>>;

  Codes<MODE, BITS, R::kValues> codes;
  float scale, bias;

  // Of row `row` the chunk at `column`.
  void load(const thread R& rows, int row, int column) thread {
    ChunkWords<R::kValues * BITS / 8> words;
    words.load(rows.weight, row * (K * BITS / 8) + column * BITS / 8);
    codes.unpack(words);
    const int group = row * (K / GROUP) + column / GROUP;
    if constexpr (MODE == kAffine) {
      scale = float(rows.scales[group]);
      bias = float(rows.biases[group]);
    } else {
      const uint code = rows.scales[group];
      scale = MODE == kNvfp4 ? e4m3(code) : e8m0(code);
    }
  }

  // Times a chunk of x: Rows::dot.
  float times(const thread typename R::Part& x) const thread {
    const float sum = codes.times(x);
    return MODE == kAffine ? fma(scale, sum, x.sum * bias) : scale * sum;
  }
};

// Of a plain matrix, values as they are.
template <bool FAST,
          int K,
          int BITS,
          int GROUP,
          typename Weight,
          typename Scales,
          typename Biases,
          typename Bias,
          typename GlobalScale>
struct RowChunk<
    Rows<FAST, K, Stack<kPlain, BITS, GROUP, Weight, Scales, Biases, Bias, GlobalScale>>> {
  using R = Rows<FAST, K, Stack<kPlain, BITS, GROUP, Weight, Scales, Biases, Bias, GlobalScale>>;

  float values[R::kValues];

  void load(const thread R& rows, int row, int column) thread {
#pragma unroll
    for (int i = 0; i < R::kValues; i++) {
      const bool there = K % R::kValues == 0 || column + i < K;
      values[i] = there ? float(rows.weight[row * K + column + i]) : 0.0f;
    }
  }

  float times(const thread typename R::Part& x) const thread {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < R::kValues; i++) {
      sum = fma(values[i], x.x[i], sum);
    }
    return sum;
  }
};

// Up to HEIGHT routes of one expert: where their vectors begin, in elements.
template <int HEIGHT>
struct BandTile {
  uint rows;
  uint at[HEIGHT];
};

// This lane's shares of the products of a tile's vectors with ROWS rows of one matrix.
template <int HEIGHT, int ROWS>
struct BandSums {
  float of[HEIGHT][ROWS];
};

// Adds the products with `count` rows of MATRICES matrices of one layout. What the loops below
// leave to the compiler: codes of a chunk are the same for each vector and are unpacked for the
// first, which is always there.
template <int MATRICES, int ROWS, int N, int K, int HEIGHT, typename X, typename R>
inline void band_products(X x,
                          const thread BandTile<HEIGHT>& tile,
                          const thread R* matrices,
                          int count,
                          int lane,
                          thread BandSums<HEIGHT, ROWS>* sums) {
  for (int k = 0; k < K; k += R::kBlock) {
    const int column = k + lane * R::kValues;
    if (K % R::kBlock != 0 && column >= K) {
      break;
    }
    RowChunk<R> rows[MATRICES][ROWS];
#pragma unroll
    for (int m = 0; m < MATRICES; m++) {
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        if (N % ROWS == 0 || r < count) {
          rows[m][r].load(matrices[m], r, column);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < HEIGHT; i++) {
      if (i == 0 || uint(i) < tile.rows) {
        typename R::Part chunk;
        chunk.load(x + (tile.at[i] + column), K - column);
#pragma unroll
        for (int m = 0; m < MATRICES; m++) {
#pragma unroll
          for (int r = 0; r < ROWS; r++) {
            if (N % ROWS == 0 || r < count) {
              sums[m].of[i][r] = sums[m].of[i][r] + rows[m][r].times(chunk);
            }
          }
        }
      }
    }
  }
}

// Of two matrices: vectors are read once for both where these are of one layout.
template <int ROWS, int N, int K, int HEIGHT, typename X, typename R>
inline void band_products_of_both(X x,
                                  const thread BandTile<HEIGHT>& tile,
                                  R rows,
                                  R others,
                                  int count,
                                  int lane,
                                  thread BandSums<HEIGHT, ROWS>* sums) {
  const R both[2] = {rows, others};
  band_products<2, ROWS, N, K>(x, tile, both, count, lane, sums);
}

template <int ROWS, int N, int K, int HEIGHT, typename X, typename R, typename S>
inline void band_products_of_both(X x,
                                  const thread BandTile<HEIGHT>& tile,
                                  R rows,
                                  S others,
                                  int count,
                                  int lane,
                                  thread BandSums<HEIGHT, ROWS>* sums) {
  band_products<1, ROWS, N, K>(x, tile, &rows, count, lane, sums);
  band_products<1, ROWS, N, K>(x, tile, &others, count, lane, sums + 1);
}

// Sums over all lanes: lane i * ROWS + r has that of vector i and row r, rounded to T.
template <typename T, int HEIGHT, int ROWS>
inline T of_lane(const thread BandSums<HEIGHT, ROWS>& sums,
                 uint rows,
                 float global_scale,
                 int lane) {
  static_assert(HEIGHT * ROWS <= 32, "a lane for each");
  float mine = 0;
#pragma unroll
  for (int i = 0; i < HEIGHT; i++) {
    if (uint(i) < rows) {
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        const float sum = simd_sum(sums.of[i][r]);
        mine = lane == i * ROWS + r ? sum : mine;
      }
    }
  }
  return T(mine * global_scale);
}

}  // namespace moefast

#endif
