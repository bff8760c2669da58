// The product of all tokens with one dense weight.
#ifndef MOEFAST_CPU_DENSE_H
#define MOEFAST_CPU_DENSE_H

#include "linear.h"
#include "operands.h"

namespace moefast {

// out [x.count, out_dims] of `dtype` = x @ weight.T + bias, to the precision of `dtype`.
void multiply_dense(moefast_engine& engine,
                    const Source& x,
                    const moefast_projection& weight,
                    void* out,
                    int dtype);

}  // namespace moefast

#endif
