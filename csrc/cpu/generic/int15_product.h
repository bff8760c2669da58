// Products of rows prepared as int15.h says: of one as int15_single.h does it, of several here.
//
// Spans of codes are what takes the time, so whatever a row of the weight costs beside them is kept
// short: its scales are read once for all rows of activations, its offsets are multiplied on the
// way, into the same sums, and results are summed up over the lanes four at a time. Each result has
// the bits that it has alone.
#ifndef MOEFAST_CPU_GENERIC_INT15_PRODUCT_H
#define MOEFAST_CPU_GENERIC_INT15_PRODUCT_H

#include "int15_single.h"
#include "prefetch.h"

namespace moefast {
namespace {

// Row n of the weight with kRows prepared rows, of which kParts that follow one another make one
// row of the result: the lanes of each result's sum, but for the factor of the weight.
template <class Codes, class Scales, int kParts, int kRows>
[[gnu::always_inline]] inline void int15_row(
    const Matrix& w, const Fetcher& fetcher, int64_t n, const Int15Row* rows, Floats* results) {
  constexpr int kUnit = Scales::kUnit;
  constexpr int kSpanBytes = kSpan * Codes::kBits / 8;
  alignas(64) float steps[kRows][kMostUnits];
  typename Codes::Sum sums[kRows] = {};
  Floats offsets[kRows] = {};
  for (int64_t panel = 0; panel < w.in; panel += Scales::kPanel) {
    const int64_t length = w.in - panel < Scales::kPanel ? w.in - panel : Scales::kPanel;
    const uint8_t* codes = w.weight + n * w.row_bytes + panel * Codes::kBits / 8;
    const uint8_t* later = fetcher.later(codes);
    fetcher.scales(w, n, Scales::bytes(panel), Scales::bytes(length));
    Scales::template apply<kRows>(w, n, panel, length, rows, steps, offsets);
    int64_t at = 0;
    for (; at + kSpan <= length; at += kSpan) {
      const int64_t byte = at * Codes::kBits / 8;
      fetch_lines(later + byte, kSpanBytes);
      Codes::template span<kUnit, kRows>(codes + byte, rows, 2 * (panel + at), steps, at / kUnit,
                                         sums);
    }
    if (at < length) {
      alignas(64) uint8_t rest[kSpanBytes] = {};
      __builtin_memcpy(rest, codes + at * Codes::kBits / 8,
                       static_cast<size_t>((length - at) * Codes::kBits / 8));
      Codes::template span<kUnit, kRows>(rest, rows, 2 * (panel + at), steps, at / kUnit, sums);
    }
  }
  for (int r = 0; r < kRows; r += kParts) {
    Floats total = {};
    for (int part = kParts; part-- > 0;) {  // the finest first
      total += Codes::kFactor * (Floats)sums[r + part] + offsets[r + part];
    }
    results[r / kParts] = total;
  }
}

// Two rows of the result at least, or two that make one.
template <class Codes, class Scales, int kParts, int kRows>
void int15_multiply_rows(const Matrix& w,
                         const Fetcher& fetcher,
                         int64_t begin,
                         int64_t end,
                         const Int15Row* rows,
                         float* y,
                         int64_t ldy) {
  static_assert(kRows > 1);
  constexpr int kResults = kRows / kParts;
  constexpr int kTogether = kResults == 1 ? 4 : 1;  // rows of the weight
  float four[4];
  for (int64_t n = begin; n < end; n += kTogether) {
    Floats sums[4] = {};
    const int64_t some = end - n < kTogether ? end - n : kTogether;
    for (int64_t i = 0; i < some; ++i) {
      int15_row<Codes, Scales, kParts, kRows>(w, fetcher, n + i, rows, sums + i);
    }
    sum_four(sums, four);
    const int64_t results = kResults == 1 ? some : kResults;
    for (int64_t r = 0; r < results; ++r) {
      y[(kResults == 1 ? r : r * ldy) + n - begin] = w.factor * four[r];
    }
  }
}

// Up to four prepared rows at once: the weights are unpacked for all of them.
template <class Codes, class Scales, int kParts>
void int15_multiply_blocks(const Matrix& w,
                           int64_t begin,
                           int64_t end,
                           const void* const* rows,
                           int64_t count,
                           float* y,
                           int64_t ldy,
                           const Ahead& ahead) {
  constexpr int kTogether = 4 / kParts;
  const Int15Layout layout(w.format, w.in);
  const Fetcher last(w, end, ahead), again(w, end, Ahead{});
  for (int64_t first = 0; first < count; first += kTogether) {
    const int64_t together = count - first < kTogether ? count - first : kTogether;
    Int15Row block[4];
    for (int64_t r = 0; r < together * kParts; ++r) {
      const auto* prepared = static_cast<const uint8_t*>(rows[first + r / kParts]);
      block[r] = layout.row(prepared + r % kParts * layout.bytes);
    }
    const Fetcher& fetcher = first + together == count ? last : again;
    float* to = y + first * ldy;
    switch (together * kParts) {
      case 1:
        if constexpr (kParts == 1) {
          int15_multiply_single<Codes, Scales>(w, begin, end, block[0], to,
                                               count == 1 ? ahead : Ahead{});
        }
        break;
      case 2:
        int15_multiply_rows<Codes, Scales, kParts, 2>(w, fetcher, begin, end, block, to, ldy);
        break;
      case 3:
        if constexpr (kParts == 1) {
          int15_multiply_rows<Codes, Scales, 1, 3>(w, fetcher, begin, end, block, to, ldy);
        }
        break;
      default:
        int15_multiply_rows<Codes, Scales, kParts, 4>(w, fetcher, begin, end, block, to, ldy);
    }
  }
}

template <class Codes, int kParts>
void int15_multiply(const Matrix& w,
                    int64_t begin,
                    int64_t end,
                    const void* const* rows,
                    int64_t count,
                    float* y,
                    int64_t ldy,
                    const Ahead& ahead) {
  with_scales<Codes>(w.format, [&](auto scales) {
    int15_multiply_blocks<Codes, decltype(scales), kParts>(w, begin, end, rows, count, y, ldy,
                                                           ahead);
  });
}

template <class Codes>
const Product* int15_product() {
  static constexpr Product kProduct = {"int15",
                                       Codes::kLayout,
                                       true,
                                       int15_prepared_bytes<1>,
                                       int15_prepare<Codes, 1>,
                                       int15_multiply<Codes, 1>};
  return &kProduct;
}

// Rows up to which two of 15 bits for each are faster than the generic product, which shares the
// work on the weights among more.
constexpr int64_t kMostInParts = 3;

// For float32, where codes have no offsets: beside those, what the sums are short of would be seen.
template <class Codes>
const Product* int30_product() {
  static constexpr Product kProduct = {"2 x int15",
                                       Codes::kLayout + kLayoutInParts,
                                       true,
                                       int15_prepared_bytes<2>,
                                       int15_prepare<Codes, 2>,
                                       int15_multiply<Codes, 2>};
  return &kProduct;
}

}  // namespace
}  // namespace moefast

#endif
