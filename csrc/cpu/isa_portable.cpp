// What any CPU runs: the generic code, compiled for the oldest machine that the build supports.
#include "generic/attention.h"
#include "generic/convert.h"
#include "generic/elementwise.h"
#include "generic/measure.h"
#include "generic/product.h"
#include "generic/sum_exp.h"
#include "isa.h"

namespace moefast {
namespace {

const Product* product(const Format&, Precision, int64_t, int64_t) {
  return generic_product();
}

constexpr Isa kPortable = {"portable", product,     widen,     narrow,      activate, add_scaled,
                           sum_exp,    &kAttention, read_once, count_flops, nullptr};

}  // namespace

const Isa* isa_portable() {
  return &kPortable;
}

}  // namespace moefast
