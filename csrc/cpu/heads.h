// Rows of queries, keys or values where they lie.
#ifndef MOEFAST_CPU_HEADS_H
#define MOEFAST_CPU_HEADS_H

#include "types.h"

namespace moefast {

inline const uint8_t* row_of(const moefast_heads& x, int64_t batch, int64_t head, int64_t row) {
  return static_cast<const uint8_t*>(x.data) +
         (batch * x.batch_stride + head * x.head_stride + row * x.row_stride) * size_of(x.dtype);
}

}  // namespace moefast

#endif
