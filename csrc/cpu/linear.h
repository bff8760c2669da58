// One projection of one expert: its matrix and its output bias.
#ifndef MOEFAST_CPU_LINEAR_H
#define MOEFAST_CPU_LINEAR_H

#include "isa.h"

namespace moefast {

struct Linear {
  Matrix matrix;
  const uint8_t* bias;  // [out] of bias_dtype, or NULL
  int bias_dtype;
};

// Expert `expert` of a stack; a dense weight's is 0.
Linear linear_of(const moefast_projection& projection, int64_t expert);

// How exact a product must be whose result is rounded to `dtype`.
inline Precision precision_of(int dtype) {
  return dtype == MOEFAST_FLOAT32 ? kFloat32 : dtype == MOEFAST_FLOAT16 ? kFloat16 : kBfloat16;
}

// y[r * ldy + n - begin] += bias[n] for begin <= n < end, 0 <= r < count.
void add_bias(const Isa& isa,
              const Linear& linear,
              int64_t begin,
              int64_t end,
              int64_t count,
              float* y,
              int64_t ldy);

// The first bytes of rows [begin, end) of a weight, to be fetched ahead of their use.
inline Ahead ahead_of(const Matrix& w, int64_t begin, int64_t end) {
  return {w.weight + begin * w.row_bytes, (end - begin) * w.row_bytes,
          w.scales ? w.scales + begin * w.scale_bytes : nullptr,
          w.biases ? w.biases + begin * w.scale_bytes : nullptr};
}

// Rows of a weight that one piece of work takes, where there are `rows` in all, for `count` rows of
// activations: enough for a stream of reads to get going, few enough that the threads end together.
int64_t rows_per_piece(const Matrix& w, int64_t rows, int threads, int64_t count);

}  // namespace moefast

#endif
