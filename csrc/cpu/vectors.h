// Optional vectors of floats among the arguments of an operation.
#ifndef MOEFAST_CPU_VECTORS_H
#define MOEFAST_CPU_VECTORS_H

#include "check.h"
#include "engine.h"

namespace moefast {

// Its `count` values in float32, in scratch memory, or NULL where there are none.
inline float* floats_of(const char* name,
                        const moefast_vector* vector,
                        int64_t count,
                        moefast_engine& engine) {
  if (vector == nullptr || vector->data == nullptr) {
    return nullptr;
  }
  check_dtype(name, vector->dtype);
  auto* floats = engine.scratch.take<float>(count);
  engine.isa.widen(vector->dtype, vector->data, count, floats);
  return floats;
}

}  // namespace moefast

#endif
