// Rows of activations made ready for the products that will read them.
#ifndef MOEFAST_CPU_OPERANDS_H
#define MOEFAST_CPU_OPERANDS_H

#include "engine.h"

namespace moefast {

// Where rows come from.
struct Source {
  const uint8_t* data;
  int64_t stride;  // bytes
  int64_t count;
  int64_t dims;
  int dtype;

  const void* row(int64_t i) const { return data + i * stride; }
};

// One side of a product, rows[index[0..count)] of a source, and what it will be multiplied with.
struct Operand {
  // Asked for.
  const Matrix* matrix;
  const int32_t* index;
  int64_t count;
  // Given by prepare().
  const Product* product = nullptr;
  const void* const* rows = nullptr;

  // y [count, end - begin] (rows ldy apart) = the products with rows [begin, end) of the matrix.
  void multiply(int64_t begin, int64_t end, float* y, int64_t ldy, const Ahead& ahead) const {
    product->multiply(*matrix, begin, end, rows, count, y, ldy, ahead);
  }
};

// Chooses a product for each operand and prepares its rows, in scratch memory that lasts as long as
// the operation. A row is prepared once for all operands that can share it. Where a row holds
// values that the product of choice cannot (infinities, NaN, extremes), its operands take the
// float32 product instead.
void prepare(moefast_engine& engine,
             const Source& source,
             Precision precision,
             Operand* operands,
             int64_t count);

}  // namespace moefast

#endif
