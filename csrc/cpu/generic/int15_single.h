// Products of one row prepared as int15.h says: what decoding a token consists of.
//
// Weights come from memory and are used once, so this has to keep up with it, even where another
// program shares the core. Everything that can be known beforehand is: kinds of scales and lengths
// of groups are parameters of the templates, and what to fetch is settled for many rows at once.
#ifndef MOEFAST_CPU_GENERIC_INT15_SINGLE_H
#define MOEFAST_CPU_GENERIC_INT15_SINGLE_H

#include "int15_scales.h"
#include "prefetch.h"

namespace moefast {
namespace {

template <class Codes, class Scales>
class Int15Single {
 public:
  Int15Single(const Matrix& w, const Int15Row& row) : w_(w), row_(row) {}

  // Rows [begin, end), which lie `distance` from what is to be fetched.
  void rows(int64_t begin, int64_t end, const Distance& distance, float* y) const {
    for (int64_t n = begin; n < end; n += kTogether) {
      const int64_t some = end - n < kTogether ? end - n : kTogether;
      fetch_lines(w_.scales + n * w_.scale_bytes + distance.scales, some * w_.scale_bytes);
      if (Scales::kOffsets) {
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
  static constexpr int kUnit = Scales::kUnit;
  static constexpr int kSpanBytes = kSpan * Codes::kBits / 8;

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
    for (int64_t panel = 0; panel < w_.in; panel += Scales::kPanel) {
      const int64_t length = w_.in - panel < Scales::kPanel ? w_.in - panel : Scales::kPanel;
      Scales::template apply<1>(w_, n, panel, length, &row_, steps[0], offset_sums);
      Scales::template apply<1>(w_, other, panel, length, &row_, steps[1], offset_sums + 1);
      const int8_t* values = row_.codes + 2 * panel;
      const uint8_t* codes = w_.weight + n * w_.row_bytes + panel * Codes::kBits / 8;
      const ptrdiff_t next = (other - n) * w_.row_bytes;
      const uint8_t* rest = codes + length / kSpan * kSpanBytes;
      int64_t at = 0, unit = 0;
      for (; codes != rest; codes += kSpanBytes, at += 2 * kSpan, unit += kSpan / kUnit) {
        fetch_lines(fetched, 2 * kSpanBytes);
        fetched += 2 * kSpanBytes;
        Codes::template two<kUnit>(codes, codes + next, values + at, steps[0][0] + unit,
                                   steps[1][0] + unit, sums);
      }
      if (length % kSpan != 0) {
        alignas(64) uint8_t last[2][kSpanBytes] = {};
        const int64_t bytes = length % kSpan * Codes::kBits / 8;
        fetch_lines(fetched, 2 * bytes);
        __builtin_memcpy(last[0], rest, static_cast<size_t>(bytes));
        __builtin_memcpy(last[1], rest + next, static_cast<size_t>(bytes));
        Codes::template two<kUnit>(last[0], last[1], values + at, steps[0][0] + unit,
                                   steps[1][0] + unit, sums);
      }
    }
    results[0] = Codes::kFactor * (Floats)sums[0] + offset_sums[0];
    results[1] = Codes::kFactor * (Floats)sums[1] + offset_sums[1];
  }

  const Matrix w_;
  const Int15Row row_;
};

// Rows [begin, end) of a weight, in runs that lie equally far from what they fetch.
template <class Codes, class Scales>
void int15_multiply_single(const Matrix& w,
                           int64_t begin,
                           int64_t end,
                           const Int15Row& row,
                           float* y,
                           const Ahead& ahead) {
  const Int15Single<Codes, Scales> single(w, row);
  each_distance(w, begin, end, ahead, [&](int64_t from, int64_t to, const Distance& distance) {
    single.rows(from, to, distance, y + from - begin);
  });
}

}  // namespace
}  // namespace moefast

#endif
