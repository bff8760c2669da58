// Products with activations quantised to 15 bits: their sums are exact whole numbers, and short.
//
// Each block of 64 values of a row is x = step * q with q in -16256..16256 (127 * 128), step being
// the largest magnitude over 16256. A weight is scale * code + offset, so that a group gives
//
//   scale * step * sum(code * q) + offset * step * sum(q)
//
// The first sum is for a file of an instruction set to compute: its `Codes` say how.
//
//   struct Codes {
//     static constexpr int kLayout;    // of prepared rows
//     static constexpr int kBits;      // of a code
//     static constexpr int kFineUnit;  // the shorter of its two units: the other is twice that
//     static constexpr float kFactor;  // of the sums: codes may be read as multiples
//     typedef ... Sum;                 // of a row of the weight with a row of activations
//
//     // 128 quantised values in the order and form in which span reads them: 256 bytes.
//     static void arrange(const int32_t* q, int8_t* to);
//
//     // Adds the products of 128 codes, times the steps of their units, to kRows sums. kUnit
//     // values share a scale and a step; those at steps[r][unit] are the first unit's. `at` is
//     // where the quantised values begin.
//     template <int kUnit, int kRows>
//     static void span(const uint8_t* codes, const Int15Row* rows, int64_t at,
//                      const float (*steps)[kMostUnits], int64_t unit, Sum* sums);
//
//     static float total(Sum sum);
//   };
//
// Prepared: the quantised values of a row, with zeros up to a multiple of 128; the step of each
// unit; step * sum(q) of each group.
#ifndef MOEFAST_CPU_GENERIC_INT15_H
#define MOEFAST_CPU_GENERIC_INT15_H

#include "prefetch.h"
#include "unpack.h"

namespace moefast {
namespace {

constexpr int kSpan = 128;  // values
constexpr int kAlike = 64;  // values that share a step
constexpr float kLargestCode = 16256.0f;
// Units of the values whose scales are loaded at once, of 16 values at least.
constexpr int kMostUnits = Scales::kValues / 16;

// Values that share a scale and a step.
inline int unit_of(const Format& format) {
  return format.group < kAlike ? format.group : kAlike;
}

// A prepared row. Units and groups have zeros up to a multiple of 16, and of a span.
struct Int15Row {
  const int8_t* codes;
  const float* steps;
  const float* sums;
};

struct Int15Layout {
  int64_t codes, steps, sums, bytes;

  Int15Layout(const Format& format, int64_t in) {
    const int64_t values = round_up(in, kSpan);
    codes = 0;
    steps = 2 * values;
    sums = steps + 4 * round_up(values / unit_of(format), 16);
    bytes = sums + 4 * round_up(values / format.group + 1, 16);
  }

  Int15Row row(const void* prepared) const {
    const uint8_t* at = static_cast<const uint8_t*>(prepared);
    return {reinterpret_cast<const int8_t*>(at + codes), reinterpret_cast<const float*>(at + steps),
            reinterpret_cast<const float*>(at + sums)};
  }
};

inline int64_t int15_prepared_bytes(const Format& format, int64_t in, int64_t count) {
  return Int15Layout(format, in).bytes * count;
}

// The largest magnitude of 64 values, as bits: those of infinity and NaN are larger than any.
inline int32_t largest_bits(const float* x) {
  Ints most = {};
  for (int i = 0; i < kAlike; i += kFloats) {
    const Ints bits = as_ints(load_floats(x + i)) & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  return across(most, [](int32_t a, int32_t b) { return a > b ? a : b; });
}

// q = x / step to the nearest whole number.
inline void quantise(const float* x, float inverse_step, int32_t* q) {
  const float whole = 12582912.0f;  // 1.5 * 2^23
  for (int i = 0; i < kAlike; i += kFloats) {
    const Ints shifted = as_ints(load_floats(x + i) * inverse_step + whole);
    store_ints(q + i, shifted - static_cast<int32_t>(bits_of(whole)));
  }
}

inline int32_t sum_of(const int32_t* q, int count) {
  Ints sum = {};
  for (int i = 0; i < count; i += kFloats) {
    sum += load_ints(q + i);
  }
  return sum_across(sum);
}

template <class Codes>
bool int15_prepare_row(const Format& format, int dtype, const void* from, int64_t in, uint8_t* to) {
  const Int15Layout layout(format, in);
  const int unit = unit_of(format);
  const int unit_shift = __builtin_ctz(static_cast<unsigned>(unit));  // powers of two
  const int group_shift = __builtin_ctz(static_cast<unsigned>(format.group));
  int8_t* codes = reinterpret_cast<int8_t*>(to + layout.codes);
  float* steps = reinterpret_cast<float*>(to + layout.steps);
  float* sums = reinterpret_cast<float*>(to + layout.sums);
  __builtin_memset(steps, 0, static_cast<size_t>(layout.bytes - layout.steps));
  for (int64_t at = 0; at < in; at += kSpan) {
    alignas(64) float x[kSpan];
    alignas(64) int32_t q[kSpan];
    const int64_t count = in - at < kSpan ? in - at : kSpan;
    widen(dtype, static_cast<const uint8_t*>(from) + at * size_of(dtype), count, x);
    for (int64_t i = count; i < kSpan; ++i) {
      x[i] = 0;
    }
    for (int block = 0; block < kSpan; block += kAlike) {
      const int32_t largest = largest_bits(x + block);
      const float magnitude = as_floats(largest);
      // Beyond, the reciprocal or a product might leave float32's range.
      if (largest > as_ints(1e30f) || (largest != 0 && largest < as_ints(1e-30f))) {
        return false;
      }
      const float step = magnitude / kLargestCode;
      quantise(x + block, largest == 0 ? 0.0f : kLargestCode / magnitude, q + block);
      for (int i = 0; i < kAlike; i += unit) {
        const int64_t first = at + block + i;
        steps[first >> unit_shift] = step;
        sums[first >> group_shift] += step * static_cast<float>(sum_of(q + block + i, unit));
      }
    }
    Codes::arrange(q, codes + 2 * at);
  }
  return true;
}

template <class Codes>
bool int15_prepare(const Format& format,
                   int dtype,
                   const void* const* rows,
                   int64_t count,
                   int64_t in,
                   void* prepared) {
  uint8_t* to = static_cast<uint8_t*>(prepared);
  const int64_t stride = Int15Layout(format, in).bytes;
  for (int64_t r = 0; r < count; ++r) {
    if (!int15_prepare_row<Codes>(format, dtype, rows[r], in, to + r * stride)) {
      return false;
    }
  }
  return true;
}

// Scales of a panel, one for each unit, with zeros up to a multiple of a span; and offsets, with
// zeros up to a whole vector.
template <int kUnit>
inline void load_unit_scales(
    const Matrix& w, int64_t row, int64_t from, int64_t count, float* units, float* offsets) {
  load_scales(w, row, from, count, units, offsets);
  const int64_t groups = count / w.format.group;
  for (int64_t i = groups; i % kFloats != 0; ++i) {
    offsets[i] = 0;
  }
  if (w.format.group > kUnit) {  // 128: two units of 64
    for (int64_t i = groups - 1; i >= 0; --i) {
      units[2 * i] = units[2 * i + 1] = units[i];
    }
    return;
  }
  for (int64_t i = groups; i < round_up(count, kSpan) / kUnit; ++i) {
    units[i] = 0;
  }
}

// steps[i] = scales[i] * of_row[i], a multiple of a vector of them (what is too much is not used).
inline void scale_steps(const float* scales, const float* of_row, int64_t count, float* steps) {
  for (int64_t i = 0; i < count; i += kFloats) {
    store_floats(steps + i, load_floats(scales + i) * load_floats(of_row + i));
  }
}

inline Floats dot_offsets(const float* offsets, const float* sums, int64_t groups) {
  Floats total = {};
  for (int64_t i = 0; i < groups; i += kFloats) {
    total += load_floats(offsets + i) * load_floats(sums + i);
  }
  return total;
}

template <class Codes, int kUnit, int kRows>
void int15_multiply_rows(const Matrix& w,
                         int64_t begin,
                         int64_t end,
                         const Int15Row* rows,
                         const Fetcher& fetcher,
                         float* y,
                         int64_t ldy) {
  constexpr int kSpanBytes = kSpan * Codes::kBits / 8;
  alignas(64) float units[kMostUnits];
  alignas(64) float of_groups[kMostUnits];
  alignas(64) float steps[kRows][kMostUnits];
  for (int64_t n = begin; n < end; ++n) {
    typename Codes::Sum sums[kRows] = {};
    Floats offsets[kRows] = {};
    for (int64_t panel = 0; panel < w.in; panel += Scales::kValues) {
      const int64_t left = w.in - panel;
      const int64_t length = left < Scales::kValues ? left : Scales::kValues;
      const uint8_t* codes = w.weight + n * w.row_bytes + panel * Codes::kBits / 8;
      const uint8_t* later = fetcher.later(codes);
      load_unit_scales<kUnit>(w, n, panel, length, units, of_groups);
      fetcher.scales(w, n, w.scale_bytes * panel / w.in, w.scale_bytes * length / w.in);
      for (int r = 0; r < kRows; ++r) {
        scale_steps(units, rows[r].steps + panel / kUnit, round_up(length, kSpan) / kUnit,
                    steps[r]);
        if (w.format.mode == MOEFAST_AFFINE) {
          offsets[r] += dot_offsets(of_groups, rows[r].sums + panel / w.format.group,
                                    length / w.format.group);
        }
      }
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
    for (int r = 0; r < kRows; ++r) {
      y[r * ldy + n - begin] =
          w.factor * (Codes::kFactor * Codes::total(sums[r]) + sum_across(offsets[r]));
    }
  }
}

// Up to four rows at once: the weights are unpacked for all of them.
template <class Codes, int kUnit>
void int15_multiply_units(const Matrix& w,
                          int64_t begin,
                          int64_t end,
                          const void* const* rows,
                          int64_t count,
                          float* y,
                          int64_t ldy,
                          const Ahead& ahead) {
  const Int15Layout layout(w.format, w.in);
  const Fetcher last(w, end, ahead), again(w, end, Ahead{});
  for (int64_t first = 0; first < count; first += 4) {
    const int64_t together = count - first < 4 ? count - first : 4;
    Int15Row block[4];
    for (int64_t r = 0; r < together; ++r) {
      block[r] = layout.row(rows[first + r]);
    }
    const Fetcher& fetcher = first + together == count ? last : again;
    float* to = y + first * ldy;
    switch (together) {
      case 1:
        int15_multiply_rows<Codes, kUnit, 1>(w, begin, end, block, fetcher, to, ldy);
        break;
      case 2:
        int15_multiply_rows<Codes, kUnit, 2>(w, begin, end, block, fetcher, to, ldy);
        break;
      case 3:
        int15_multiply_rows<Codes, kUnit, 3>(w, begin, end, block, fetcher, to, ldy);
        break;
      default:
        int15_multiply_rows<Codes, kUnit, 4>(w, begin, end, block, fetcher, to, ldy);
    }
  }
}

template <class Codes>
void int15_multiply(const Matrix& w,
                    int64_t begin,
                    int64_t end,
                    const void* const* rows,
                    int64_t count,
                    float* y,
                    int64_t ldy,
                    const Ahead& ahead) {
  if (unit_of(w.format) == Codes::kFineUnit) {
    int15_multiply_units<Codes, Codes::kFineUnit>(w, begin, end, rows, count, y, ldy, ahead);
  } else {
    int15_multiply_units<Codes, 2 * Codes::kFineUnit>(w, begin, end, rows, count, y, ldy, ahead);
  }
}

template <class Codes>
const Product* int15_product() {
  static constexpr Product kProduct = {"int15",
                                       Codes::kLayout,
                                       true,
                                       int15_prepared_bytes,
                                       int15_prepare<Codes>,
                                       int15_multiply<Codes>};
  return &kProduct;
}

}  // namespace
}  // namespace moefast

#endif
