// Products of coded weights with prepared activations, block by block.
//
// A row of codes times a row of activations is  sum over blocks of scale * sum(code * x), and sum
// over groups of offset * sum(x). Each class here says how a block of codes is unpacked and
// multiplied; `CodedProduct` walks over the rows.
#ifndef MOEFAST_CPU_AVX512_CODES_H
#define MOEFAST_CPU_AVX512_CODES_H

#include <immintrin.h>

#include "../isa.h"
#include "fetch.h"
#include "int15.h"
#include "scales.h"
#include "sum.h"

namespace moefast {
namespace {

// Twice the e2m1 values, plus 12: unsigned bytes. Code 8 is -0.
alignas(16) constexpr uint8_t kE2m1Codes[16] = {12, 13, 14, 15, 16, 18, 20, 24,
                                                12, 11, 10, 9,  8,  6,  4,  0};
constexpr float kE2m1Unit = 0.5f;
constexpr float kE2m1Offset = -12.0f;

static inline __mmask64 first_of_64(int64_t count) {
  return count >= 64 ? ~0ull : (1ull << count) - 1;
}

// 128 codes of 4 bits: 64 bytes, each an even code below an odd one. kE2m1: looked up, else taken
// as they are.
template <bool kE2m1>
struct NibbleCodes {
  static constexpr int kBlock = 128;
  static constexpr int kBlockBytes = 64;
  static constexpr PlaneOrder kOrder = kNibbles;
  static constexpr int64_t kPlanes = 256;  // bytes of activations per block

  struct Block {
    __m512i even, odd;
  };

  static inline Block unpack(__m512i bytes) {
    const __m512i low = _mm512_set1_epi8(15);
    const __m512i even = _mm512_and_si512(bytes, low);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low);
    if constexpr (kE2m1) {
      const __m512i table =
          _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(kE2m1Codes)));
      return {_mm512_shuffle_epi8(table, even), _mm512_shuffle_epi8(table, odd)};
    }
    return {even, odd};
  }

  static inline __m512i load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static inline __m512i load_some(const uint8_t* p, int64_t bytes) {
    return _mm512_maskz_loadu_epi8(first_of_64(bytes), p);
  }

  // Sums of code * v over the 8 codes of each lane.
  static inline __m512i dot(const Block& codes, const int8_t* planes) {
    __m512i hi = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes.even, _mm512_load_si512(planes));
    hi = _mm512_dpbusd_epi32(hi, codes.odd, _mm512_load_si512(planes + 64));
    __m512i v = _mm512_slli_epi32(hi, 7);
    v = _mm512_dpbusd_epi32(v, codes.even, _mm512_load_si512(planes + 128));
    return _mm512_dpbusd_epi32(v, codes.odd, _mm512_load_si512(planes + 192));
  }

  static inline float factor(const Int15Row& x, int64_t block) { return x.factor[block]; }
};

// 64 codes of kBits bits, least significant first, as bytes in their order.
template <int kBits>
struct ByteCodes {
  static constexpr int kBlock = 64;
  static constexpr int kBlockBytes = 8 * kBits;
  static constexpr PlaneOrder kOrder = kBytes;
  static constexpr int64_t kPlanes = 128;

  struct Block {
    __m512i codes;
  };

  // Eight codes are kBits whole bytes: those go into one quadword each, of which 8 fields are
  // picked.
  static inline Block unpack(__m512i bytes) {
    if constexpr (kBits == 8) {
      return {bytes};
    } else {
      alignas(64) static constexpr struct Picks {
        uint8_t byte[64];
        uint8_t shift[64];
        constexpr Picks() : byte(), shift() {
          for (int i = 0; i < 64; ++i) {
            byte[i] = static_cast<uint8_t>(i / 8 * kBits + i % 8);
            shift[i] = static_cast<uint8_t>(i % 8 * kBits);
          }
        }
      } kPicks;
      const __m512i quads = _mm512_permutexvar_epi8(_mm512_load_si512(kPicks.byte), bytes);
      const __m512i fields = _mm512_multishift_epi64_epi8(_mm512_load_si512(kPicks.shift), quads);
      return {_mm512_and_si512(fields, _mm512_set1_epi8((1 << kBits) - 1))};
    }
  }

  static inline __m512i load(const uint8_t* p) {
    return kBits == 8 ? _mm512_loadu_si512(p) : load_some(p, kBlockBytes);
  }
  static inline __m512i load_some(const uint8_t* p, int64_t bytes) {
    return _mm512_maskz_loadu_epi8(first_of_64(bytes), p);
  }

  // Sums of code * v over the 4 codes of each lane.
  static inline __m512i dot(const Block& block, const int8_t* planes) {
    const __m512i hi =
        _mm512_dpbusd_epi32(_mm512_setzero_si512(), block.codes, _mm512_load_si512(planes));
    return _mm512_dpbusd_epi32(_mm512_slli_epi32(hi, 7), block.codes,
                               _mm512_load_si512(planes + 64));
  }

  static inline float factor(const Int15Row& x, int64_t block) { return x.factor[block / 2]; }
};

template <class Codes, ScaleKind kKind, int kGroup>
struct CodedProduct {
  using S = LaneScales<kKind, kGroup, Codes::kBlock>;
  static constexpr bool kAffine = kKind <= kScaleBfloat16;
  static constexpr float kUnit = (kAffine ? 1.0f : kE2m1Unit) * scale_unit(kKind);

  static int64_t prepared_bytes(const Format&, int64_t in, int64_t count) {
    return count * int15_bytes(in, kGroup);
  }

  static bool prepare(const Format&,
                      int dtype,
                      const void* const* rows,
                      int64_t count,
                      int64_t in,
                      void* prepared) {
    bool fit = true;
    for (int64_t r = 0; r < count; ++r) {
      void* to = static_cast<uint8_t*>(prepared) + r * int15_bytes(in, kGroup);
      fit = int15_prepare(Codes::kOrder, dtype, rows[r], in, kGroup, to) && fit;
    }
    return fit;
  }

  // What block b of kWeights rows of the weight adds to their sums with kRows rows of activations.
  template <int kWeights, int kRows>
  static inline void block(const typename Codes::Block* codes,
                           const __m512* scale,
                           const Int15Row* x,
                           int64_t b,
                           __m512* sums) {
    for (int r = 0; r < kRows; ++r) {
      const __m512 factor = _mm512_set1_ps(Codes::factor(x[r], b));
      for (int i = 0; i < kWeights; ++i) {
        const __m512i dot = Codes::dot(codes[i], x[r].planes + b * Codes::kPlanes);
        __m512& sum = sums[i * kRows + r];
        sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_mul_ps(scale[i], factor), sum);
      }
    }
  }

  // The lanes' sums of rows [n, n + kWeights) of the weight with each of x[0..kRows).
  template <int kWeights, int kRows, bool kFetch>
  static inline void lanes(
      const Matrix& w, int64_t n, const Int15Row* x, const Fetch& fetch, __m512* sums) {
    const uint8_t *weight[kWeights], *scales[kWeights], *later[kWeights];
    for (int i = 0; i < kWeights; ++i) {
      weight[i] = w.weight + (n + i) * w.row_bytes;
      scales[i] = w.scales + (n + i) * w.scale_bytes;
      later[i] = kFetch ? fetch.from(weight[i]) : nullptr;
    }
    for (int i = 0; i < kWeights * kRows; ++i) {
      sums[i] = _mm512_setzero_ps();
    }
    typename Codes::Block codes[kWeights];
    __m512 scale[kWeights];
    const int64_t blocks = w.in / Codes::kBlock;
    for (int64_t b = 0; b < blocks; ++b) {
      for (int i = 0; i < kWeights; ++i) {
        const int64_t at = b * Codes::kBlockBytes;
        if constexpr (kFetch) {
          _mm_prefetch(reinterpret_cast<const char*>(later[i] + at), _MM_HINT_T0);
        }
        codes[i] = Codes::unpack(Codes::load(weight[i] + at));
        scale[i] = S::spread(S::of_block(scales[i], b));
      }
      block<kWeights, kRows>(codes, scale, x, b, sums);
    }
    if (blocks * Codes::kBlock < w.in) {
      const int64_t done = blocks * Codes::kBlockBytes;
      for (int i = 0; i < kWeights; ++i) {
        alignas(64) uint8_t last[64] = {};  // the scales that are left, and zeros
        const uint8_t* from = S::of_block(scales[i], blocks);
        for (int64_t k = 0; k < scales[i] + w.scale_bytes - from; ++k) {
          last[k] = from[k];
        }
        codes[i] = Codes::unpack(Codes::load_some(weight[i] + done, w.row_bytes - done));
        scale[i] = S::spread(last);
      }
      block<kWeights, kRows>(codes, scale, x, blocks, sums);
    }
    for (int i = 0; i < kWeights; ++i) {
      offsets<kRows>(w, n + i, scales[i], x, sums + i * kRows);
    }
  }

  // Adds what does not depend on the codes: offset * sum(x) of every group.
  template <int kRows>
  static inline void offsets(
      const Matrix& w, int64_t n, const uint8_t* scales, const Int15Row* x, __m512* sums) {
    const uint8_t* from = kAffine ? w.biases + n * w.scale_bytes : scales;
    const int64_t groups = w.in / kGroup;
    for (int64_t g = 0; g < groups; g += 16) {
      __m512 offset = S::in_a_row(from + g * S::kSize, first_of_16(groups - g));
      if constexpr (!kAffine) {
        offset = _mm512_mul_ps(offset, _mm512_set1_ps(kE2m1Offset));
      }
      for (int r = 0; r < kRows; ++r) {
        sums[r] = _mm512_fmadd_ps(offset, _mm512_load_ps(x[r].sum + g), sums[r]);
      }
    }
  }

  // One row of activations: four rows of the weight one after another, a single stream of reads.
  static inline void one(const Matrix& w,
                         int64_t begin,
                         int64_t end,
                         const void* prepared,
                         float* y,
                         const Ahead& ahead) {
    const Int15Row x = int15_row(prepared, w.in);
    const Fetch fetch{w.weight + end * w.row_bytes, ahead};
    const float factor = w.factor * kUnit;
    int64_t n = begin;
    for (; n + 4 <= end; n += 4) {
      __m512 sums[4];
      for (int i = 0; i < 4; ++i) {
        fetch.scales(w, n + i, end);
        lanes<1, 1, true>(w, n + i, &x, fetch, sums + i);
      }
      const __m128 four = sum4(sums[0], sums[1], sums[2], sums[3]);
      _mm_storeu_ps(y + n - begin, _mm_mul_ps(four, _mm_set1_ps(factor)));
    }
    for (; n < end; ++n) {
      __m512 sum;
      lanes<1, 1, true>(w, n, &x, fetch, &sum);
      y[n - begin] = sum1(sum) * factor;
    }
  }

  // Rows [n, n + kWeights) of the weight times x[0..kRows).
  template <int kWeights, int kRows, bool kFetch>
  static inline void tile(
      const Matrix& w, int64_t n, const Int15Row* x, const Fetch& fetch, float* y, int64_t ldy) {
    __m512 sums[kWeights * kRows];
    lanes<kWeights, kRows, kFetch>(w, n, x, fetch, sums);
    const __m128 factor = _mm_set1_ps(w.factor * kUnit);
    for (int i = 0; i < kWeights; ++i) {
      for (int r = 0; r < kRows; r += 4) {
        const auto sum = [&](int k) { return sums[i * kRows + (r + k < kRows ? r + k : r)]; };
        alignas(16) float four[4];
        _mm_store_ps(four, _mm_mul_ps(sum4(sum(0), sum(1), sum(2), sum(3)), factor));
        for (int k = 0; k < 4 && r + k < kRows; ++k) {
          y[(r + k) * ldy + i] = four[k];
        }
      }
    }
  }

  // kRows rows of activations: two rows of the weight at a time, so that what is loaded of either
  // is used more than once.
  template <int kRows, bool kFetch>
  static inline void some(const Matrix& w,
                          int64_t begin,
                          int64_t end,
                          const void* const* rows,
                          float* y,
                          int64_t ldy,
                          const Ahead& ahead) {
    static_assert(kRows % 4 == 0 || kRows < 4);
    Int15Row x[kRows];
    for (int r = 0; r < kRows; ++r) {
      x[r] = int15_row(rows[r], w.in);
    }
    const Fetch fetch{w.weight + end * w.row_bytes, ahead};
    int64_t n = begin;
    for (; n + 2 <= end; n += 2) {
      if constexpr (kFetch) {
        fetch.scales(w, n, end);
        fetch.scales(w, n + 1, end);
      }
      tile<2, kRows, kFetch>(w, n, x, fetch, y + n - begin, ldy);
    }
    if (n < end) {
      tile<1, kRows, kFetch>(w, n, x, fetch, y + n - begin, ldy);
    }
  }

  static void multiply(const Matrix& w,
                       int64_t begin,
                       int64_t end,
                       const void* const* rows,
                       int64_t count,
                       float* y,
                       int64_t ldy,
                       const Ahead& ahead) {
    if (count == 0) {
      return;
    }
    if (count == 1) {
      one(w, begin, end, rows[0], y, ahead);
      return;
    }
    int64_t r = 0;
    // The first pass brings the weights into the cache; the others find them there.
    if (count >= 4) {
      some<4, true>(w, begin, end, rows, y, ldy, ahead);
      r = 4;
    } else {
      some<2, true>(w, begin, end, rows, y, ldy, ahead);
      r = 2;
    }
    for (; r + 4 <= count; r += 4) {
      some<4, false>(w, begin, end, rows + r, y + r * ldy, ldy, ahead);
    }
    for (; r + 2 <= count; r += 2) {
      some<2, false>(w, begin, end, rows + r, y + r * ldy, ldy, ahead);
    }
    if (r < count) {
      some<1, false>(w, begin, end, rows + r, y + r * ldy, ldy, ahead);
    }
  }
};

}  // namespace
}  // namespace moefast

#endif
