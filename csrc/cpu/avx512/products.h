#ifndef MOEFAST_CPU_AVX512_PRODUCTS_H
#define MOEFAST_CPU_AVX512_PRODUCTS_H

#include "../isa.h"

namespace moefast {

// The product written for a format, or NULL: the generic one is as good.
const Product* avx512_product(const Format& format, Precision precision);

}  // namespace moefast

#endif
