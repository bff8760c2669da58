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
//     typedef ... Sum;                 // of a row of the weight with a row of activations: the
//                                      // lanes of a Floats
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
//     // The same for 128 codes each of two rows of the weight and one row of activations, whose
//     // quantised values begin at `values`: added to sums[0] and sums[1].
//     template <int kUnit>
//     static void two(const uint8_t* codes, const uint8_t* other, const int8_t* values,
//                     const float* steps, const float* other_steps, Sum* sums);
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

#include "unpack.h"

namespace moefast {
namespace {

constexpr int kSpan = 128;            // values
constexpr int kLayoutInParts = 1000;  // added to the layout of rows in one part
constexpr int kAlike = 64;            // values that share a step
constexpr float kLargestCode = 16256.0f;
constexpr int kMostUnits = 128;  // whose steps are made at once

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

}  // namespace
}  // namespace moefast

#endif
