// 16 x 16 dwords, rows to columns.
#ifndef MOEFAST_CPU_AMX_TRANSPOSE_H
#define MOEFAST_CPU_AMX_TRANSPOSE_H

#include <immintrin.h>

namespace moefast {
namespace {

static inline __m512i unpack_low_quads(__m512i a, __m512i b) {
  return _mm512_unpacklo_epi64(a, b);
}
static inline __m512i unpack_high_quads(__m512i a, __m512i b) {
  return _mm512_unpackhi_epi64(a, b);
}

// r[i] dword j <-> r[j] dword i.
static inline void transpose16(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = unpack_low_quads(t[i], t[i + 2]);
    r[i + 1] = unpack_high_quads(t[i], t[i + 2]);
    r[i + 2] = unpack_low_quads(t[i + 1], t[i + 3]);
    r[i + 3] = unpack_high_quads(t[i + 1], t[i + 3]);
  }
  // Now r[4 i + j] holds columns j, 4 + j, 8 + j, 12 + j of rows 4 i .. 4 i + 3, a quarter each.
  for (int j = 0; j < 4; ++j) {
    t[j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    t[8 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
  }
  for (int j = 0; j < 4; ++j) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
    r[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
    r[4 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0x88);
    r[12 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0xdd);
  }
}

}  // namespace
}  // namespace moefast

#endif
