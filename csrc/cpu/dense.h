// The products of all tokens with dense weights.
#ifndef MOEFAST_CPU_DENSE_H
#define MOEFAST_CPU_DENSE_H

#include "linear.h"
#include "operands.h"

namespace moefast {

struct DenseProduct {
  const moefast_projection* weight;
  void* out;  // [x.count, out_dims]
};

// Each product's out, of `dtype`, = x @ weight.T + bias, to the precision of `dtype`. They are
// computed together: x is prepared once, and threads meet once.
void multiply_dense(moefast_engine& engine,
                    const Source& x,
                    const DenseProduct* products,
                    int64_t count,
                    int dtype);

}  // namespace moefast

#endif
