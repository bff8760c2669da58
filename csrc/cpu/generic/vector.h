// Vectors of the width that the instruction set of the including file has, and loads into them.
//
// Everything in generic/ has internal linkage: each isa_*.cpp gets copies of its own, compiled with
// its own flags. No standard library here, for the reason given in types.h. Arithmetic is written
// with the compilers' vector types; intrinsics stand only where compilers do poorly without.
#ifndef MOEFAST_CPU_GENERIC_VECTOR_H
#define MOEFAST_CPU_GENERIC_VECTOR_H

#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "Weights are little-endian, and read as they are."
#endif

namespace moefast {
namespace {

#if defined(__AVX512BW__) && defined(__AVX512VL__)
#define MOEFAST_VECTOR_AVX512 1
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define MOEFAST_VECTOR_AVX2 1
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Whether there are 32 vector registers rather than 16.
#if defined(MOEFAST_VECTOR_AVX512) || defined(__aarch64__)
constexpr bool kManyRegisters = true;
#else
constexpr bool kManyRegisters = false;
#endif

constexpr int kFloats = kVectorBytes / 4;

typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef float UnalignedFloats __attribute__((vector_size(kVectorBytes), aligned(1), may_alias));

typedef int32_t UnalignedInts __attribute__((vector_size(kVectorBytes), aligned(1), may_alias));
typedef uint16_t Unaligned16 __attribute__((aligned(1), may_alias));
typedef uint32_t Unaligned32 __attribute__((aligned(1), may_alias));
typedef uint64_t Unaligned64 __attribute__((aligned(1), may_alias));

inline Floats load_floats(const void* from) {
  return *static_cast<const UnalignedFloats*>(from);
}

inline void store_floats(void* to, Floats values) {
  *static_cast<UnalignedFloats*>(to) = values;
}

inline Ints load_ints(const void* from) {
  return *static_cast<const UnalignedInts*>(from);
}

inline void store_ints(void* to, Ints values) {
  *static_cast<UnalignedInts*>(to) = values;
}

inline uint32_t load32(const uint8_t* from) {
  return *reinterpret_cast<const Unaligned32*>(from);
}

inline uint64_t load64(const uint8_t* from) {
  return *reinterpret_cast<const Unaligned64*>(from);
}

// The same in every lane. Functions that are templates over the type of a number take floats, and
// vectors of them.
template <class F>
inline F splat(float value) {
  return F{} + value;
}

inline float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

inline int32_t as_ints(float value) {
  return static_cast<int32_t>(bits_of(value));
}
inline float as_floats(int32_t bits) {
  return float_of(static_cast<uint32_t>(bits));
}
inline Ints as_ints(Floats values) {
  return reinterpret_cast<Ints>(values);
}
inline Floats as_floats(Ints bits) {
  return reinterpret_cast<Floats>(bits);
}

inline Floats converted(Ints values) {
  return __builtin_convertvector(values, Floats);
}

// One number out of those of all lanes: pairs, pairs of pairs, and so on.
template <class V, class Combine>
inline auto across(V values, Combine combine) {
  for (int width = kFloats / 2; width > 0; width /= 2) {
    for (int k = 0; k < width; ++k) {
      values[k] = combine(values[k], values[k + width]);
    }
  }
  return values[0];
}

template <class V>
inline auto sum_across(V values) {
  return across(values, [](auto a, auto b) { return a + b; });
}

// kFloats unsigned bytes.
inline Ints load_bytes(const uint8_t* from) {
#if defined(MOEFAST_VECTOR_AVX512)
  return (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(MOEFAST_VECTOR_AVX2)
  return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#elif defined(__x86_64__)
  const __m128i zero = _mm_setzero_si128();
  const __m128i bytes = _mm_cvtsi32_si128(static_cast<int>(load32(from)));
  return (Ints)_mm_unpacklo_epi16(_mm_unpacklo_epi8(bytes, zero), zero);
#elif defined(__aarch64__)
  const uint8x8_t bytes = vreinterpret_u8_u32(vdup_n_u32(load32(from)));
  return (Ints)vmovl_u16(vget_low_u16(vmovl_u8(bytes)));
#else
  return Ints{from[0], from[1], from[2], from[3]};
#endif
}

// kFloats unsigned 16-bit numbers.
inline Ints load_halves(const void* from) {
#if defined(MOEFAST_VECTOR_AVX512)
  return (Ints)_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
#elif defined(MOEFAST_VECTOR_AVX2)
  return (Ints)_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from)));
#elif defined(__x86_64__)
  return (Ints)_mm_unpacklo_epi16(_mm_loadl_epi64(static_cast<const __m128i*>(from)),
                                  _mm_setzero_si128());
#elif defined(__aarch64__)
  return (Ints)vmovl_u16(vld1_u16(static_cast<const Unaligned16*>(from)));
#else
  const Unaligned16* halves = static_cast<const Unaligned16*>(from);
  return Ints{halves[0], halves[1], halves[2], halves[3]};
#endif
}

// The upper 16 bits of each number.
inline void store_upper_halves(Ints values, void* to) {
#if defined(MOEFAST_VECTOR_AVX512)
  _mm256_storeu_si256(static_cast<__m256i*>(to), _mm512_cvtepi32_epi16((__m512i)(values >> 16)));
#elif defined(MOEFAST_VECTOR_AVX2)
  const __m256i upper = (__m256i)(values >> 16);  // with its sign: packing changes nothing
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(upper, upper), 0x08);
  _mm_storeu_si128(static_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
#elif defined(__x86_64__)
  const __m128i upper = (__m128i)(values >> 16);
  _mm_storel_epi64(static_cast<__m128i*>(to), _mm_packs_epi32(upper, upper));
#elif defined(__aarch64__)
  const int16x4_t upper = vshrn_n_s32((int32x4_t)values, 16);
  __builtin_memcpy(to, &upper, 8);
#else
  Unaligned16* halves = static_cast<Unaligned16*>(to);
  for (int i = 0; i < kFloats; ++i) {
    halves[i] = static_cast<uint16_t>(values[i] >> 16);
  }
#endif
}

}  // namespace
}  // namespace moefast

#endif
