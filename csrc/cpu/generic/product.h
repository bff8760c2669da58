// The product that every instruction set has, for any format and in float32 throughout.
//
// Prepared: a row widened to float32, with zeros up to a multiple of 64 values. A result is a sum
// of kSums vectors of partial sums, each over every kSums-th vector of values from the first to the
// last, and added up in one order: it does not depend on what else is in the call. A few activation
// rows take values of the weight as they are dequantised, 128 at a time. More of them share the
// values, in tiles that leave neither the first cache nor, inside, the registers; so do a few where
// there is nothing to dequantise.
#ifndef MOEFAST_CPU_GENERIC_PRODUCT_H
#define MOEFAST_CPU_GENERIC_PRODUCT_H

#include "prefetch.h"
#include "unpack.h"

namespace moefast {
namespace {

// Layouts of prepared rows. Others follow in the files of the instruction sets.
constexpr int kLayoutFloat32 = 0;

// Vectors of partial sums: the next multiply-add need not wait for the last.
constexpr int kSums = kVectorBytes == 16 ? 4 : 2;
constexpr int kStep = kSums * kFloats;  // values that a round of sums takes

// The part of a tile whose sums fit the registers: rows of activations, and of the weight.
constexpr int kInnerX = kVectorBytes == 64 ? 4 : 3;
constexpr int kInnerW = kVectorBytes == 16 && !kManyRegisters ? 1 : 2;
// So many rows of activations take values of the weight as they are dequantised: while their sums
// and what dequantises fit the registers.
constexpr int kMostDirect = kVectorBytes == 16 ? (kManyRegisters ? 4 : 2) : 6;
// A tile: rows of activations, rows of the weight, and values of each.
constexpr int kTileX = 4 * kInnerX;
constexpr int kTileW = 4;
constexpr int kTileValues = 256;

struct Sums {
  Floats sums[kSums];
};

// sums[i * ld + j] += w[i] * x[j], value by value: `count` of them, a multiple of kStep.
template <int kW, int kX>
[[gnu::always_inline]] inline void dot(const float* const* w,
                                       const float* const* x,
                                       int64_t from,
                                       int64_t count,
                                       Sums* sums,
                                       int64_t ld) {
  Floats total[kW][kX][kSums];
  for (int i = 0; i < kW; ++i) {
    for (int j = 0; j < kX; ++j) {
      for (int k = 0; k < kSums; ++k) {
        total[i][j][k] = sums[i * ld + j].sums[k];
      }
    }
  }
  for (int64_t at = 0; at < count; at += kStep) {
    for (int k = 0; k < kSums; ++k) {
      Floats values[kW];
      for (int i = 0; i < kW; ++i) {
        values[i] = load_floats(w[i] + at + k * kFloats);
      }
      for (int j = 0; j < kX; ++j) {
        const Floats row = load_floats(x[j] + from + at + k * kFloats);
        for (int i = 0; i < kW; ++i) {
          total[i][j][k] += values[i] * row;
        }
      }
    }
  }
  for (int i = 0; i < kW; ++i) {
    for (int j = 0; j < kX; ++j) {
      for (int k = 0; k < kSums; ++k) {
        sums[i * ld + j].sums[k] = total[i][j][k];
      }
    }
  }
}

// The same for kW rows of the weight and any number of rows x.
template <int kW>
inline void dot_rows(const float* const* w,
                     const float* const* x,
                     int64_t rows,
                     int64_t from,
                     int64_t count,
                     Sums* sums) {
  int64_t j = 0;
  for (; j + kInnerX <= rows; j += kInnerX) {
    dot<kW, kInnerX>(w, x + j, from, count, sums + j, kTileX);
  }
  for (; j + 2 <= rows; j += 2) {
    dot<kW, 2>(w, x + j, from, count, sums + j, kTileX);
  }
  if (j < rows) {
    dot<kW, 1>(w, x + j, from, count, sums + j, kTileX);
  }
}

inline float sum_up(const Sums& s) {
  if constexpr (kSums == 2) {
    return sum_across(s.sums[0] + s.sums[1]);
  } else {
    return sum_across((s.sums[0] + s.sums[1]) + (s.sums[2] + s.sums[3]));
  }
}

// Values [from, from + count) of a row of the weight, and zeros up to a multiple of kStep. The
// result is their address: `to`, or the weight itself.
template <class Values>
[[gnu::always_inline]] inline const float* read_values(const Matrix& w,
                                                       const uint8_t* row,
                                                       int64_t from,
                                                       int64_t count,
                                                       const Scales& scales,
                                                       float* to) {
  for (int64_t at = 0; at < count; at += kChunk) {
    const int length = static_cast<int>(count - at < kChunk ? count - at : kChunk);
    const float* read = length == kChunk
                            ? Values::read(w.format, row, from + at, kChunk, scales, to + at)
                            : Values::read(w.format, row, from + at, length, scales, to + at);
    if (read != to + at) {  // float32 as it is
      if (count % kStep == 0) {
        return read;
      }
      __builtin_memcpy(to + at, read, static_cast<size_t>(length) * 4);
    }
  }
  for (int64_t i = count; i % kStep != 0; ++i) {
    to[i] = 0;
  }
  return to;
}

// Where `from` begins another stretch of scales, loads them, and fetches those further on.
inline void load_scales_at(
    const Matrix& w, int64_t row, int64_t from, const Fetcher& fetcher, Scales& scales) {
  if (from % Scales::kValues == 0) {
    const int64_t left = w.in - from;
    const int64_t count = left < Scales::kValues ? left : Scales::kValues;
    load_scales(w, row, from, count, scales);
    fetcher.scales(w, row, w.scale_bytes * from / w.in, w.scale_bytes * count / w.in);
  }
}

// sums += w * x for kChunk plain values, which go from memory to the registers.
template <int kType, int kX>
[[gnu::always_inline]] inline void dot_plain(const uint8_t* w,
                                             const float* const* x,
                                             int64_t from,
                                             Sums* sums) {
  constexpr int kBytes = kType == MOEFAST_FLOAT32 ? 4 : 2;
  for (int at = 0; at < kChunk; at += kStep) {
    for (int k = 0; k < kSums; ++k) {
      const int i = at + k * kFloats;
      const Floats values = load_values<kType>(w + i * kBytes);
      for (int j = 0; j < kX; ++j) {
        sums[j].sums[k] += values * load_floats(x[j] + from + i);
      }
    }
  }
}

// One row of the weight with kX rows x.
template <class Values, int kX>
inline void multiply_row(const Matrix& w,
                         int64_t row,
                         const float* const* x,
                         const Fetcher& fetcher,
                         float* y,
                         int64_t ldy) {
  const uint8_t* bytes = w.weight + row * w.row_bytes;
  Sums sums[kX] = {};
  Scales scales;
  alignas(64) float values[kChunk];
  const int64_t whole = w.in / kChunk * kChunk;
  for (int64_t from = 0; from < whole; from += kChunk) {
    if constexpr (Values::kPlain >= 0) {
      constexpr int kBytes = Values::kPlain == MOEFAST_FLOAT32 ? 4 : 2;
      fetcher.weight(bytes + from * kBytes, kChunk * kBytes);
      dot_plain<Values::kPlain, kX>(bytes + from * kBytes, x, from, sums);
      continue;
    }
    load_scales_at(w, row, from, fetcher, scales);
    fetcher.weight(bytes + from * w.format.bits / 8, kChunk * w.format.bits / 8);
    if constexpr (Values::kPlain < 0) {
      Values::each(w.format, bytes, from, kChunk, scales, [&](int i, int v, Floats some) {
        for (int j = 0; j < kX; ++j) {
          sums[j].sums[v % kSums] += some * load_floats(x[j] + from + i);
        }
      });
    }
  }
  if (whole < w.in) {
    load_scales_at(w, row, whole, fetcher, scales);
    fetcher.weight(bytes + whole * w.format.bits / 8, w.row_bytes - whole * w.format.bits / 8);
    const float* rest = read_values<Values>(w, bytes, whole, w.in - whole, scales, values);
    dot<1, kX>(&rest, x, whole, round_up(w.in - whole, kStep), sums, kX);
  }
  for (int j = 0; j < kX; ++j) {
    y[j * ldy] = w.factor * sum_up(sums[j]);
  }
}

// The same with `count` rows x, of which there are at most kMost.
template <class Values, int kMost>
inline void multiply_few(const Matrix& w,
                         int64_t row,
                         const float* const* x,
                         int64_t count,
                         const Fetcher& fetcher,
                         float* y,
                         int64_t ldy) {
  if constexpr (kMost > 1) {
    if (count < kMost) {
      return multiply_few<Values, kMost - 1>(w, row, x, count, fetcher, y, ldy);
    }
  }
  multiply_row<Values, kMost>(w, row, x, fetcher, y, ldy);
}

// `rows` <= kTileW rows of the weight, from `row` on, with `count` <= kTileX rows x.
template <class Values>
inline void multiply_tile(const Matrix& w,
                          int64_t row,
                          int64_t rows,
                          const float* const* x,
                          int64_t count,
                          const Fetcher& fetcher,
                          float* y,
                          int64_t ldy) {
  Sums sums[kTileW][kTileX];
  __builtin_memset(sums, 0, static_cast<size_t>(rows) * sizeof sums[0]);
  Scales scales[kTileW];
  alignas(64) float values[kTileW][kTileValues];
  for (int64_t from = 0; from < w.in; from += kTileValues) {
    const int64_t length = w.in - from < kTileValues ? w.in - from : kTileValues;
    const float* read[kTileW];
    for (int64_t i = 0; i < rows; ++i) {
      const uint8_t* bytes = w.weight + (row + i) * w.row_bytes;
      load_scales_at(w, row + i, from, fetcher, scales[i]);
      fetcher.weight(bytes + from * w.format.bits / 8, length * w.format.bits / 8);
      read[i] = read_values<Values>(w, bytes, from, length, scales[i], values[i]);
    }
    const int64_t padded = round_up(length, kStep);
    int64_t i = 0;
    for (; i + kInnerW <= rows; i += kInnerW) {
      dot_rows<kInnerW>(read + i, x, count, from, padded, sums[i]);
    }
    for (; i < rows; ++i) {
      dot_rows<1>(read + i, x, count, from, padded, sums[i]);
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < count; ++j) {
      y[j * ldy + i] = w.factor * sum_up(sums[i][j]);
    }
  }
}

template <class Values>
inline void multiply_values(const Matrix& w,
                            int64_t begin,
                            int64_t end,
                            const void* const* rows,
                            int64_t count,
                            float* y,
                            int64_t ldy,
                            const Ahead& ahead) {
  const Fetcher last(w, end, ahead);
  const Fetcher again(w, end, Ahead{});
  for (int64_t first = 0; first < count; first += kTileX) {
    const int64_t here = count - first < kTileX ? count - first : kTileX;
    const float* x[kTileX];
    for (int64_t r = 0; r < here; ++r) {
      x[r] = static_cast<const float*>(rows[first + r]);
    }
    const Fetcher& fetcher = first + here == count ? last : again;
    float* to = y + first * ldy;
    if (here == 1 || (here <= kMostDirect && Values::kPlain != MOEFAST_FLOAT32)) {
      for (int64_t row = begin; row < end; ++row) {
        multiply_few<Values, kMostDirect>(w, row, x, here, fetcher, to + row - begin, ldy);
      }
      continue;
    }
    // Few rows stay in the cache by themselves, and memory is read best from front to back.
    const int64_t tile = count <= kInnerX ? kInnerW : kTileW;
    for (int64_t row = begin; row < end; row += tile) {
      const int64_t some = end - row < tile ? end - row : tile;
      multiply_tile<Values>(w, row, some, x, here, fetcher, to + row - begin, ldy);
    }
  }
}

// Floats from one prepared row to the next. A few lines more than a row has, lest rows of 2^n
// values compete for the same few lines of the first cache.
inline int64_t generic_stride(int64_t in) {
  return round_up(in, 64) + 144;
}

inline int64_t generic_prepared_bytes(const Format&, int64_t in, int64_t count) {
  return generic_stride(in) * 4 * count;
}

inline bool generic_prepare(
    const Format&, int dtype, const void* const* rows, int64_t count, int64_t in, void* prepared) {
  float* to = static_cast<float*>(prepared);
  for (int64_t r = 0; r < count; ++r, to += generic_stride(in)) {
    widen(dtype, rows[r], in, to);
    __builtin_memset(to + in, 0, static_cast<size_t>(round_up(in, 64) - in) * 4);
  }
  return true;
}

inline void generic_multiply(const Matrix& w,
                             int64_t begin,
                             int64_t end,
                             const void* const* rows,
                             int64_t count,
                             float* y,
                             int64_t ldy,
                             const Ahead& ahead) {
  with_values(w.format, [&](auto values) {
    multiply_values<decltype(values)>(w, begin, end, rows, count, y, ldy, ahead);
  });
}

inline const Product* generic_product() {
  static constexpr Product product = {
      "float32", kLayoutFloat32, true, generic_prepared_bytes, generic_prepare, generic_multiply};
  return &product;
}

}  // namespace
}  // namespace moefast

#endif
