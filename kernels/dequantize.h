// Rows of weight matrices, 16 values at a time, in every format that MLX packs: no group is
// smaller.
//
// Values are computed in float and rounded to T once: scale * q + bias of affine, element * scale
// of the floating-point formats, with global_scale as part of the scale.
#ifndef MOEFAST_DEQUANTIZE_H
#define MOEFAST_DEQUANTIZE_H

#include "common.h"

namespace moefast {

// A buffer that this projection does not have.
struct None {};

// The buffers of a stack of matrices [experts, rows, columns], in a format that is fixed at compile
// time.
template <int MODE,
          int BITS,
          int GROUP,
          typename Weight,
          typename Scales,
          typename Biases,
          typename Bias,
          typename GlobalScale>
struct Stack {
  Weight weight;
  Scales scales;
  Biases biases;
  Bias bias;
  GlobalScale global_scale;
};

template <int MODE,
          int BITS,
          int GROUP,
          typename Weight,
          typename Scales,
          typename Biases,
          typename Bias,
          typename GlobalScale>
inline Stack<MODE, BITS, GROUP, Weight, Scales, Biases, Bias, GlobalScale> stack_of(
    Weight weight, Scales scales, Biases biases, Bias bias, GlobalScale global_scale) {
  return {weight, scales, biases, bias, global_scale};
}

// The same memory as bytes or as 16-bit words; small buffers are constant.
template <typename Element, typename T>
inline const device Element* memory_as(const device T* from) {
  return (const device Element*)from;
}

template <typename Element, typename T>
inline const constant Element* memory_as(const constant T* from) {
  return (const constant Element*)from;
}

// BITS bytes hold 8 values of BITS bits, the first in the lowest bits.
struct Packed {
  uint low, high;
};

template <int BITS, typename Weight>
inline Packed packed_at(Weight weight, size_t pack) {
  if constexpr (BITS == 8) {
    return {weight[2 * pack], weight[2 * pack + 1]};
  } else if constexpr (BITS == 4) {
    return {weight[pack], 0};
  } else if constexpr (BITS % 2 == 0) {  // packs begin at even bytes
    auto from = memory_as<ushort>(weight) + pack * (BITS / 2);
    uint high = 0, low = from[0];
    if constexpr (BITS == 6) {
      low |= uint(from[1]) << 16;
      high = from[2];
    }
    return {low, high};
  } else {
    auto from = memory_as<uchar>(weight) + pack * BITS;
    uint high = 0, low = from[0] | uint(from[1]) << 8 | uint(from[2]) << 16;
    if constexpr (BITS == 5) {
      low |= uint(from[3]) << 24;
      high = from[4];
    }
    return {low, high};
  }
}

template <int BITS>
inline uint code_of(Packed packed, int i) {
  const int bit = i * BITS;
  const uint shifted = bit >= 32          ? packed.high >> (bit - 32)
                       : bit + BITS <= 32 ? packed.low >> bit
                                          : packed.low >> bit | packed.high << (32 - bit);
  return shifted & ((1u << BITS) - 1);
}

// OCP FP4: sign, two bits of exponent, one of mantissa. Half has the same, further up.
inline float e2m1(uint code) {
  const float size = float(as_type<half>(ushort((code & 7) << 9))) * 16384.0f;
  return code & 8 ? -size : size;
}

// OCP FP8: sign, four bits of exponent, three of mantissa; no infinities, one NaN.
inline float e4m3(uint code) {
  const uint magnitude = code & 127;
  const float size = magnitude == 127 ? NAN : float(as_type<half>(ushort(magnitude << 7))) * 256.0f;
  return code & 128 ? -size : size;
}

// OCP MX: nothing but an exponent.
inline float e8m0(uint code) {
  return as_type<float>(code == 0 ? 0x00400000u : code << 23);
}

inline float global_scale_of(None, uint) {
  return 1.0f;
}

// MLX stores the largest magnitude of the tensor; 448 and 6 are the largest e4m3 and e2m1.
template <typename GlobalScale>
inline float global_scale_of(GlobalScale scale, uint expert) {
  return scale[expert] / (448.0f * 6.0f);
}

// Of a matrix that is no stack: an array without dimensions arrives as a number.
inline float global_scale_of(float scale, uint) {
  return scale / (448.0f * 6.0f);
}

constexpr constant int kDequantized = 16;

// 16 values of row `row` of all experts' rows, from column `column` on, a multiple of 16. Of a
// plain matrix columns from COLUMNS on are 0; packed ones have whole groups. `global_scale` is the
// expert's.
template <int COLUMNS,
          typename T,
          int MODE,
          int BITS,
          int GROUP,
          typename Weight,
          typename Scales,
          typename Biases,
          typename Bias,
          typename GlobalScale>
inline void dequantize(Stack<MODE, BITS, GROUP, Weight, Scales, Biases, Bias, GlobalScale> stack,
                       size_t row,
                       uint column,
                       float global_scale,
                       thread T (&values)[kDequantized]) {
  if constexpr (MODE == kPlain) {
    auto from = stack.weight + (row * COLUMNS + column);
#pragma unroll
    for (int i = 0; i < kDequantized; i++) {
      values[i] = COLUMNS % kDequantized == 0 || column + i < COLUMNS ? T(from[i]) : T(0);
    }
  } else {
    const size_t pack = row * (COLUMNS / 8) + column / 8;
    const Packed packed[2] = {packed_at<BITS>(stack.weight, pack),
                              packed_at<BITS>(stack.weight, pack + 1)};
    const size_t group = row * (COLUMNS / GROUP) + column / GROUP;
    if constexpr (MODE == kAffine) {
      const float scale = float(stack.scales[group]), bias = float(stack.biases[group]);
#pragma unroll
      for (int i = 0; i < kDequantized; i++) {
        values[i] = T(fma(scale, float(code_of<BITS>(packed[i / 8], i % 8)), bias));
      }
    } else {
      const uint code = stack.scales[group];
      const float scale = (MODE == kNvfp4 ? e4m3(code) : e8m0(code)) * global_scale;
#pragma unroll
      for (int i = 0; i < kDequantized; i++) {
        const uint element = code_of<BITS>(packed[i / 8], i % 8);
        values[i] = T(scale * (BITS == 8 ? e4m3(element) : e2m1(element)));
      }
    }
  }
}

// `value`, a product with row `row` rounded to T, plus the stack's output bias where it has one.
template <typename T>
inline T with_bias(None, size_t, T value) {
  return value;
}

template <typename T, typename Bias>
inline T with_bias(Bias bias, size_t row, T value) {
  return T(value + T(bias[row]));
}

}  // namespace moefast

#endif
