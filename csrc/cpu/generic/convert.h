// float32 <-> float16 and bfloat16, and the small floats of quantized weights.
//
// The templates take a number or a vector of them. Choices are made between integers, and the float
// arithmetic around them is done for every value: compilers vectorise that. Subnormal numbers are
// never multiplied, which takes x86 a hundred cycles each.
#ifndef MOEFAST_CPU_GENERIC_CONVERT_H
#define MOEFAST_CPU_GENERIC_CONVERT_H

#include "../types.h"
#include "vector.h"

namespace moefast {
namespace {

// The float32 of a smaller float whose sign, exponent and mantissa are in their places, but whose
// exponent's bias is lower by kRebias. A subnormal's mantissa is added to the smallest normal
// number, which is then taken away.
template <int kRebias, class I>
inline auto widen_minifloat(I code) {
  const I magnitude = code & 0x7fffffff;
  const I subnormal = magnitude < 0x00800000 ? I{} - 1 : I{};
  const I smallest = subnormal & ((kRebias + 1) << 23);
  const I rebias = smallest | (~subnormal & (kRebias << 23));
  const auto value = as_floats(magnitude + rebias) - as_floats(smallest);
  return as_floats(as_ints(value) | (code ^ magnitude));
}

template <class I>
inline auto widen_float16_code(I half) {
  const I magnitude = (half & 0x7fff) << 13;
  // The exponent of infinity and NaN moves up twice.
  const I more = magnitude >= 0x0f800000 ? I{} + (112 << 23) : I{};
  return widen_minifloat<112>((magnitude + more) | (half & 0x8000) << 16);
}

// e4m3 without infinity or NaN, as MLX has it: code 127 is 480.
template <class I>
inline auto widen_e4m3_code(I code) {
  return widen_minifloat<120>((code & 0x7f) << 20 | (code & 0x80) << 24);
}

inline float widen_bfloat16(uint16_t half) {
  return float_of(static_cast<uint32_t>(half) << 16);
}

inline float widen_float16(uint16_t half) {
  return widen_float16_code(static_cast<int32_t>(half));
}

inline float widen_e4m3(uint8_t code) {
  return widen_e4m3_code(static_cast<int32_t>(code));
}

// A power of two. Code 0 is 2^-127, and 255 infinity: what MLX makes of it.
template <class I>
inline auto widen_e8m0_code(I code) {
  return as_floats(code == 0 ? I{} + 0x00400000 : code << 23);
}

inline float widen_e8m0(uint8_t code) {
  return widen_e8m0_code(static_cast<int32_t>(code));
}

inline uint16_t narrow_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
  const uint32_t nan = bits | 0x00400000;
  return static_cast<uint16_t>(((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded) >> 16);
}

// The same, in the upper halves of each lane: compilers do not find it by themselves.
inline Ints narrow_bfloat16(Floats values) {
  const Words bits = reinterpret_cast<Words>(values);
  const Ints rounded = reinterpret_cast<Ints>(bits + 0x7fff + (bits >> 16 & 1));
  const Ints nan = as_ints(values) | 0x00400000;
  return (as_ints(values) & 0x7fffffff) > 0x7f800000 ? nan : rounded;
}

inline uint16_t narrow_float16(float value) {
  const int32_t sign = static_cast<int32_t>(bits_of(value) >> 16 & 0x8000);
  const int32_t magnitude = static_cast<int32_t>(bits_of(value) & 0x7fffffff);
  const bool small = magnitude < 0x38800000;  // below 2^-14
  // The last place of 0.5 is the smallest subnormal: adding 0.5 rounds to it.
  const float subnormal = float_of(static_cast<uint32_t>(small ? magnitude : 0)) + 0.5f;
  const int32_t rounded = (magnitude - (112 << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  const int32_t finite =
      (small ? 0 : rounded) + static_cast<int32_t>(bits_of(subnormal) - bits_of(0.5f));
  const int32_t nan = 0x7e00 | (magnitude >> 13 & 0x3ff);
  const int32_t special = magnitude > 0x7f800000 ? nan : 0x7c00;
  // 65536 and more; 65520 rounds up by itself.
  return static_cast<uint16_t>(sign | (magnitude >= 0x47800000 ? special : finite));
}

// kFloats values of a dtype.
template <int kType>
inline Floats load_values(const uint8_t* from) {
  if constexpr (kType == MOEFAST_FLOAT32) {
    return load_floats(from);
  } else if constexpr (kType == MOEFAST_BFLOAT16) {
    return as_floats(load_halves(from) << 16);
  } else {
#if defined(MOEFAST_VECTOR_AVX512)
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(MOEFAST_VECTOR_AVX2)
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(__aarch64__)
    float16x4_t halves;
    __builtin_memcpy(&halves, from, 8);
    return (Floats)vcvt_f32_f16(halves);
#else
    return widen_float16_code(load_halves(from));
#endif
  }
}

// kFloats values to a dtype, rounded to nearest, ties to even.
template <int kType>
inline void store_values(Floats values, uint8_t* to) {
  if constexpr (kType == MOEFAST_FLOAT32) {
    store_floats(to, values);
    return;
  }
  if constexpr (kType == MOEFAST_FLOAT16) {
#if defined(MOEFAST_VECTOR_AVX512)
    return _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                               _mm512_cvtps_ph((__m512)values, _MM_FROUND_TO_NEAREST_INT));
#elif defined(MOEFAST_VECTOR_AVX2)
    return _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                            _mm256_cvtps_ph((__m256)values, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
    const float16x4_t halves = vcvt_f16_f32((float32x4_t)values);
    __builtin_memcpy(to, &halves, 8);
    return;
#endif
  }
  if constexpr (kType == MOEFAST_BFLOAT16) {
    return store_upper_halves(narrow_bfloat16(values), to);
  }
  Unaligned16* halves = reinterpret_cast<Unaligned16*>(to);
  for (int i = 0; i < kFloats; ++i) {
    halves[i] = narrow_float16(values[i]);
  }
}

template <int kType>
inline void widen_values(const uint8_t* from, int64_t count, float* to) {
  constexpr int64_t kSize = kType == MOEFAST_FLOAT32 ? 4 : 2;
  int64_t i = 0;
  for (; i + kFloats <= count; i += kFloats) {
    store_floats(to + i, load_values<kType>(from + i * kSize));
  }
  if (i < count && count >= kFloats) {  // the last ones once more: quicker than copying the rest
    store_floats(to + count - kFloats, load_values<kType>(from + (count - kFloats) * kSize));
  } else if (i < count) {
    uint8_t rest[kFloats * kSize] = {};
    float values[kFloats];
    __builtin_memcpy(rest, from + i * kSize, static_cast<size_t>((count - i) * kSize));
    store_floats(values, load_values<kType>(rest));
    __builtin_memcpy(to + i, values, static_cast<size_t>(count - i) * 4);
  }
}

template <int kType>
inline void narrow_values(const float* from, int64_t count, uint8_t* to) {
  constexpr int64_t kSize = kType == MOEFAST_FLOAT32 ? 4 : 2;
  int64_t i = 0;
  for (; i + kFloats <= count; i += kFloats) {
    store_values<kType>(load_floats(from + i), to + i * kSize);
  }
  if (i < count) {
    uint8_t rest[kFloats * kSize];
    float values[kFloats] = {};
    __builtin_memcpy(values, from + i, static_cast<size_t>(count - i) * 4);
    store_values<kType>(load_floats(values), rest);
    __builtin_memcpy(to + i * kSize, rest, static_cast<size_t>((count - i) * kSize));
  }
}

// float32 <- dtype, of any alignment.
inline void widen(int dtype, const void* from, int64_t count, float* to) {
  const uint8_t* bytes = static_cast<const uint8_t*>(from);
  switch (dtype) {
    case MOEFAST_FLOAT32:
      return widen_values<MOEFAST_FLOAT32>(bytes, count, to);
    case MOEFAST_FLOAT16:
      return widen_values<MOEFAST_FLOAT16>(bytes, count, to);
    case MOEFAST_BFLOAT16:
      return widen_values<MOEFAST_BFLOAT16>(bytes, count, to);
  }
}

// dtype <- float32, rounded to nearest, ties to even.
inline void narrow(int dtype, const float* from, int64_t count, void* to) {
  uint8_t* bytes = static_cast<uint8_t*>(to);
  switch (dtype) {
    case MOEFAST_FLOAT32:
      return narrow_values<MOEFAST_FLOAT32>(from, count, bytes);
    case MOEFAST_FLOAT16:
      return narrow_values<MOEFAST_FLOAT16>(from, count, bytes);
    case MOEFAST_BFLOAT16:
      return narrow_values<MOEFAST_BFLOAT16>(from, count, bytes);
  }
}

}  // namespace
}  // namespace moefast

#endif
