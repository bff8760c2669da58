// Codes of quantized weights -> vectors of floats.
//
// Codes of 2 to 6 bits lie in a row as one stream of bits, least significant first. Each lane of a
// vector gets a word with its code somewhere in the low bits, of which all others are masked: codes
// 0 1 2 ... at offsets o(0) o(1) ... times powers of two, that is. As floats they need no shift:
// the scale they are multiplied with has the inverse powers in it, and nothing is rounded.
#ifndef MOEFAST_CPU_GENERIC_CODES_H
#define MOEFAST_CPU_GENERIC_CODES_H

#include "convert.h"

namespace moefast {
namespace {

// Codes that are unpacked together: whole bytes, and whole vectors.
constexpr int kRun = 32;
constexpr int kRunVectors = kRun / kFloats;

// Where vector v of a run of kBits-bit codes finds them: it reads kLoad bytes at start(v), which
// never leave the run's 4 * kBits bytes, and lane l has its code from bit offset(v, l) on.
template <int kBits>
struct Window {
#if defined(MOEFAST_VECTOR_AVX512)
  static constexpr int kLoad = kBits <= 4 ? 8 : 16;
#elif defined(MOEFAST_VECTOR_AVX2)
  static constexpr int kLoad = 8;
#else
  static constexpr int kLoad = 4;
#endif

  // Vectors whose lanes have different offsets: one, or for odd codes in short vectors two.
  static constexpr int kOffsets = kFloats * kBits % 8 == 0 ? 1 : 2;

  static constexpr int first_bit(int v) { return v * kFloats * kBits; }
  static constexpr int start(int v) {
    const int wanted = first_bit(v) / 8, last = 4 * kBits - kLoad;
    return wanted < last ? wanted : last;
  }
  static constexpr int offset(int v, int lane) {
#if defined(MOEFAST_VECTOR_AVX512) || defined(MOEFAST_VECTOR_AVX2)
    return (first_bit(v) + lane * kBits) % 8;  // the lane's word begins at the code's first byte
#else
    return first_bit(v) % 8 + lane * kBits;  // all lanes have the same word
#endif
  }
};

template <int kBits>
struct WindowTables {
  using W = Window<kBits>;
  alignas(64) uint8_t bytes[kRunVectors][kVectorBytes];
  alignas(64) int32_t masks[W::kOffsets][kFloats];
  alignas(64) float inverses[W::kOffsets][kFloats];

  constexpr WindowTables() : bytes(), masks(), inverses() {
    for (int v = 0; v < kRunVectors; ++v) {
      for (int lane = 0; lane < kFloats; ++lane) {
        const int offset = W::offset(v, lane);
        masks[v % W::kOffsets][lane] = ((1 << kBits) - 1) << offset;
        inverses[v % W::kOffsets][lane] = 1.0f / static_cast<float>(1 << offset);
        const int first = (W::first_bit(v) + lane * kBits) / 8 - W::start(v);
        for (int i = 0; i < 4; ++i) {  // 0x80: a zero
          bytes[v][4 * lane + i] = static_cast<uint8_t>(first + i < 16 ? first + i : 0x80);
        }
      }
    }
  }
};

template <int kBits>
constexpr WindowTables<kBits> kWindowTables{};

template <class V>
inline V load_table(const void* from) {
  return *static_cast<const V*>(from);
}

// Lanes of words, each with its code at Window::offset; other bits are not masked yet.
template <int kBits>
inline Ints load_words(const uint8_t* run, int v) {
  using W = Window<kBits>;
  const uint8_t* from = run + W::start(v);
#if defined(MOEFAST_VECTOR_AVX512)
  const __m512i some =
      W::kLoad == 8
          ? _mm512_set1_epi64(static_cast<int64_t>(load64(from)))
          : _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return (Ints)_mm512_shuffle_epi8(some, load_table<__m512i>(kWindowTables<kBits>.bytes[v]));
#elif defined(MOEFAST_VECTOR_AVX2)
  const __m256i some = _mm256_set1_epi64x(static_cast<int64_t>(load64(from)));
  return (Ints)_mm256_shuffle_epi8(some, load_table<__m256i>(kWindowTables<kBits>.bytes[v]));
#else
  // A window that begins sooner than wanted, lest it leave the run, has bits to drop.
  const uint32_t word = load32(from) >> (W::first_bit(v) / 8 - W::start(v)) * 8;
  return Ints{} + static_cast<int32_t>(word);
#endif
}

#if defined(MOEFAST_VECTOR_AVX512)
// Each lane gets the eight bits that begin at its code, vector v's of a run. Of 64 bits: up to four
// bits a code.
template <int kBits>
inline __m512i load_windows(const uint8_t* run, int v) {
  using W = Window<kBits>;
  alignas(64) static constexpr struct Starts {
    int32_t bit[kRunVectors][kFloats];
    constexpr Starts() : bit() {
      for (int u = 0; u < kRunVectors; ++u) {
        for (int lane = 0; lane < kFloats; ++lane) {
          bit[u][lane] = W::first_bit(u) + lane * kBits - 8 * W::start(u);
        }
      }
    }
  } kStarts;
  const __m512i codes = _mm512_set1_epi64(static_cast<int64_t>(load64(run + W::start(v))));
  return _mm512_multishift_epi64_epi8(load_table<__m512i>(kStarts.bit[v]), codes);
}
#endif

// scale * code + offset of affine codes: vector v of a run.
template <int kBits>
class ScaledCodes {
 public:
  [[gnu::always_inline]] ScaledCodes(float scale, float offset) : offset_(offset) {
    for (int i = 0; i < kOffsets; ++i) {
      steps_[i] = scale * load_table<Floats>(kWindowTables<kBits>.inverses[i]);
    }
  }

  [[gnu::always_inline]] Floats load(const uint8_t* run, int v) const {
    const Ints mask = load_table<Ints>(kWindowTables<kBits>.masks[v % kOffsets]);
    return steps_[v % kOffsets] * converted(load_words<kBits>(run, v) & mask) + offset_;
  }

 private:
  static constexpr int kOffsets = Window<kBits>::kOffsets;
  Floats steps_[kOffsets];
  float offset_;
};

template <>
class ScaledCodes<8> {
 public:
  [[gnu::always_inline]] ScaledCodes(float scale, float offset) : scale_(scale), offset_(offset) {}

  [[gnu::always_inline]] Floats load(const uint8_t* run, int v) const {
    return scale_ * converted(load_bytes(run + v * kFloats)) + offset_;
  }

 private:
  float scale_, offset_;
};

#if defined(MOEFAST_VECTOR_AVX512)

// Up to four bits: the values of all codes, in a table where the lowest bits of a window find them.
template <int kBits>
class TabledCodes {
 public:
  [[gnu::always_inline]] TabledCodes(float scale, float offset) {
    constexpr int m = (1 << kBits) - 1;
    values_ = scale * Floats{0 & m, 1 & m, 2 & m,  3 & m,  4 & m,  5 & m,  6 & m,  7 & m,
                             8 & m, 9 & m, 10 & m, 11 & m, 12 & m, 13 & m, 14 & m, 15 & m} +
              offset;
  }

  [[gnu::always_inline]] Floats load(const uint8_t* run, int v) const {
    return (Floats)_mm512_permutexvar_ps(load_windows<kBits>(run, v), (__m512)values_);
  }

 private:
  Floats values_;
};

template <>
class ScaledCodes<2> : public TabledCodes<2> {
  using TabledCodes::TabledCodes;
};
template <>
class ScaledCodes<3> : public TabledCodes<3> {
  using TabledCodes::TabledCodes;
};
template <>
class ScaledCodes<4> : public TabledCodes<4> {
  using TabledCodes::TabledCodes;
};

#endif

#if defined(MOEFAST_VECTOR_AVX512)

// The values of e2m1 codes times a scale: a table of 16 to look them up in.
struct ScaledE2m1 {
  __m512 values;

  explicit ScaledE2m1(float scale)
      : values(_mm512_mul_ps(
            _mm512_setr_ps(0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6),
            _mm512_set1_ps(scale))) {}

  // 16 of them: a group of nvfp4.
  inline void load(const uint8_t* from, Floats* to) const {
    to[0] = (Floats)_mm512_permutexvar_ps(load_windows<4>(from, 0), values);
  }
};

#else

// Twice the values of 16 e2m1 codes: 0 1 2 3 4 6 8 12, and the negatives.
inline void load_e2m1(const uint8_t* from, Floats* to) {
#if defined(__x86_64__)
  const __m128i packed = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  const __m128i low = _mm_set1_epi8(15);
  const __m128i codes =
      _mm_unpacklo_epi8(_mm_and_si128(packed, low), _mm_and_si128(_mm_srli_epi16(packed, 4), low));
#if defined(MOEFAST_VECTOR_AVX2)
  const __m128i twice = _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);
  const __m128i found = _mm_shuffle_epi8(twice, codes);
  to[0] = converted((Ints)_mm256_cvtepi8_epi32(found));
  to[1] = converted((Ints)_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(found, found)));
#else
  // 4 and 5 stand for 4 and 6, 6 and 7 for 8 and 12: one more for each beyond 4, two beyond 6.
  const __m128i m = _mm_and_si128(codes, _mm_set1_epi8(7));
  const __m128i over4 = _mm_subs_epu8(m, _mm_set1_epi8(4));
  const __m128i over6 = _mm_subs_epu8(m, _mm_set1_epi8(6));
  const __m128i magnitude = _mm_add_epi8(_mm_add_epi8(m, over4), _mm_add_epi8(over6, over6));
  const __m128i negative = _mm_cmpgt_epi8(codes, _mm_set1_epi8(7));
  const __m128i found = _mm_sub_epi8(_mm_xor_si128(magnitude, negative), negative);
  for (int half = 0; half < 2; ++half) {
    const __m128i twins =
        half == 0 ? _mm_unpacklo_epi8(found, found) : _mm_unpackhi_epi8(found, found);
    to[2 * half] = converted((Ints)_mm_srai_epi32(_mm_unpacklo_epi16(twins, twins), 24));
    to[2 * half + 1] = converted((Ints)_mm_srai_epi32(_mm_unpackhi_epi16(twins, twins), 24));
  }
#endif
#elif defined(__aarch64__)
  static constexpr int8_t kTwice[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
  const uint8x8_t packed = vld1_u8(from);
  const uint8x8_t low = vand_u8(packed, vdup_n_u8(15)), high = vshr_n_u8(packed, 4);
  const uint8x16_t codes = vcombine_u8(vzip1_u8(low, high), vzip2_u8(low, high));
  const int8x16_t found = vqtbl1q_s8(vld1q_s8(kTwice), codes);
  const int16x8_t first = vmovl_s8(vget_low_s8(found)), second = vmovl_s8(vget_high_s8(found));
  to[0] = converted((Ints)vmovl_s16(vget_low_s16(first)));
  to[1] = converted((Ints)vmovl_s16(vget_high_s16(first)));
  to[2] = converted((Ints)vmovl_s16(vget_low_s16(second)));
  to[3] = converted((Ints)vmovl_s16(vget_high_s16(second)));
#else
  static constexpr float kTwice[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
  for (int i = 0; i < 16; ++i) {
    to[i / kFloats][i % kFloats] = kTwice[from[i / 2] >> i % 2 * 4 & 15];
  }
#endif
}

// The values of e2m1 codes times a scale.
struct ScaledE2m1 {
  float half;

  explicit ScaledE2m1(float scale) : half(0.5f * scale) {}

  // 16 of them: a group of nvfp4.
  inline void load(const uint8_t* from, Floats* to) const {
    load_e2m1(from, to);
    for (int k = 0; k < 16 / kFloats; ++k) {
      to[k] *= half;
    }
  }
};

#endif

// kFloats values of e4m3 codes.
inline Floats load_e4m3(const uint8_t* from) {
  // Where the CPU widens float16, it does the work: the code with four zero bits before its
  // exponent and behind its mantissa is 1/256 of the value.
#if defined(MOEFAST_VECTOR_AVX512)
  const __m256i codes =
      _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  const __m256i halves = _mm256_and_si256(_mm256_srai_epi16(_mm256_slli_epi16(codes, 8), 1),
                                          _mm256_set1_epi16(static_cast<int16_t>(0xbf80)));
  return (Floats)_mm512_cvtph_ps(halves) * 256.0f;
#elif defined(MOEFAST_VECTOR_AVX2)
  const __m128i codes = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  const __m128i halves = _mm_and_si128(_mm_srai_epi16(_mm_slli_epi16(codes, 8), 1),
                                       _mm_set1_epi16(static_cast<int16_t>(0xbf80)));
  return (Floats)_mm256_cvtph_ps(halves) * 256.0f;
#elif defined(__aarch64__)
  const uint8x8_t codes = vreinterpret_u8_u32(vdup_n_u32(load32(from)));
  const int16x8_t high = vreinterpretq_s16_u16(vshll_n_u8(codes, 8));
  const int16x8_t halves =
      vandq_s16(vshrq_n_s16(high, 1), vdupq_n_s16(static_cast<int16_t>(0xbf80)));
  return (Floats)vcvt_f32_f16(vreinterpret_f16_s16(vget_low_s16(halves))) * 256.0f;
#else
  return widen_e4m3_code(load_bytes(from));
#endif
}

}  // namespace
}  // namespace moefast

#endif
