// A row of a weight -> float32 values, of every format there is.
//
// w = scale * code + offset, rounded in float32, as MLX does it. Rows hold a multiple of 32 codes,
// of nvfp4 a multiple of 16.
#ifndef MOEFAST_CPU_GENERIC_UNPACK_H
#define MOEFAST_CPU_GENERIC_UNPACK_H

#include "codes.h"
#include "convert.h"

namespace moefast {
namespace {

// Values dequantised at a time, except at the end of a row.
constexpr int kChunk = 128;

// Scales (and offsets) of up to 2048 values of a row, in float32.
struct Scales {
  static constexpr int kValues = 2048;
  alignas(64) float scale[kValues / 16];
  alignas(64) float offset[kValues / 32];
};

// Those of values [from, from + count) of row `row`: whole groups.
inline void load_scales(
    const Matrix& w, int64_t row, int64_t from, int64_t count, float* scale, float* offset) {
  const Format& format = w.format;
  if (format.mode == MOEFAST_PLAIN) {
    return;
  }
  const int shift = __builtin_ctz(static_cast<unsigned>(format.group));  // a power of two
  const int64_t groups = count >> shift;
  const int64_t first = from >> shift;
  const int64_t at = row * w.scale_bytes;
  if (format.mode == MOEFAST_AFFINE) {
    const int64_t skip = at + first * size_of(format.dtype);
    widen(format.dtype, w.scales + skip, groups, scale);
    widen(format.dtype, w.biases + skip, groups, offset);
    return;
  }
  const uint8_t* codes = w.scales + at + first;
  int64_t i = 0;
  if (format.mode == MOEFAST_NVFP4) {
    for (; i + kFloats <= groups; i += kFloats) {
      store_floats(scale + i, load_e4m3(codes + i));
    }
    for (; i < groups; ++i) {
      scale[i] = widen_e4m3(codes[i]);
    }
  } else {
    for (; i + kFloats <= groups; i += kFloats) {
      store_floats(scale + i, widen_e8m0_code(load_bytes(codes + i)));
    }
    for (; i < groups; ++i) {
      scale[i] = widen_e8m0(codes[i]);
    }
  }
}

inline void load_scales(const Matrix& w, int64_t row, int64_t from, int64_t count, Scales& to) {
  load_scales(w, row, from, count, to.scale, to.offset);
}

// How the values of a format are read: `row` is a row of the weight, `from` a multiple of kChunk,
// count <= kChunk. Each class has
//
//   each(format, row, from, count, scales, take): take(i, v, values) for the vectors of values
//   [from, from + count), i counted from `from`; v is i / kFloats modulo the vectors of a run,
//   and known to the compiler
//   read(format, row, from, count, scales, to): the address of the values: `to`, or the weight
//   kPlain: the dtype of a weight that is not quantized, or -1

template <class Values>
struct Coded {
  static constexpr int kPlain = -1;
  [[gnu::always_inline]] static inline const float* read(const Format& format,
                                                         const uint8_t* row,
                                                         int64_t from,
                                                         int count,
                                                         const Scales& s,
                                                         float* to) {
    Values::each(format, row, from, count, s,
                 [to](int i, int, Floats values) { store_floats(to + i, values); });
    return to;
  }
};

template <int kBits>
struct AffineValues : Coded<AffineValues<kBits>> {
  template <class Take>
  [[gnu::always_inline]] static inline void each(const Format& format,
                                                 const uint8_t* row,
                                                 int64_t from,
                                                 int count,
                                                 const Scales& s,
                                                 const Take& take) {
    const uint8_t* run = row + from * kBits / 8;
    const int64_t first = from % Scales::kValues;
    const int shift = __builtin_ctz(static_cast<unsigned>(format.group));  // a power of two
    for (int i = 0; i < count; i += kRun, run += 4 * kBits) {
      const int64_t group = (first + i) >> shift;
      const ScaledCodes<kBits> codes(s.scale[group], s.offset[group]);
      for (int v = 0; v < kRunVectors; ++v) {
        take(i + v * kFloats, v, codes.load(run, v));
      }
    }
  }
};

template <int kGroup>
struct E2m1Values : Coded<E2m1Values<kGroup>> {
  template <class Take>
  [[gnu::always_inline]] static inline void each(const Format&,
                                                 const uint8_t* row,
                                                 int64_t from,
                                                 int count,
                                                 const Scales& s,
                                                 const Take& take) {
    constexpr int kHalf = 16 / kFloats;  // vectors of half a run
    const float* scales = s.scale + from % Scales::kValues / kGroup;
    const uint8_t* codes = row + from / 2;
    for (int i = 0; i < count; i += kRun) {
      ScaledE2m1 scaled(scales[i / kGroup]);
      for (int half = 0; half < 2 && i + 16 * half < count; ++half) {
        if (half != 0 && kGroup == 16) {
          scaled = ScaledE2m1(scales[i / kGroup + 1]);
        }
        Floats values[kHalf];
        scaled.load(codes + i / 2 + 8 * half, values);
        for (int k = 0; k < kHalf; ++k) {
          take(i + 16 * half + k * kFloats, half * kHalf + k, values[k]);
        }
      }
    }
  }
};

struct E4m3Values : Coded<E4m3Values> {
  template <class Take>
  [[gnu::always_inline]] static inline void each(const Format&,
                                                 const uint8_t* row,
                                                 int64_t from,
                                                 int count,
                                                 const Scales& s,
                                                 const Take& take) {
    const float* scales = s.scale + from % Scales::kValues / 32;
    const uint8_t* codes = row + from;
    for (int i = 0; i < count; i += kRun) {
      for (int v = 0; v < kRunVectors; ++v) {
        take(i + v * kFloats, v, scales[i / 32] * load_e4m3(codes + i + v * kFloats));
      }
    }
  }
};

template <int kType>
struct PlainValues {
  static constexpr int kPlain = kType;
  [[gnu::always_inline]] static inline const float* read(
      const Format&, const uint8_t* row, int64_t from, int count, const Scales&, float* to) {
    if constexpr (kType == MOEFAST_FLOAT32) {
      return reinterpret_cast<const float*>(row) + from;  // unaligned, as its readers expect
    } else {
      widen_values<kType>(row + from * 2, count, to);
      return to;
    }
  }
};

// Calls visit(Values{}) with the reader of a format.
template <class Visit>
inline void with_values(const Format& format, Visit visit) {
  switch (format.mode) {
    case MOEFAST_PLAIN:
      return format.dtype == MOEFAST_FLOAT32   ? visit(PlainValues<MOEFAST_FLOAT32>{})
             : format.dtype == MOEFAST_FLOAT16 ? visit(PlainValues<MOEFAST_FLOAT16>{})
                                               : visit(PlainValues<MOEFAST_BFLOAT16>{});
    case MOEFAST_MXFP4:
      return visit(E2m1Values<32>{});
    case MOEFAST_MXFP8:
      return visit(E4m3Values{});
    case MOEFAST_NVFP4:
      return visit(E2m1Values<16>{});
  }
  switch (format.bits) {
    case 2:
      return visit(AffineValues<2>{});
    case 3:
      return visit(AffineValues<3>{});
    case 4:
      return visit(AffineValues<4>{});
    case 5:
      return visit(AffineValues<5>{});
    case 6:
      return visit(AffineValues<6>{});
    case 8:
      return visit(AffineValues<8>{});
  }
}

}  // namespace
}  // namespace moefast

#endif
