// moefast_moe: routing, experts, combine and shared expert in one go.
#include <algorithm>
#include <cinttypes>
#include <cmath>

#include "check.h"
#include "chunks.h"
#include "dense.h"
#include "ffn.h"
#include "route.h"

namespace moefast {
namespace {

struct Call {
  const moefast_rows& x;
  const moefast_rows& logits;
  const moefast_router& router;
  const moefast_vector* selection_bias;
  const moefast_vector* expert_scale;
  const moefast_ffn& experts;
  const moefast_ffn* shared;
  const moefast_projection* shared_gate;
  int combine_dtype;
  void* out;
  int out_dtype;
};

void check(const Call& call) {
  const moefast_rows &x = call.x, &logits = call.logits;
  check_rows("x", x);
  check_rows("logits", logits);
  check_dtype("out", call.out_dtype);
  if (call.combine_dtype != -1) {
    check_dtype("combine_dtype", call.combine_dtype);
  }
  if (logits.count != x.count || logits.dims != call.router.num_experts) {
    refuse("logits must be %" PRId64 " x num_experts=%" PRId64 ", got %" PRId64 " x %" PRId64 ".",
           x.count, call.router.num_experts, logits.count, logits.dims);
  }
  check_ffn("experts", call.experts, x.dims, true);
  const int64_t stacked = call.router.num_experts - call.router.identity_experts;
  if (call.experts.up->num_experts != stacked) {
    refuse("experts must be stacks of %" PRId64 ", got %" PRId64 ".", stacked,
           call.experts.up->num_experts);
  }
  if (call.shared != nullptr) {
    check_ffn("shared", *call.shared, x.dims, false);
  }
  if (call.shared_gate != nullptr) {
    if (call.shared == nullptr) {
      refuse("shared_gate belongs to a shared expert, got %s.", "none");
    }
    const moefast_projection& gate = *call.shared_gate;
    check_projection("shared_gate", gate);
    if (gate.num_experts != 0 || gate.out_dims != 1 || gate.in_dims != x.dims) {
      refuse("shared_gate must map %" PRId64 " to 1, got %" PRId64 " to %" PRId64 ".", x.dims,
             gate.in_dims, gate.out_dims);
    }
  }
  if (x.count > 0) {
    check_pointer("out", call.out);
  }
}

// Rounds to a dtype, in place.
void round_to(moefast_engine& on, int dtype, int64_t count, float* values) {
  if (dtype == MOEFAST_FLOAT16 || dtype == MOEFAST_BFLOAT16) {
    auto* half = on.scratch.take<uint16_t>(count);
    on.isa.narrow(dtype, values, count, half);
    on.isa.widen(dtype, half, count, values);
  }
}

// The weights of each token's experts that return their input, summed up.
const float* identity_weights(moefast_engine& on,
                              const Call& call,
                              const uint32_t* indices,
                              const float* weights,
                              int64_t tokens) {
  if (call.router.identity_experts == 0) {
    return nullptr;
  }
  const int64_t top_k = call.router.top_k;
  const auto stacked = static_cast<uint32_t>(call.experts.up->num_experts);
  auto* sums = on.scratch.take<float>(tokens);
  for (int64_t t = 0; t < tokens; ++t) {
    sums[t] = 0.0f;
    for (int64_t i = t * top_k; i < (t + 1) * top_k; ++i) {
      sums[t] += indices[i] >= stacked ? weights[i] : 0.0f;
    }
  }
  return sums;
}

// sigmoid(shared_gate(x)), or NULL where the shared expert has no gate.
const float* shared_weights(moefast_engine& on, const Call& call, const Source& x) {
  if (call.shared_gate == nullptr) {
    return nullptr;
  }
  auto* weights = on.scratch.take<float>(x.count);
  const DenseProduct gate{call.shared_gate, weights};
  multiply_dense(on, x, &gate, 1, MOEFAST_FLOAT32);
  for (int64_t t = 0; t < x.count; ++t) {
    weights[t] = 1.0f / (1.0f + std::exp(-weights[t]));
  }
  return weights;
}

void run_chunk(moefast_engine& on, const Call& call, const Source& x, int64_t first) {
  const int64_t top_k = call.router.top_k, routes = x.count * top_k;
  const Router router =
      router_of(call.router, call.logits.dtype, call.selection_bias, call.expert_scale, on);
  moefast_rows logits = call.logits;
  logits.data =
      static_cast<const uint8_t*>(logits.data) + first * logits.stride * size_of(logits.dtype);
  logits.count = x.count;
  auto* indices = on.scratch.take<uint32_t>(routes);
  auto* weights = on.scratch.take<float>(routes);
  route_rows(on, router, logits, indices, weights, MOEFAST_FLOAT32);
  round_to(on, call.combine_dtype, routes, weights);
  if (call.router.scale_output != 0) {
    for (int64_t i = 0; i < routes; ++i) {
      weights[i] *= call.router.scale;
    }
  }

  FeedForward work;
  work.x = x;
  work.precision = precision_of(call.out_dtype);
  work.out = row_at(call.out, call.out_dtype, first, x.dims);
  work.out_dtype = call.out_dtype;
  work.identity = identity_weights(on, call, indices, weights, x.count);
  add_routed(call.experts, reinterpret_cast<const int32_t*>(indices), weights, x.count, top_k,
             work);
  if (call.shared != nullptr) {
    add_shared(*call.shared, shared_weights(on, call, x), x.count, work);
  }
  run(on, work);
}

}  // namespace
}  // namespace moefast

using namespace moefast;

extern "C" int moefast_moe(moefast_engine* engine,
                           const moefast_rows* x,
                           const moefast_rows* logits,
                           const moefast_router* router,
                           const moefast_vector* selection_bias,
                           const moefast_vector* expert_scale,
                           const moefast_ffn* experts,
                           const moefast_ffn* shared,
                           const moefast_projection* shared_gate,
                           int32_t combine_dtype,
                           void* out,
                           int32_t out_dtype) {
  return run_on(engine, "moe", [&](moefast_engine& on) {
    check_pointer("x", x);
    check_pointer("logits", logits);
    check_pointer("router", router);
    check_pointer("experts", experts);
    const Call call{*x,       *logits, *router,     selection_bias, expert_scale,
                    *experts, shared,  shared_gate, combine_dtype,  out,
                    out_dtype};
    check(call);
    // The router's own rules, before anything depends on them.
    router_of(*router, logits->dtype, selection_bias, expert_scale, on);
    each_chunk(on, *x, router->top_k + (shared != nullptr ? 1 : 0),
               [&](const Source& rows, int64_t first) { run_chunk(on, call, rows, first); });
  });
}
