// Attention in float32: softmax(q k^T * scale) v with a running maximum, block of keys by block.
//
// Many rows of queries share keys that have been widened and transposed once (pack): a vector holds
// one dimension of kFloats keys. Few rows read keys and values as they are, once, and add up the
// lanes of their products. From the scores on both go the same way: weigh, then add_values.
#ifndef MOEFAST_CPU_GENERIC_ATTENTION_H
#define MOEFAST_CPU_GENERIC_ATTENTION_H

#include "../isa.h"
#include "convert.h"
#include "elementwise.h"
#include "lanes.h"

namespace moefast {
namespace {

// Held in registers: rows of queries or weights, and vectors of keys or values.
constexpr int kRowsInner = 6;
constexpr int kVectorsInner = kManyRegisters ? 4 : 2;
// Likewise where lanes are added up: rows, and keys.
constexpr int kRowsAcross = 4;
constexpr int kKeysAcross = kManyRegisters ? 4 : 2;
// Keys whose values stay in the first cache while all rows and columns pass over them.
constexpr int64_t kValuesInner = 32;

// The first `count` < kFloats values, then zeros; nothing behind them is read.
template <int kType>
inline Floats load_part(const uint8_t* from, int64_t count) {
  constexpr int64_t kSize = kType == MOEFAST_FLOAT32 ? 4 : 2;
  uint8_t part[kFloats * kSize] = {};
  __builtin_memcpy(part, from, static_cast<size_t>(count * kSize));
  return load_values<kType>(part);
}

// exp(x) for x <= 0, and 0 where float32 has no normal number for it.
inline Floats exp_down(Floats x) {
  const Reduced<Floats> part = reduce(at_least(x, -87.0f));
  const Floats power = (exp_fraction(part.r) + 1.0f) * power_of_two(part.n);
  return x < splat<Floats>(-87.0f) ? Floats{} : power;
}

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// function(row, rows) for tiles of up to kMost rows; `rows` comes as a type, ::value.
template <int kMost, class Function>
[[gnu::always_inline]] inline void each_rows(int64_t count, Function function) {
  int64_t r = 0;
  for (; r + kMost <= count; r += kMost) {
    function(r, Constant<kMost>{});
  }
  if constexpr (kMost > 1) {
    each_rows<kMost / 2>(count - r, [&](int64_t i, auto rows) { function(r + i, rows); });
  }
}

// function(type) for a dtype that comes as a type, ::value.
template <class Function>
inline void with_dtype(int dtype, Function function) {
  switch (dtype) {
    case MOEFAST_FLOAT32:
      return function(Constant<MOEFAST_FLOAT32>{});
    case MOEFAST_FLOAT16:
      return function(Constant<MOEFAST_FLOAT16>{});
    case MOEFAST_BFLOAT16:
      return function(Constant<MOEFAST_BFLOAT16>{});
  }
}

// scores[r][i] = q_r k_i for kVectors vectors of packed keys.
template <int kRows, int kVectors>
inline void score_packed(const AttentionRows& rows, int64_t row, const float* keys, float* scores) {
  const float* q = rows.queries + row * rows.query_stride;
  Floats sum[kRows][kVectors] = {};
  for (int64_t d = 0; d < rows.dims; ++d, keys += kAttentionTile) {
    Floats k[kVectors];
    for (int i = 0; i < kVectors; ++i) {
      k[i] = load_floats(keys + i * kFloats);
    }
    for (int r = 0; r < kRows; ++r) {
      const float x = q[r * rows.query_stride + d];
      for (int i = 0; i < kVectors; ++i) {
        sum[r][i] += x * k[i];
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kVectors; ++i) {
      store_floats(scores + (row + r) * kAttentionTile + i * kFloats, sum[r][i]);
    }
  }
}

// sums[r][k] = lanes to be added up for q_r k_k: kKeys keys where they lie. The first rows fetch
// the keys of the next round.
template <int kType, int kRows, int kKeys>
inline void score_lanes(
    const AttentionRows& rows, int64_t row, const uint8_t* keys, int64_t stride, Floats* sums) {
  constexpr int64_t kSize = kType == MOEFAST_FLOAT32 ? 4 : 2;
  const float* q = rows.queries + row * rows.query_stride;
  Floats sum[kRows][kKeys] = {};
  const auto add = [&](int64_t d, auto load) {
    Floats x[kRows];
    for (int r = 0; r < kRows; ++r) {
      x[r] = load_floats(q + r * rows.query_stride + d);
    }
    for (int k = 0; k < kKeys; ++k) {
      if (row == 0) {
        __builtin_prefetch(keys + (k + kFloats) * stride + d * kSize);
      }
      const Floats key = load(keys + k * stride + d * kSize);
      for (int r = 0; r < kRows; ++r) {
        sum[r][k] += x[r] * key;
      }
    }
  };
  int64_t d = 0;
  for (; d + kFloats <= rows.dims; d += kFloats) {
    add(d, [](const uint8_t* from) { return load_values<kType>(from); });
  }
  if (d < rows.dims) {
    const int64_t left = rows.dims - d;
    add(d, [&](const uint8_t* from) { return load_part<kType>(from, left); });
  }
  for (int r = 0; r < kRows; ++r) {
    for (int k = 0; k < kKeys; ++k) {
      sums[r * kFloats + k] = sum[r][k];
    }
  }
}

// scores[r][k] = q_r k_k for `count` keys where they lie.
template <int kType>
inline void score_direct(const AttentionRows& rows, const AttentionKeys& from) {
  for (int64_t k = 0; k < from.count; k += kFloats) {
    const uint8_t* keys = from.keys + k * from.key_stride;
    const int64_t here = from.count - k < kFloats ? from.count - k : kFloats;
    each_rows<kRowsAcross>(rows.count, [&](int64_t row, auto some) {
      Floats sums[decltype(some)::value * kFloats] = {};
      int64_t i = 0;
      for (; i + kKeysAcross <= here; i += kKeysAcross) {
        score_lanes<kType, decltype(some)::value, kKeysAcross>(
            rows, row, keys + i * from.key_stride, from.key_stride, sums + i);
      }
      for (; i < here; ++i) {
        score_lanes<kType, decltype(some)::value, 1>(rows, row, keys + i * from.key_stride,
                                                     from.key_stride, sums + i);
      }
      for (int r = 0; r < some.value; ++r) {
        store_floats(rows.scores + (row + r) * kAttentionChunk + k,
                     fold(sums + r * kFloats, [](Floats a, Floats b) { return a + b; }));
      }
    });
  }
}

// How many of `count` keys from `first` on a row sees.
inline int64_t seen_of(const AttentionRows& rows, int64_t row, int64_t first, int64_t count) {
  const int64_t seen = rows.seen[row] - first;
  return seen < 0 ? 0 : seen < count ? seen : count;
}

// Scores to weights relative to the rows' new largest scores. factors: what everything summed up
// so far is multiplied by.
inline void weigh(const AttentionRows& rows, int64_t stride, int64_t first, int64_t count) {
  const Floats none = splat<Floats>(-__builtin_inff());
  Ints lanes;
  for (int i = 0; i < kFloats; ++i) {
    lanes[i] = i;
  }
  const auto larger = [](Floats a, Floats b) { return a > b ? a : b; };
  for (int64_t begin = 0; begin < rows.count; begin += kFloats) {
    const int64_t here = rows.count - begin < kFloats ? rows.count - begin : kFloats;
    float* scores = rows.scores + begin * stride;
    Floats each_lane[kFloats];
    for (int64_t i = 0; i < kFloats; ++i) {
      each_lane[i] = none;
    }
    for (int64_t i = 0; i < here; ++i) {
      const int seen = static_cast<int>(seen_of(rows, begin + i, first, count));
      Floats most = none;
      for (int64_t k = 0; k < count; k += kFloats) {
        float* at = scores + i * stride + k;
        const Floats score = load_floats(at) * rows.scale;
        const Floats masked = lanes + static_cast<int>(k) < seen ? score : none;
        store_floats(at, masked);
        most = larger(masked, most);  // NaN is never the largest: it comes in with its own weight
      }
      each_lane[i] = most;
    }
    const Floats before = load_floats(rows.largest + begin);
    const Floats now = larger(fold(each_lane, larger), before);
    store_floats(rows.largest + begin, now);
    // Where there is nothing but -inf so far, all weights so far are 0, not exp(-inf + inf).
    const Floats base = now == none ? Floats{} : now;
    const Floats factor = exp_down(before - base);
    store_floats(rows.factors + begin, factor);
    for (int64_t i = 0; i < kFloats; ++i) {
      each_lane[i] = Floats{};
    }
    for (int64_t i = 0; i < here; ++i) {
      Floats total = {};
      const float of_row = base[i];
      for (int64_t k = 0; k < count; k += kFloats) {
        float* at = scores + i * stride + k;
        const Floats weight = exp_down(load_floats(at) - of_row);
        store_floats(at, weight);
        total += weight;
      }
      each_lane[i] = total;
    }
    const Floats total = fold(each_lane, [](Floats a, Floats b) { return a + b; });
    store_floats(rows.total + begin, load_floats(rows.total + begin) * factor + total);
  }
}

// sums[r] = sums[r] * factors[r] + weights[r] values: kVectors vectors of columns, the last of
// which has `part` values where that is not 0.
template <int kType, int kRows, int kVectors, bool kPart>
inline void add_tile(const float* weights,
                     int64_t stride,
                     const uint8_t* values,
                     int64_t value_stride,
                     int64_t keys,
                     int64_t part,
                     bool fetch,
                     const float* factors,
                     float* sums,
                     int64_t sum_stride) {
  constexpr int64_t kSize = kType == MOEFAST_FLOAT32 ? 4 : 2;
  Floats sum[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    const float factor = factors != nullptr ? factors[r] : 1.0f;
    for (int i = 0; i < kVectors; ++i) {
      sum[r][i] = load_floats(sums + r * sum_stride + i * kFloats) * factor;
    }
  }
  for (int64_t k = 0; k < keys; ++k, values += value_stride) {
    Floats v[kVectors];
    for (int i = 0; i < kVectors; ++i) {
      if (fetch) {
        __builtin_prefetch(values + kValuesInner * value_stride + i * kFloats * kSize);
      }
      v[i] =
          kPart ? load_part<kType>(values, part) : load_values<kType>(values + i * kFloats * kSize);
    }
    for (int r = 0; r < kRows; ++r) {
      const float weight = weights[r * stride + k];
      for (int i = 0; i < kVectors; ++i) {
        sum[r][i] += weight * v[i];
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kVectors; ++i) {
      store_floats(sums + r * sum_stride + i * kFloats, sum[r][i]);
    }
  }
}

// The same for rows [row, row + count), all columns, and `keys` keys from `key` on. factors
// NULL: 1.
template <int kType>
inline void add_block(const AttentionRows& rows,
                      int64_t row,
                      int64_t count,
                      int64_t stride,
                      const uint8_t* values,
                      int64_t value_stride,
                      int64_t key,
                      int64_t keys,
                      bool fetch,
                      const float* factors) {
  constexpr int64_t kSize = kType == MOEFAST_FLOAT32 ? 4 : 2;
  values += key * value_stride;
  const auto columns = [&](int64_t c, auto vectors, auto part) {
    each_rows<kRowsInner>(count, [&](int64_t i, auto some) {
      const int64_t r = row + i;
      add_tile<kType, decltype(some)::value, decltype(vectors)::value, decltype(part)::value != 0>(
          rows.scores + r * stride + key, stride, values + c * kSize, value_stride, keys,
          rows.value_dims - c, fetch && i == 0, factors != nullptr ? factors + r : nullptr,
          rows.sums + r * rows.sum_stride + c, rows.sum_stride);
    });
  };
  const int64_t whole = rows.value_dims / kFloats;
  each_rows<kVectorsInner>(
      whole, [&](int64_t v, auto vectors) { columns(v * kFloats, vectors, Constant<0>{}); });
  if (whole * kFloats < rows.value_dims) {
    columns(whole * kFloats, Constant<1>{}, Constant<1>{});
  }
}

// Adds the weighted values of `count` keys from `first` on. A value that a row does not see may be
// multiplied with 0 where it is `finite`, and not at all where nobody has looked: values that were
// not packed, and so are fetched ahead.
template <int kType>
inline void add_values(const AttentionRows& rows,
                       int64_t stride,
                       const uint8_t* values,
                       int64_t value_stride,
                       int64_t first,
                       int64_t count,
                       bool finite) {
  const int64_t shared = finite ? count : seen_of(rows, 0, first, count);  // the first sees fewest
  const float* factors = rows.factors;
  int64_t key = 0;
  do {
    const int64_t here = shared - key < kValuesInner ? shared - key : kValuesInner;
    add_block<kType>(rows, 0, rows.count, stride, values, value_stride, key, here, !finite,
                     factors);
    factors = nullptr;
    key += here;
  } while (key < shared);
  for (int64_t r = 0; r < rows.count; ++r) {
    const int64_t more = seen_of(rows, r, first, count) - shared;
    if (more > 0) {
      add_block<kType>(rows, r, 1, stride, values, value_stride, shared, more, false, nullptr);
    }
  }
}

template <int kType>
inline void pack_keys(const AttentionKeys& from, int64_t dims, float* keys) {
  constexpr int64_t kSize = kType == MOEFAST_FLOAT32 ? 4 : 2;
  for (int64_t first = 0; first < from.count; first += kFloats) {
    const int64_t here = from.count - first < kFloats ? from.count - first : kFloats;
    for (int64_t d = 0; d < dims; d += kFloats) {
      const int64_t left = dims - d < kFloats ? dims - d : kFloats;
      Floats v[kFloats];
      for (int i = 0; i < kFloats; ++i) {
        const uint8_t* at = from.keys + (first + i) * from.key_stride + d * kSize;
        v[i] = i >= here        ? Floats{}
               : left < kFloats ? load_part<kType>(at, left)
                                : load_values<kType>(at);
      }
      transpose(v);
      for (int i = 0; i < left; ++i) {
        store_floats(keys + (d + i) * kAttentionTile + first, v[i]);
      }
    }
  }
}

inline bool attention_pack(
    const AttentionKeys& from, int64_t dims, int64_t value_dims, float* keys, float* values) {
  with_dtype(from.key_dtype,
             [&](auto type) { pack_keys<decltype(type)::value>(from, dims, keys); });
  const int64_t stride = round_up(value_dims, 16);
  Ints infinite = {};
  for (int64_t k = 0; k < from.count; ++k) {
    float* to = values + k * stride;
    widen(from.value_dtype, from.values + k * from.value_stride, value_dims, to);
    __builtin_memset(to + value_dims, 0, static_cast<size_t>(stride - value_dims) * 4);
    for (int64_t i = 0; i < stride; i += kFloats) {
      infinite |= (load_ints(to + i) & 0x7f800000) == 0x7f800000;
    }
  }
  return across(infinite, [](int32_t a, int32_t b) { return a | b; }) == 0;
}

inline void attention_packed(const AttentionRows& rows,
                             const float* keys,
                             const float* values,
                             int64_t first,
                             int64_t count,
                             bool finite) {
  const int64_t vectors = (count + kFloats - 1) / kFloats;
  each_rows<kRowsInner>(rows.count, [&](int64_t row, auto some) {
    each_rows<kVectorsInner>(vectors, [&](int64_t v, auto wide) {
      score_packed<decltype(some)::value, decltype(wide)::value>(rows, row, keys + v * kFloats,
                                                                 rows.scores + v * kFloats);
    });
  });
  weigh(rows, kAttentionTile, first, count);
  const int64_t stride = round_up(rows.value_dims, 16) * 4;
  // A whole number of vectors: no column is a part of one.
  AttentionRows padded = rows;
  padded.value_dims = rows.sum_stride;
  add_values<MOEFAST_FLOAT32>(padded, kAttentionTile, reinterpret_cast<const uint8_t*>(values),
                              stride, first, count, finite);
}

inline void attention_direct(const AttentionRows& rows, const AttentionKeys& from, int64_t first) {
  with_dtype(from.key_dtype, [&](auto type) { score_direct<decltype(type)::value>(rows, from); });
  weigh(rows, kAttentionChunk, first, from.count);
  with_dtype(from.value_dtype, [&](auto type) {
    add_values<decltype(type)::value>(rows, kAttentionChunk, from.values, from.value_stride, first,
                                      from.count, false);
  });
}

constexpr Attention kAttention = {attention_pack, attention_packed, attention_direct};

}  // namespace
}  // namespace moefast

#endif
