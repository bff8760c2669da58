// AVX-512 with VNNI and VBMI: Ice Lake, Zen 4 and later.
//
// Coded weights are multiplied with 15-bit activations where the result is float16 or bfloat16,
// plain ones in float32; the rest is the generic code, compiled for 512 bits.
#include "avx512/products.h"
#include "generic/attention.h"
#include "generic/convert.h"
#include "generic/elementwise.h"
#include "generic/measure.h"
#include "generic/product.h"
#include "generic/sum_exp.h"
#include "isa.h"

namespace moefast {
namespace {

const Product* product(const Format& format, Precision precision, int64_t, int64_t) {
  const Product* found = avx512_product(format, precision);
  return found != nullptr ? found : generic_product();
}

constexpr Isa kAvx512 = {"avx512", product,     widen,     narrow,      activate, add_scaled,
                         sum_exp,  &kAttention, read_once, count_flops, nullptr};

}  // namespace

const Isa* isa_avx512() {
  return &kAvx512;
}

}  // namespace moefast
