// Many tokens are taken a chunk at a time, so that scratch memory is bounded.
#ifndef MOEFAST_CPU_CHUNKS_H
#define MOEFAST_CPU_CHUNKS_H

#include <algorithm>

#include "operands.h"

namespace moefast {

// Routes whose activations are held at once. An expert's weights are read once per chunk, so chunks
// are large: with 8 routes a token, 2048 tokens.
constexpr int64_t kChunkRoutes = 16 << 10;

inline void* row_at(void* data, int dtype, int64_t row, int64_t dims) {
  return static_cast<uint8_t*>(data) + row * dims * size_of(dtype);
}

inline const void* row_at(const void* data, int dtype, int64_t row, int64_t dims) {
  return static_cast<const uint8_t*>(data) + row * dims * size_of(dtype);
}

// Calls work(source, first token) for each chunk of x, each with the scratch memory to itself.
template <class Work>
void each_chunk(moefast_engine& engine,
                const moefast_rows& x,
                int64_t routes_per_token,
                Work&& work) {
  const int64_t step = std::max<int64_t>(1, kChunkRoutes / std::max<int64_t>(1, routes_per_token));
  const int64_t stride = x.stride * size_of(x.dtype);
  for (int64_t first = 0; first < x.count; first += step) {
    const auto* data = static_cast<const uint8_t*>(x.data) + first * stride;
    engine.scratch.reset();
    work(Source{data, stride, std::min(step, x.count - first), x.dims, x.dtype}, first);
  }
}

}  // namespace moefast

#endif
