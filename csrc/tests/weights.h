// Random weights of every format, and the truth about them in float64, one value at a time.
#ifndef MOEFAST_TESTS_WEIGHTS_H
#define MOEFAST_TESTS_WEIGHTS_H

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "guarded.h"
#include "types.h"

namespace moefast::testing {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15 + 1) {}

  uint64_t bits() {  // xorshift64*
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return state_ * 0x2545f4914f6cdd1d;
  }
  int below(int limit) { return static_cast<int>((bits() >> 33) % static_cast<uint64_t>(limit)); }
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
  double normal() {
    return std::sqrt(-2 * std::log(1 - uniform())) * std::cos(2 * M_PI * uniform());
  }

 private:
  uint64_t state_;
};

// Sign, exponent and mantissa with IEEE's bias and subnormals, without infinities.
inline double minifloat(unsigned code, int exponent_bits, int mantissa_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int mantissa = static_cast<int>(code & ((1u << mantissa_bits) - 1));
  const int exponent = static_cast<int>(code >> mantissa_bits & ((1u << exponent_bits) - 1));
  const double sign = code >> (exponent_bits + mantissa_bits) & 1 ? -1 : 1;
  const int implied = exponent == 0 ? 0 : 1 << mantissa_bits;
  return sign * std::ldexp(implied + mantissa, std::max(exponent, 1) - bias - mantissa_bits);
}

inline double half_value(int dtype, uint16_t half) {
  const int mantissa_bits = dtype == MOEFAST_FLOAT16 ? 10 : 7;
  const unsigned exponents = dtype == MOEFAST_FLOAT16 ? 31 : 255;
  if ((half >> mantissa_bits & exponents) == exponents) {
    const double infinity = half >> 15 ? -INFINITY : INFINITY;
    return half & ((1u << mantissa_bits) - 1) ? NAN : infinity;
  }
  return minifloat(half, 15 - mantissa_bits, mantissa_bits);
}

inline double value_of(int dtype, const uint8_t* at) {
  if (dtype == MOEFAST_FLOAT32) {
    float value;
    std::memcpy(&value, at, 4);
    return value;
  }
  uint16_t half;
  std::memcpy(&half, at, 2);
  return half_value(dtype, half);
}

// Rounds towards zero: what a test asks for need not be exact, but known.
inline void put(int dtype, double value, uint8_t* at) {
  const float single = static_cast<float>(value);
  if (dtype == MOEFAST_FLOAT32) {
    std::memcpy(at, &single, 4);
    return;
  }
  uint16_t half;
  if (dtype == MOEFAST_BFLOAT16) {
    uint32_t bits;
    std::memcpy(&bits, &single, 4);
    half = static_cast<uint16_t>(bits >> 16);
  } else {
    const double magnitude = std::fabs(value);
    const int exponent = magnitude < 0x1p-14 ? -14 : std::ilogb(magnitude);
    const int mantissa = static_cast<int>(std::ldexp(magnitude, 10 - exponent));
    const int code = exponent > 15 ? 0x7c00 : mantissa + ((exponent + 14) << 10);
    half = static_cast<uint16_t>(code | (std::signbit(value) ? 0x8000 : 0));
  }
  std::memcpy(at, &half, 2);
}

// A random weight in memory of its own.
class Weight {
 public:
  // kWhole: whole numbers between -128 and 128, or halves of them, and factor 1.
  enum Values { kAny, kWhole };

  Weight(const Format& format,
         int64_t out,
         int64_t in,
         Guarded::Side side,
         uint64_t seed,
         Values values = kAny)
      : matrix_(shape(format, out, in)),
        weight_(static_cast<size_t>(out * matrix_.row_bytes), side),
        scales_(static_cast<size_t>(out * matrix_.scale_bytes), side),
        biases_(static_cast<size_t>(out * matrix_.scale_bytes), side) {
    Random random(seed);
    if (values == kAny) {
      fill_codes(random);
      fill_scales(random);
    } else {
      fill_whole(random);
    }
    matrix_.weight = weight_.data();
    if (format.mode != MOEFAST_PLAIN) {
      matrix_.scales = scales_.data();
    }
    if (format.mode == MOEFAST_AFFINE) {
      matrix_.biases = biases_.data();
    }
    if (format.mode == MOEFAST_NVFP4 && values == kAny) {
      matrix_.factor = 3.7f / (448 * 6);
    }
  }

  const Matrix& matrix() const { return matrix_; }

  // Without the factor.
  double value(int64_t row, int64_t column) const {
    const Format& f = matrix_.format;
    const uint8_t* codes = matrix_.weight + row * matrix_.row_bytes;
    if (f.mode == MOEFAST_PLAIN) {
      return value_of(f.dtype, codes + column * size_of(f.dtype));
    }
    unsigned code = 0;
    for (int bit = 0; bit < f.bits; ++bit) {
      const int64_t at = column * f.bits + bit;
      code |= static_cast<unsigned>(codes[at / 8] >> (at % 8) & 1) << bit;
    }
    const int64_t group = column / f.group;
    const uint8_t* scales = matrix_.scales + row * matrix_.scale_bytes;
    switch (f.mode) {
      case MOEFAST_MXFP4:
        return minifloat(code, 2, 1) * std::ldexp(1.0, scales[group] - 127);
      case MOEFAST_MXFP8:
        return minifloat(code, 4, 3) * std::ldexp(1.0, scales[group] - 127);
      case MOEFAST_NVFP4:
        return minifloat(code, 2, 1) * minifloat(scales[group], 4, 3);
    }
    const int64_t at = group * size_of(f.dtype);
    const uint8_t* biases = matrix_.biases + row * matrix_.scale_bytes;
    return code * value_of(f.dtype, scales + at) + value_of(f.dtype, biases + at);
  }

 private:
  static Matrix shape(const Format& f, int64_t out, int64_t in) {
    Matrix m{};
    m.format = f;
    m.out = out;
    m.in = in;
    m.factor = 1;
    m.row_bytes = in * f.bits / 8;
    if (f.mode != MOEFAST_PLAIN) {
      m.scale_bytes = in / f.group * (f.mode == MOEFAST_AFFINE ? size_of(f.dtype) : 1);
    }
    return m;
  }

  void fill_codes(Random& random) {
    const Matrix& m = matrix_;
    if (m.format.mode == MOEFAST_PLAIN) {
      for (int64_t i = 0; i < m.out * m.in; ++i) {
        put(m.format.dtype, 0.05 * random.normal(), weight_.data() + i * size_of(m.format.dtype));
      }
      return;
    }
    for (int64_t i = 0; i < m.out * m.row_bytes; ++i) {
      weight_.data()[i] = static_cast<uint8_t>(random.below(256));
    }
  }

  void fill_scales(Random& random) {
    const Matrix& m = matrix_;
    if (m.format.mode == MOEFAST_PLAIN) {
      return;
    }
    const bool affine = m.format.mode == MOEFAST_AFFINE;
    const int64_t size = affine ? size_of(m.format.dtype) : 1;
    for (int64_t i = 0; i < m.out * m.scale_bytes / size; ++i) {
      if (affine) {  // the range of a group of normal values, more or less
        const double scale = 0.3 * (0.5 + random.uniform()) / (1 << m.format.bits);
        put(m.format.dtype, scale, scales_.data() + i * size);
        put(m.format.dtype, -scale * (1 << m.format.bits) * (0.4 + 0.2 * random.uniform()),
            biases_.data() + i * size);
      } else if (m.format.mode == MOEFAST_NVFP4) {
        scales_.data()[i] = static_cast<uint8_t>(random.below(127));
      } else {
        scales_.data()[i] = static_cast<uint8_t>(118 + random.below(6));
      }
    }
  }

  void fill_whole(Random& random) {
    const Matrix& m = matrix_;
    const Format& f = m.format;
    for (int64_t i = 0; i < m.out * m.row_bytes; ++i) {
      uint8_t& code = weight_.data()[i];
      do {
        code = static_cast<uint8_t>(random.below(256));
      } while (f.mode == MOEFAST_MXFP8 && !small_and_whole(minifloat(code, 4, 3)));
    }
    for (int64_t i = 0; f.mode == MOEFAST_PLAIN && i < m.out * m.in; ++i) {
      put(f.dtype, random.below(17) - 8, weight_.data() + i * size_of(f.dtype));
    }
    const int64_t size = f.mode == MOEFAST_AFFINE ? size_of(f.dtype) : 1;
    for (int64_t i = 0; i < m.out * m.scale_bytes; i += size) {
      if (f.mode == MOEFAST_AFFINE) {
        put(f.dtype, 1, scales_.data() + i);
        put(f.dtype, -(1 << (f.bits - 1)), biases_.data() + i);
      } else {
        scales_.data()[i] = f.mode == MOEFAST_NVFP4 ? 0x38 : 127;  // 1
      }
    }
  }

  static bool small_and_whole(double value) {
    return std::fabs(value) <= 8 && value == std::trunc(value);
  }

  Matrix matrix_;
  Guarded weight_, scales_, biases_;
};

inline const char* name_of(int dtype) {
  return dtype == MOEFAST_FLOAT32 ? "float32" : dtype == MOEFAST_FLOAT16 ? "float16" : "bfloat16";
}

inline std::string name_of(const Format& f) {
  switch (f.mode) {
    case MOEFAST_PLAIN:
      return name_of(f.dtype);
    case MOEFAST_MXFP4:
      return "mxfp4";
    case MOEFAST_MXFP8:
      return "mxfp8";
    case MOEFAST_NVFP4:
      return "nvfp4";
  }
  return "affine " + std::to_string(f.bits) + " bits, group " + std::to_string(f.group) + ", " +
         name_of(f.dtype);
}

// Every format there is.
inline std::vector<Format> all_formats() {
  std::vector<Format> formats;
  for (int dtype : {MOEFAST_FLOAT32, MOEFAST_FLOAT16, MOEFAST_BFLOAT16}) {
    formats.push_back({MOEFAST_PLAIN, static_cast<int>(8 * size_of(dtype)), 0, dtype});
    for (int bits : {2, 3, 4, 5, 6, 8}) {
      for (int group : {32, 64, 128}) {
        formats.push_back({MOEFAST_AFFINE, bits, group, dtype});
      }
    }
  }
  formats.push_back({MOEFAST_MXFP4, 4, 32, 0});
  formats.push_back({MOEFAST_MXFP8, 8, 32, 0});
  formats.push_back({MOEFAST_NVFP4, 4, 16, 0});
  return formats;
}

}  // namespace moefast::testing

#endif
