// moefast_norm and moefast_add_norm: RMSNorm and LayerNorm, of rows or of sums of rows.
#include <algorithm>
#include <cinttypes>
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

// load(r, row) puts the floats of row r into `row`, where there is room for `spare` more.
template <class Load>
void norm_rows(moefast_engine& on,
               int64_t count,
               int64_t dims,
               const Norm& norm,
               int64_t spare,
               Load load,
               void* out,
               int out_dtype) {
  const int64_t size = round_up(dims + spare, 16);
  const int64_t step = std::max<int64_t>(1, kPieceValues / dims);
  auto* rows = on.scratch.take<float>(on.pool.threads() * size);
  on.pool.run((count + step - 1) / step, [&](int64_t item, int64_t, int thread) {
    float* row = rows + thread * size;
    const int64_t end = std::min(count, (item + 1) * step);
    for (int64_t r = item * step; r < end; ++r) {
      load(r, row);
      norm(row, dims);
      on.isa.narrow(out_dtype, row, dims, row_at(out, out_dtype, r, dims));
    }
  });
}

// Sums of rows, stored in a dtype of theirs. Whatever is rounded where the operations are separate
// is rounded here; that it goes through memory also keeps products from being fused with additions.
struct Sums {
  const moefast_rows& x;
  const moefast_rows& branch;
  float multiplier;  // of the branch's dtype
  void* out;
  int dtype;

  // Row r as it is stored, with as many floats of scratch memory behind it.
  void operator()(const Isa& isa, int64_t r, float* row) const {
    const int64_t dims = x.dims;
    float* added = row + dims;
    isa.widen(branch.dtype, row_at(branch.data, branch.dtype, r, branch.stride), dims, added);
    if (multiplier != 1.0f) {
      for (int64_t i = 0; i < dims; ++i) {
        added[i] *= multiplier;
      }
      isa.narrow(branch.dtype, added, dims, row);
      isa.widen(branch.dtype, row, dims, added);
    }
    isa.widen(x.dtype, row_at(x.data, x.dtype, r, x.stride), dims, row);
    for (int64_t i = 0; i < dims; ++i) {
      row[i] += added[i];
    }
    void* sum = row_at(out, dtype, r, dims);
    isa.narrow(dtype, row, dims, sum);
    isa.widen(dtype, sum, dims, row);
  }
};

float rounded(const Isa& isa, int dtype, float value) {
  float bits, result;
  isa.narrow(dtype, &value, 1, &bits);
  isa.widen(dtype, &bits, 1, &result);
  return result;
}

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
    const auto load = [&](int64_t r, float* row) {
      on.isa.widen(x->dtype, row_at(x->data, x->dtype, r, x->stride), dims, row);
    };
    norm_rows(on, x->count, dims, norm, 0, load, out, out_dtype);
  });
}

extern "C" int moefast_add_norm(moefast_engine* engine,
                                const moefast_rows* x,
                                const moefast_rows* branch,
                                float multiplier,
                                const moefast_vector* weight,
                                const moefast_vector* bias,
                                float eps,
                                int32_t centered,
                                void* sum,
                                int32_t sum_dtype,
                                void* out,
                                int32_t out_dtype) {
  return run_on(engine, centered ? "add_layer_norm" : "add_rms_norm", [&](moefast_engine& on) {
    check_pointer("x", x);
    check_pointer("branch", branch);
    check_rows("x", *x);
    check_rows("branch", *branch);
    if (branch->count != x->count || branch->dims != x->dims) {
      refuse("branch must be %" PRId64 " rows of %" PRId64 ", got %" PRId64 " of %" PRId64 ".",
             x->count, x->dims, branch->count, branch->dims);
    }
    check_dtype("sum", sum_dtype);
    check_dtype("out", out_dtype);
    if (x->count == 0) {
      return;
    }
    check_pointer("sum", sum);
    check_pointer("out", out);
    const int64_t dims = x->dims;
    const Norm norm{floats_of("weight", weight, dims, on), floats_of("bias", bias, dims, on), eps,
                    centered != 0};
    const float factor = rounded(on.isa, branch->dtype, multiplier);
    const Sums sums{*x, *branch, factor, sum, sum_dtype};
    const auto load = [&](int64_t r, float* row) { sums(on.isa, r, row); };
    norm_rows(on, x->count, dims, norm, dims, load, out, out_dtype);
  });
}
