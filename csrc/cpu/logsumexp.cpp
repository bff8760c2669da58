// moefast_logsumexp: the logarithm of a sum of exponentials, of each row.
#include <algorithm>
#include <cmath>

#include "check.h"
#include "chunks.h"
#include "engine.h"

namespace moefast {
namespace {

// Values that one piece of work takes. Their floats stay in the first cache, and float32 is exact
// enough for the sum of so many; the sums of pieces are added up in float64, in the pieces' order.
constexpr int64_t kPieceValues = 4 << 10;

// The logarithm of the sum of `count` pieces.
float combined(const SumExp* pieces, int64_t count) {
  float largest = pieces[0].largest;
  for (int64_t i = 0; i < count; ++i) {
    if (std::isnan(pieces[i].sum)) {
      return pieces[i].sum;
    }
    largest = std::max(largest, pieces[i].largest);
  }
  if (std::isinf(largest)) {
    return largest;
  }
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    sum += static_cast<double>(pieces[i].sum) *
           std::exp(static_cast<double>(pieces[i].largest) - static_cast<double>(largest));
  }
  return static_cast<float>(static_cast<double>(largest) + std::log(sum));
}

}  // namespace
}  // namespace moefast

using namespace moefast;

extern "C" int moefast_logsumexp(moefast_engine* engine,
                                 const moefast_rows* x,
                                 void* out,
                                 int32_t out_dtype) {
  return run_on(engine, "logsumexp", [&](moefast_engine& on) {
    check_pointer("x", x);
    check_rows("x", *x);
    check_dtype("out", out_dtype);
    if (x->count == 0) {
      return;
    }
    check_pointer("out", out);
    const int64_t per_row = (x->dims + kPieceValues - 1) / kPieceValues;
    auto* sums = on.scratch.take<SumExp>(x->count * per_row);
    auto* floats = on.scratch.take<float>(on.pool.threads() * kPieceValues);
    on.pool.run(x->count * per_row, [&](int64_t item, int64_t, int thread) {
      const int64_t row = item / per_row, first = item % per_row * kPieceValues;
      const int64_t size = std::min(kPieceValues, x->dims - first);
      float* values = floats + thread * kPieceValues;
      on.isa.widen(x->dtype, row_at(x->data, x->dtype, row * x->stride + first, 1), size, values);
      sums[item] = on.isa.sum_exp(values, size);
    });
    auto* results = on.scratch.take<float>(x->count);
    for (int64_t row = 0; row < x->count; ++row) {
      results[row] = combined(sums + row * per_row, per_row);
    }
    on.isa.narrow(out_dtype, results, x->count, out);
  });
}
