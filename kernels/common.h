// What every kernel here begins with.
#ifndef MOEFAST_COMMON_H
#define MOEFAST_COMMON_H

#include <metal_stdlib>

using namespace metal;

// A product is added with one rounding exactly where the source says fma: results must not depend
// on what a compiler makes of a sum of products.
#pragma METAL fp contract(off)

namespace moefast {

constexpr constant int kLanes = 32;  // of a simdgroup

// How weights are packed: MODES of moefast/backends/metal/operands.py.
enum Mode { kPlain = 0, kAffine = 1, kMxfp4 = 2, kMxfp8 = 3, kNvfp4 = 4 };

}  // namespace moefast

#endif
