// Scales and offsets of a row of the weight, made ready for rows prepared as int15.h says.
//
// Kinds of scales and lengths of groups are parameters of the templates: in rows as short as 512
// values, asking for them took as long as the codes.
#ifndef MOEFAST_CPU_GENERIC_INT15_SCALES_H
#define MOEFAST_CPU_GENERIC_INT15_SCALES_H

#include "int15.h"
#include "lanes.h"

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

template <class OfScales, int kOfGroup>
struct Int15Scales {
  static constexpr int kGroup = kOfGroup;
  static constexpr bool kOffsets = OfScales::kOffsets;
  static constexpr int kUnit = kGroup < kAlike ? kGroup : kAlike;
  static constexpr int64_t kPanel = kMostUnits * kUnit;  // values whose steps are made at once

  // Of the scales of so many values.
  static int64_t bytes(int64_t values) { return values / kGroup * kSize; }

  // Values [panel, panel + length) of row n: the steps of each row's units, those of the row of
  // activations times those of the weight, with zeros up to the end of the last span; and offsets
  // times the sums of their groups, added to `sums`.
  template <int kRows>
  [[gnu::always_inline]] static void apply(const Matrix& w,
                                           int64_t n,
                                           int64_t panel,
                                           int64_t length,
                                           const Int15Row* rows,
                                           float (*steps)[kMostUnits],
                                           Floats* sums) {
    const int64_t first = panel / kGroup, groups = length / kGroup;
    const int64_t at = n * w.scale_bytes + first * kSize;
    const uint8_t* scales = w.scales + at;
    const uint8_t* offsets = kOffsets ? w.biases + at : scales;
    if (groups < kFloats) {
      const auto bytes = static_cast<size_t>(groups * kSize);
      alignas(64) uint8_t few[kFloats * kSize] = {};
      __builtin_memcpy(few, scales, bytes);
      scale_some<kRows>(rows, first, few, 0, steps);
      if (kOffsets) {
        __builtin_memcpy(few, offsets, bytes);
        add_offsets<kRows>(rows, first, few, Ints{} - 1, sums);
      }
    } else {
      int64_t i = 0;
      for (; i + kFloats <= groups; i += kFloats) {
        scale_some<kRows>(rows, first, scales + i * kSize, i, steps);
        add_offsets<kRows>(rows, first + i, offsets + i * kSize, Ints{} - 1, sums);
      }
      if (i < groups) {  // the last ones once more: quicker than copying the rest
        const int64_t last = groups - kFloats;
        scale_some<kRows>(rows, first, scales + last * kSize, last, steps);
        add_offsets<kRows>(rows, first + last, offsets + last * kSize, last_lanes(groups - i),
                           sums);
      }
    }
    for (int64_t unit = groups * kUnits; unit % (kSpan / kUnit) != 0; ++unit) {
      for (int r = 0; r < kRows; ++r) {
        steps[r][unit] = 0;
      }
    }
  }

 private:
  static constexpr int kUnits = kGroup / kUnit;
  static constexpr int kSize = OfScales::kSize;

  // The steps of groups [i, i + kFloats) of those from `first` on.
  template <int kRows>
  [[gnu::always_inline]] static void scale_some(const Int15Row* rows,
                                                int64_t first,
                                                const uint8_t* scales,
                                                int64_t i,
                                                float (*steps)[kMostUnits]) {
    const Floats scale = OfScales::load(scales);
    for (int r = 0; r < kRows; ++r) {
      const float* from = rows[r].steps + (first + i) * kUnits;
      if constexpr (kUnits == 2) {
        store_floats(steps[r] + 2 * i, Interleave<kFloats>::low(scale, scale) * load_floats(from));
        store_floats(steps[r] + 2 * i + kFloats,
                     Interleave<kFloats>::high(scale, scale) * load_floats(from + kFloats));
      } else {
        store_floats(steps[r] + i, scale * load_floats(from));
      }
    }
  }

  // Offsets times sums of groups [group, group + kFloats), but for the lanes outside `lanes`.
  template <int kRows>
  [[gnu::always_inline]] static void add_offsets(
      const Int15Row* rows, int64_t group, const uint8_t* offsets, Ints lanes, Floats* sums) {
    if constexpr (kOffsets) {
      const Floats offset = as_floats(as_ints(OfScales::load(offsets)) & lanes);
      for (int r = 0; r < kRows; ++r) {
        sums[r] += offset * load_floats(rows[r].sums + group);
      }
    }
  }
};

template <class OfScales, class Function>
inline void with_groups(int group, Function function) {
  switch (group) {
    case 32:
      return function(Int15Scales<OfScales, 32>{});
    case 64:
      return function(Int15Scales<OfScales, 64>{});
    default:
      return function(Int15Scales<OfScales, 128>{});
  }
}

// function(scales) for those of a format of such codes; they come as a type.
template <class Codes, class Function>
inline void with_scales(const Format& format, Function function) {
  if constexpr (Codes::kFineUnit == 16) {  // e2m1
    return format.mode == MOEFAST_NVFP4 ? function(Int15Scales<E4m3Scales, 16>{})
                                        : function(Int15Scales<E8m0Scales, 32>{});
  } else {
    switch (format.dtype) {
      case MOEFAST_FLOAT32:
        return with_groups<AffineScales<MOEFAST_FLOAT32>>(format.group, function);
      case MOEFAST_FLOAT16:
        return with_groups<AffineScales<MOEFAST_FLOAT16>>(format.group, function);
      default:
        return with_groups<AffineScales<MOEFAST_BFLOAT16>>(format.group, function);
    }
  }
}

}  // namespace
}  // namespace moefast

#endif
