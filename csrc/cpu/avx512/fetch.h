// Fetching what a decoded token reads next.
//
// A core that only asks for what it needs now gets a fraction of the memory's bandwidth, and the
// hardware's own prefetchers stop at the end of each page. Rows of a weight follow one another, so
// whoever reads at an address asks for what lies 8 KB further on; past the last row that is in the
// next piece of work.
#ifndef MOEFAST_CPU_AVX512_FETCH_H
#define MOEFAST_CPU_AVX512_FETCH_H

#include <immintrin.h>

#include "../isa.h"

namespace moefast {
namespace {

struct Fetch {
  static constexpr int64_t kDistance = 8192;

  const uint8_t* end;  // of this piece's rows
  Ahead ahead;

  // What stands for `row`, kDistance on.
  inline const uint8_t* from(const uint8_t* row) const {
    const uint8_t* at = row + kDistance;
    if (at < end) {
      return at;
    }
    return ahead.weight != nullptr ? ahead.weight + (at - end) : row;
  }

  // The scales and offsets of the row that is kDistance after row n.
  // GCC 12 drops calls of inline functions that do nothing but prefetch: hence the attribute.
  [[gnu::always_inline]] inline void scales(const Matrix& w, int64_t n, int64_t last) const {
    const int64_t later = n + kDistance / w.row_bytes + 1;
    one(w.scales, ahead.scales, later, last, w.scale_bytes);
    if (w.biases != nullptr) {
      one(w.biases, ahead.biases, later, last, w.scale_bytes);
    }
  }

 private:
  [[gnu::always_inline]] static inline void one(
      const uint8_t* here, const uint8_t* next, int64_t row, int64_t last, int64_t bytes) {
    const uint8_t* at = row < last ? here + row * bytes : next ? next + (row - last) * bytes : here;
    _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0);
  }
};

}  // namespace
}  // namespace moefast

#endif
