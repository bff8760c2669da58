// Products of one row prepared as int15.h says: what decoding a token consists of.
//
// Weights come from memory and are used once, so this has to keep up with it, even where another
// program shares the core. Everything that can be known beforehand is: kinds of scales and lengths
// of groups are parameters of the templates, and what to fetch is settled for many rows at once.
#ifndef MOEFAST_CPU_GENERIC_INT15_SINGLE_H
#define MOEFAST_CPU_GENERIC_INT15_SINGLE_H

#include "int15.h"
#include "lanes.h"
#include "prefetch.h"

namespace moefast {
namespace {

// kFloats scales of a kind, or offsets.
template <int kType>
struct AffineScales {
  static constexpr int kSize = kType == MOEFAST_FLOAT32 ? 4 : 2;
  static constexpr bool kOffsets = true;
  static Floats load(const uint8_t* from) { return load_values<kType>(from); }
};

struct E8m0Scales {
  static constexpr int kSize = 1;
  static constexpr bool kOffsets = false;
  static Floats load(const uint8_t* from) { return widen_e8m0_code(load_bytes(from)); }
};

struct E4m3Scales {
  static constexpr int kSize = 1;
  static constexpr bool kOffsets = false;
  static Floats load(const uint8_t* from) { return load_e4m3(from); }
};

template <class Codes, class OfScales, int kGroup>
class Int15Single {
 public:
  Int15Single(const Matrix& w, const Int15Row& row) : w_(w), row_(row) {}

  // Rows [begin, end), which lie `distance` from what is to be fetched.
  void rows(int64_t begin, int64_t end, const Distance& distance, float* y) const {
    for (int64_t n = begin; n < end; n += kTogether) {
      const int64_t some = end - n < kTogether ? end - n : kTogether;
      fetch_lines(w_.scales + n * w_.scale_bytes + distance.scales, some * w_.scale_bytes);
      if (OfScales::kOffsets) {
        fetch_lines(w_.biases + n * w_.scale_bytes + distance.biases, some * w_.scale_bytes);
      }
      Floats sums[kTogether];
      pair(n, n + (some > 1), distance.weight, sums);
      if (some > 2) {
        pair(n + 2, n + 2 + (some > 3), distance.weight, sums + 2);
      } else {
        sums[2] = sums[3] = sums[0];
      }
      float four[kTogether];
      sum_four(sums, four);
      for (int64_t i = 0; i < some; ++i) {
        y[n - begin + i] = w_.factor * four[i];
      }
    }
  }

 private:
  static constexpr int kTogether = 4;  // rows whose lanes are summed up together
  static constexpr int kUnit = kGroup < kAlike ? kGroup : kAlike;
  static constexpr int kUnits = kGroup / kUnit;
  static constexpr int64_t kPanel = kMostUnits * kUnit;  // values whose steps are made at once
  static constexpr int kSpanBytes = kSpan * Codes::kBits / 8;
  static constexpr int kSize = OfScales::kSize;

  // The lanes of the sums of row n and of the next, or of row n twice, but for the factor of the
  // weight. Two rows share the activations they read, and what they fetch is still one stream.
  [[gnu::always_inline]] void pair(int64_t n,
                                   int64_t other,
                                   ptrdiff_t distance,
                                   Floats* results) const {
    alignas(64) float steps[2][1][kMostUnits];
    typename Codes::Sum sums[2] = {};
    Floats offset_sums[2] = {};
    const uint8_t* fetched = w_.weight + n * w_.row_bytes + distance;
    for (int64_t panel = 0; panel < w_.in; panel += kPanel) {
      const int64_t length = w_.in - panel < kPanel ? w_.in - panel : kPanel;
      const int64_t first = panel / kGroup;
      const Int15Row row = {row_.codes + 2 * panel, row_.steps + first * kUnits, row_.sums + first};
      scale(row, n, first, length / kGroup, steps[0][0], offset_sums[0]);
      scale(row, other, first, length / kGroup, steps[1][0], offset_sums[1]);
      const uint8_t* codes = w_.weight + n * w_.row_bytes + panel * Codes::kBits / 8;
      const ptrdiff_t next = (other - n) * w_.row_bytes;
      const uint8_t* rest = codes + length / kSpan * kSpanBytes;
      int64_t at = 0, unit = 0;
      for (; codes != rest; codes += kSpanBytes, at += 2 * kSpan, unit += kSpan / kUnit) {
        fetch_lines(fetched, 2 * kSpanBytes);
        fetched += 2 * kSpanBytes;
        Codes::template two<kUnit>(codes, codes + next, row.codes + at, steps[0][0] + unit,
                                   steps[1][0] + unit, sums);
      }
      if (length % kSpan != 0) {
        alignas(64) uint8_t last[2][kSpanBytes] = {};
        const int64_t bytes = length % kSpan * Codes::kBits / 8;
        fetch_lines(fetched, 2 * bytes);
        __builtin_memcpy(last[0], rest, static_cast<size_t>(bytes));
        __builtin_memcpy(last[1], rest + next, static_cast<size_t>(bytes));
        Codes::template two<kUnit>(last[0], last[1], row.codes + at, steps[0][0] + unit,
                                   steps[1][0] + unit, sums);
      }
    }
    results[0] = Codes::kFactor * (Floats)sums[0] + offset_sums[0];
    results[1] = Codes::kFactor * (Floats)sums[1] + offset_sums[1];
  }

  // The steps of the units of a panel's groups, with zeros up to the end of the last span; its
  // offsets times the sums of their groups are added to `sum`.
  [[gnu::always_inline]] void scale(const Int15Row& row,
                                    int64_t n,
                                    int64_t first,
                                    int64_t groups,
                                    float* steps,
                                    Floats& sum) const {
    const int64_t at = n * w_.scale_bytes + first * kSize;
    const uint8_t* scales = w_.scales + at;
    const uint8_t* offsets = OfScales::kOffsets ? w_.biases + at : scales;
    if (groups < kFloats) {
      const auto bytes = static_cast<size_t>(groups * kSize);
      alignas(64) uint8_t few[kFloats * kSize] = {};
      __builtin_memcpy(few, scales, bytes);
      scale_some(row, few, 0, steps);
      if (OfScales::kOffsets) {
        __builtin_memcpy(few, offsets, bytes);
        add_offsets(row, few, 0, Ints{} - 1, sum);
      }
    } else {
      int64_t i = 0;
      for (; i + kFloats <= groups; i += kFloats) {
        scale_some(row, scales + i * kSize, i, steps);
        add_offsets(row, offsets + i * kSize, i, Ints{} - 1, sum);
      }
      if (i < groups) {  // the last ones once more: quicker than copying the rest
        const int64_t last = groups - kFloats;
        scale_some(row, scales + last * kSize, last, steps);
        add_offsets(row, offsets + last * kSize, last, last_lanes(groups - i), sum);
      }
    }
    for (int64_t unit = groups * kUnits; unit % (kSpan / kUnit) != 0; ++unit) {
      steps[unit] = 0;
    }
  }

  // The steps of groups [i, i + kFloats).
  [[gnu::always_inline]] static void scale_some(const Int15Row& row,
                                                const uint8_t* scales,
                                                int64_t i,
                                                float* steps) {
    const Floats scale = OfScales::load(scales);
    if constexpr (kUnits == 2) {
      const float* from = row.steps + 2 * i;
      store_floats(steps + 2 * i, Interleave<kFloats>::low(scale, scale) * load_floats(from));
      store_floats(steps + 2 * i + kFloats,
                   Interleave<kFloats>::high(scale, scale) * load_floats(from + kFloats));
    } else {
      store_floats(steps + i, scale * load_floats(row.steps + i));
    }
  }

  // Those of groups [i, i + kFloats), but for the lanes outside `lanes`.
  [[gnu::always_inline]] static void add_offsets(
      const Int15Row& row, const uint8_t* offsets, int64_t i, Ints lanes, Floats& sum) {
    if constexpr (OfScales::kOffsets) {
      sum += as_floats(as_ints(OfScales::load(offsets)) & lanes) * load_floats(row.sums + i);
    }
  }

  const Matrix w_;
  const Int15Row row_;
};

// Rows [begin, end) of a weight, in runs that lie equally far from what they fetch.
template <class Codes, class OfScales, int kGroup>
void int15_multiply_single(const Matrix& w,
                           int64_t begin,
                           int64_t end,
                           const Int15Row& row,
                           float* y,
                           const Ahead& ahead) {
  const Int15Single<Codes, OfScales, kGroup> single(w, row);
  each_distance(w, begin, end, ahead, [&](int64_t from, int64_t to, const Distance& distance) {
    single.rows(from, to, distance, y + from - begin);
  });
}

template <class Codes, int kGroup>
void int15_multiply_affine(const Matrix& w,
                           int64_t begin,
                           int64_t end,
                           const Int15Row& row,
                           float* y,
                           const Ahead& ahead) {
  switch (w.format.dtype) {
    case MOEFAST_FLOAT32:
      return int15_multiply_single<Codes, AffineScales<MOEFAST_FLOAT32>, kGroup>(w, begin, end, row,
                                                                                 y, ahead);
    case MOEFAST_FLOAT16:
      return int15_multiply_single<Codes, AffineScales<MOEFAST_FLOAT16>, kGroup>(w, begin, end, row,
                                                                                 y, ahead);
    default:
      return int15_multiply_single<Codes, AffineScales<MOEFAST_BFLOAT16>, kGroup>(w, begin, end,
                                                                                  row, y, ahead);
  }
}

template <class Codes>
void int15_multiply_single(const Matrix& w,
                           int64_t begin,
                           int64_t end,
                           const Int15Row& row,
                           float* y,
                           const Ahead& ahead) {
  if constexpr (Codes::kFineUnit == 16) {  // e2m1
    return w.format.mode == MOEFAST_NVFP4
               ? int15_multiply_single<Codes, E4m3Scales, 16>(w, begin, end, row, y, ahead)
               : int15_multiply_single<Codes, E8m0Scales, 32>(w, begin, end, row, y, ahead);
  } else {
    return w.format.group == 32   ? int15_multiply_affine<Codes, 32>(w, begin, end, row, y, ahead)
           : w.format.group == 64 ? int15_multiply_affine<Codes, 64>(w, begin, end, row, y, ahead)
                                  : int15_multiply_affine<Codes, 128>(w, begin, end, row, y, ahead);
  }
}

}  // namespace
}  // namespace moefast

#endif
