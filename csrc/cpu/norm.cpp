// moefast_norm: RMSNorm and LayerNorm.
#include <algorithm>
#include <cmath>

#include "check.h"
#include "chunks.h"
#include "engine.h"
#include "vectors.h"

namespace moefast {
namespace {

// Values that one piece of work takes, about.
constexpr int64_t kPieceValues = 16 << 10;

// In so many partial sums, which compilers turn into vectors; their order is part of the result.
constexpr int64_t kLanes = 16;

template <class Term>
float sum(const float* x, int64_t count, Term term) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] += term(x[i + lane]);
    }
  }
  for (; i < count; ++i) {
    lanes[i % kLanes] += term(x[i]);
  }
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) {
      lanes[lane] += lanes[lane + half];
    }
  }
  return lanes[0];
}

struct Norm {
  const float* weight;  // NULL: none
  const float* bias;
  float eps;
  bool centered;

  void operator()(float* x, int64_t count) const {
    const float size = static_cast<float>(count);
    if (centered) {
      const float mean = sum(x, count, [](float value) { return value; }) / size;
      std::for_each(x, x + count, [=](float& value) { value -= mean; });
    }
    const float square = sum(x, count, [](float value) { return value * value; }) / size;
    const float factor = 1.0f / std::sqrt(square + eps);
    for (int64_t i = 0; i < count; ++i) {
      x[i] *= factor;
    }
    if (weight != nullptr) {
      for (int64_t i = 0; i < count; ++i) {
        x[i] *= weight[i];
      }
    }
    if (bias != nullptr) {
      for (int64_t i = 0; i < count; ++i) {
        x[i] += bias[i];
      }
    }
  }
};

}  // namespace
}  // namespace moefast

using namespace moefast;

extern "C" int moefast_norm(moefast_engine* engine,
                            const moefast_rows* x,
                            const moefast_vector* weight,
                            const moefast_vector* bias,
                            float eps,
                            int32_t centered,
                            void* out,
                            int32_t out_dtype) {
  return run_on(engine, centered ? "layer_norm" : "rms_norm", [&](moefast_engine& on) {
    check_pointer("x", x);
    check_rows("x", *x);
    check_dtype("out", out_dtype);
    if (x->count == 0) {
      return;
    }
    check_pointer("out", out);
    const int64_t dims = x->dims;
    const Norm norm{floats_of("weight", weight, dims, on), floats_of("bias", bias, dims, on), eps,
                    centered != 0};
    const int64_t size = round_up(dims, 16), step = std::max<int64_t>(1, kPieceValues / dims);
    auto* rows = on.scratch.take<float>(on.pool.threads() * size);
    on.pool.run((x->count + step - 1) / step, [&](int64_t item, int64_t, int thread) {
      float* row = rows + thread * size;
      const int64_t end = std::min(x->count, (item + 1) * step);
      for (int64_t r = item * step; r < end; ++r) {
        on.isa.widen(x->dtype, row_at(x->data, x->dtype, r, x->stride), dims, row);
        norm(row, dims);
        on.isa.narrow(out_dtype, row, dims, row_at(out, out_dtype, r, dims));
      }
    });
  });
}
