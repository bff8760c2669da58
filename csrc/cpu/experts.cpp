// moefast_switch_glu and moefast_experts: routed feed-forward networks, apart and summed.
#include <algorithm>
#include <cinttypes>

#include "check.h"
#include "chunks.h"
#include "ffn.h"

namespace moefast {
namespace {

void check(const moefast_rows& x,
           const moefast_ffn& experts,
           const int32_t* indices,
           int64_t top_k,
           const void* out,
           int32_t out_dtype) {
  check_rows("x", x);
  check_dtype("out", out_dtype);
  check_ffn("experts", experts, x.dims, true);
  if (top_k < 1) {
    refuse("top_k must be at least 1, got %" PRId64 ".", top_k);
  }
  if (x.count > 0) {
    check_pointer("indices", indices);
    check_pointer("out", out);
    check_indices(indices, x.count * top_k, experts.up->num_experts);
  }
}

}  // namespace
}  // namespace moefast

using namespace moefast;

extern "C" {

int moefast_switch_glu(moefast_engine* engine,
                       const moefast_rows* x,
                       const moefast_ffn* experts,
                       const int32_t* indices,
                       int64_t top_k,
                       void* out,
                       int32_t out_dtype) {
  return run_on(engine, "switch_glu", [&](moefast_engine& on) {
    check_pointer("x", x);
    check_pointer("experts", experts);
    check(*x, *experts, indices, top_k, out, out_dtype);
    each_chunk(on, *x, top_k, [&](const Source& rows, int64_t first) {
      FeedForward work;
      work.x = rows;
      work.precision = precision_of(out_dtype);
      work.out = row_at(out, out_dtype, first * top_k, x->dims);
      work.out_dtype = out_dtype;
      work.apart = true;
      add_routed(*experts, indices + first * top_k, nullptr, rows.count, top_k, work);
      run(on, work);
    });
  });
}

int moefast_experts(moefast_engine* engine,
                    const moefast_rows* x,
                    const moefast_ffn* experts,
                    const int32_t* indices,
                    const moefast_vector* weights,
                    int64_t top_k,
                    void* out,
                    int32_t out_dtype) {
  return run_on(engine, "experts", [&](moefast_engine& on) {
    check_pointer("x", x);
    check_pointer("experts", experts);
    check_pointer("weights", weights);
    check(*x, *experts, indices, top_k, out, out_dtype);
    check_dtype("weights", weights->dtype);
    if (x->count > 0) {
      check_pointer("weights", weights->data);
    }
    each_chunk(on, *x, top_k, [&](const Source& rows, int64_t first) {
      const int64_t routes = rows.count * top_k;
      auto* factors = on.scratch.take<float>(routes);
      on.isa.widen(weights->dtype, row_at(weights->data, weights->dtype, first, top_k), routes,
                   factors);
      FeedForward work;
      work.x = rows;
      work.precision = precision_of(out_dtype);
      work.out = row_at(out, out_dtype, first, x->dims);
      work.out_dtype = out_dtype;
      add_routed(*experts, indices + first * top_k, factors, rows.count, top_k, work);
      run(on, work);
    });
  });
}

}  // extern "C"
