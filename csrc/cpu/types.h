// Words shared by all kernels: dtypes, weight formats, one expert's matrix.
//
// Included by files that are compiled for one instruction set: plain structs and static inline
// functions only, no templates of the standard library (the linker may keep the AVX-512 copy of one
// for everybody).
#ifndef MOEFAST_CPU_TYPES_H
#define MOEFAST_CPU_TYPES_H

#include <stddef.h>
#include <stdint.h>

#include "moefast.h"

namespace moefast {

// The layout of a weight. Groups of `group` values share a scale (and, affine, an offset).
struct Format {
  int mode;   // enum moefast_mode
  int bits;   // of a code; of a value for MOEFAST_PLAIN
  int group;  // 0 for MOEFAST_PLAIN
  int dtype;  // of plain values, or of affine scales and offsets
};

// The weight of one linear map: `out` rows of `in` values.
struct Matrix {
  Format format;
  int64_t out;
  int64_t in;
  const uint8_t* weight;
  const uint8_t* scales;
  const uint8_t* biases;  // affine offsets
  float factor;           // multiplies every product: nvfp4's global scale, else 1
  int64_t row_bytes;      // of weight
  int64_t scale_bytes;    // of a row of scales, and of offsets
};

static inline int64_t size_of(int dtype) {
  return dtype == MOEFAST_FLOAT32 ? 4 : 2;
}

static inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

}  // namespace moefast

#endif
