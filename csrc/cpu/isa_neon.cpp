// 64-bit ARM with dot products of bytes (SDOT, and USDOT of I8MM).
//
// 2-, 4- and 8-bit affine weights, mxfp4 and nvfp4 are multiplied with activations of 15 bits where
// the result is rounded to half precision; everything else takes the generic product.
#include "generic/attention.h"
#include "generic/convert.h"
#include "generic/elementwise.h"
#include "generic/measure.h"
#include "generic/product.h"
#include "generic/sum_exp.h"
#include "isa.h"
#include "neon/codes.h"

namespace moefast {
namespace {

const Product* product(const Format& format, Precision precision, int64_t, int64_t) {
  if (precision <= kFloat32) {
    return generic_product();
  }
  if (format.mode == MOEFAST_MXFP4 || format.mode == MOEFAST_NVFP4) {
    return int15_product<NeonCodes<E2m1Codes>>();
  }
  if (format.mode == MOEFAST_AFFINE) {
    switch (format.bits) {
      case 2:
        return int15_product<NeonCodes<UnsignedCodes<2>>>();
      case 4:
        return int15_product<NeonCodes<UnsignedCodes<4>>>();
      case 8:
        return int15_product<NeonCodes<ByteCodes>>();
    }
  }
  return generic_product();
}

constexpr Isa kNeon = {"neon",  product,     widen,     narrow,      activate, add_scaled,
                       sum_exp, &kAttention, read_once, count_flops, nullptr};

}  // namespace

const Isa* isa_neon() {
  return &kNeon;
}

}  // namespace moefast
