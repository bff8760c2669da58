// AVX2 with FMA and F16C.
//
// 2-, 4- and 8-bit affine weights, mxfp4 and nvfp4 are multiplied with activations of 15 bits where
// the result is rounded to half precision; everything else takes the generic product, which memory
// cannot keep up with for plain weights.
#include "avx2/codes.h"
#include "generic/attention.h"
#include "generic/convert.h"
#include "generic/elementwise.h"
#include "generic/measure.h"
#include "generic/product.h"
#include "generic/sum_exp.h"
#include "isa.h"

namespace moefast {
namespace {

const Product* product(const Format& format, Precision precision, int64_t, int64_t count) {
  const bool e2m1 = format.mode == MOEFAST_MXFP4 || format.mode == MOEFAST_NVFP4;
  if (precision == kFloat32 && e2m1 && count <= kMostInParts) {
    return int30_product<Avx2Codes<E2m1Codes>>();
  }
  if (precision <= kFloat32) {
    return generic_product();
  }
  if (e2m1) {
    return int15_product<Avx2Codes<E2m1Codes>>();
  }
  if (format.mode == MOEFAST_AFFINE) {
    switch (format.bits) {
      case 2:
        return int15_product<Avx2Codes<UnsignedCodes<2>>>();
      case 4:
        return int15_product<Avx2Codes<UnsignedCodes<4>>>();
      case 8:
        return int15_product<Avx2Codes<UnsignedCodes<8>>>();
    }
  }
  return generic_product();
}

constexpr Isa kAvx2 = {"avx2",  product,     widen,     narrow,      activate, add_scaled,
                       sum_exp, &kAttention, read_once, count_flops, nullptr};

}  // namespace

const Isa* isa_avx2() {
  return &kAvx2;
}

}  // namespace moefast
