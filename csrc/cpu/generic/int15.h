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
//
// Float32 wants more bits. A row is then two, x = step * q + step / 2^14 * r, and its product is
// the sum of theirs: 27 bits below the largest of a block, more than a float's own 24. What that
// costs is a second row of activations, which shares all the work on the weights.
#ifndef MOEFAST_CPU_GENERIC_INT15_H
#define MOEFAST_CPU_GENERIC_INT15_H

#include "prefetch.h"
#include "unpack.h"

namespace moefast {
namespace {

constexpr int kSpan = 128;            // values
constexpr int kLayoutInParts = 1000;  // added to the layout of rows in one part
constexpr int kAlike = 64;            // values that share a step
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

template <int kParts>
int64_t int15_prepared_bytes(const Format& format, int64_t in, int64_t count) {
  return kParts * Int15Layout(format, in).bytes * count;
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

// The largest power of two that is at most `magnitude`.
inline float power_below(float magnitude) {
  return as_floats(as_ints(magnitude) & 0x7f800000);
}

// x - step * q, which is exact where q is the nearest whole number and step a power of two.
inline void take_rest(float* x, float step, const int32_t* q) {
  for (int i = 0; i < kAlike; i += kFloats) {
    store_floats(x + i, load_floats(x + i) - step * converted(load_ints(q + i)));
  }
}

// One row as kParts: of a second one the steps are finer by kFiner.
template <class Codes, int kParts>
bool int15_prepare_row(const Format& format, int dtype, const void* from, int64_t in, uint8_t* to) {
  // Beyond, the reciprocal or a product might leave float32's range.
  constexpr float kLargest = 1e30f, kSmallest = kParts == 1 ? 1e-30f : 1e-26f;
  constexpr float kFiner = 16384;
  const Int15Layout layout(format, in);
  const int unit = unit_of(format);
  const int unit_shift = __builtin_ctz(static_cast<unsigned>(unit));  // powers of two
  const int group_shift = __builtin_ctz(static_cast<unsigned>(format.group));
  for (int part = 0; part < kParts; ++part) {
    __builtin_memset(to + part * layout.bytes + layout.steps, 0,
                     static_cast<size_t>(layout.bytes - layout.steps));
  }
  for (int64_t at = 0; at < in; at += kSpan) {
    alignas(64) float x[kSpan];
    alignas(64) int32_t q[kParts][kSpan];
    const int64_t count = in - at < kSpan ? in - at : kSpan;
    widen(dtype, static_cast<const uint8_t*>(from) + at * size_of(dtype), count, x);
    for (int64_t i = count; i < kSpan; ++i) {
      x[i] = 0;
    }
    for (int block = 0; block < kSpan; block += kAlike) {
      const int32_t largest = largest_bits(x + block);
      const float magnitude = as_floats(largest);
      if (largest > as_ints(kLargest) || (largest != 0 && largest < as_ints(kSmallest))) {
        return false;
      }
      float step = kParts == 1 ? magnitude / kLargestCode : power_below(magnitude) / 4096;
      for (int part = 0; part < kParts; ++part, step /= kFiner) {
        uint8_t* row = to + part * layout.bytes;
        float* steps = reinterpret_cast<float*>(row + layout.steps);
        float* sums = reinterpret_cast<float*>(row + layout.sums);
        const float inverse = kParts == 1 ? kLargestCode / magnitude : 1 / step;
        quantise(x + block, largest == 0 ? 0.0f : inverse, q[part] + block);
        for (int i = 0; i < kAlike; i += unit) {
          const int64_t first = at + block + i;
          steps[first >> unit_shift] = step;
          sums[first >> group_shift] +=
              step * static_cast<float>(sum_of(q[part] + block + i, unit));
        }
        if (part + 1 < kParts) {
          take_rest(x + block, step, q[part] + block);
        }
      }
    }
    for (int part = 0; part < kParts; ++part) {
      Codes::arrange(q[part], reinterpret_cast<int8_t*>(to + part * layout.bytes) + 2 * at);
    }
  }
  return true;
}

template <class Codes, int kParts>
bool int15_prepare(const Format& format,
                   int dtype,
                   const void* const* rows,
                   int64_t count,
                   int64_t in,
                   void* prepared) {
  uint8_t* to = static_cast<uint8_t*>(prepared);
  const int64_t stride = kParts * Int15Layout(format, in).bytes;
  for (int64_t r = 0; r < count; ++r) {
    if (!int15_prepare_row<Codes, kParts>(format, dtype, rows[r], in, to + r * stride)) {
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

// kRows prepared rows, of which kParts that follow one another make one row of the result.
template <class Codes, int kParts, int kUnit, int kRows>
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
    for (int r = 0; r < kRows; r += kParts) {
      float total = 0;
      for (int part = kParts; part-- > 0;) {  // the finest first
        total += Codes::kFactor * Codes::total(sums[r + part]) + sum_across(offsets[r + part]);
      }
      y[r / kParts * ldy + n - begin] = w.factor * total;
    }
  }
}

// Up to four prepared rows at once: the weights are unpacked for all of them.
template <class Codes, int kParts, int kUnit>
void int15_multiply_units(const Matrix& w,
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
          int15_multiply_rows<Codes, 1, kUnit, 1>(w, begin, end, block, fetcher, to, ldy);
        }
        break;
      case 2:
        int15_multiply_rows<Codes, kParts, kUnit, 2>(w, begin, end, block, fetcher, to, ldy);
        break;
      case 3:
        if constexpr (kParts == 1) {
          int15_multiply_rows<Codes, 1, kUnit, 3>(w, begin, end, block, fetcher, to, ldy);
        }
        break;
      default:
        int15_multiply_rows<Codes, kParts, kUnit, 4>(w, begin, end, block, fetcher, to, ldy);
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
  if (unit_of(w.format) == Codes::kFineUnit) {
    int15_multiply_units<Codes, kParts, Codes::kFineUnit>(w, begin, end, rows, count, y, ldy,
                                                          ahead);
  } else {
    int15_multiply_units<Codes, kParts, 2 * Codes::kFineUnit>(w, begin, end, rows, count, y, ldy,
                                                              ahead);
  }
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
