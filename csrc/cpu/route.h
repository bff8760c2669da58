// Router logits to experts and weights: moefast.route on the CPU.
//
// The formulas, their order and where they round are those of the reference
// (moefast/backends/reference/route.py), operation by operation. All arithmetic is in float32; what
// the reference has in half precision is rounded after each operation to the value it would have.
#ifndef MOEFAST_CPU_ROUTE_H
#define MOEFAST_CPU_ROUTE_H

#include "engine.h"

namespace moefast {

// A router made ready: vectors in float32, and the dtype of every intermediate result.
struct Router {
  moefast_router spec;
  int logits_dtype;
  int score_dtype;
  int key_dtype;
  int weights_dtype;            // of the weights that come out, by the spec
  int cast_dtype;               // scores are rounded to it before the selection bias is added
  int scaled_dtype;             // of the weights once expert_scale has multiplied them
  const float* selection_bias;  // [num_experts], or NULL
  const float* expert_scale;    // [num_experts], or NULL

  // Whether any group of experts is ever left out.
  bool drops_groups() const { return spec.top_groups < spec.num_groups; }
};

// Throws BadValue where the spec breaks a rule of moefast.RouterSpec.
void check_router(const moefast_router& spec);

// Checks the spec and makes it ready. The vectors, num_experts long, are converted into the
// engine's scratch memory.
Router router_of(const moefast_router& spec,
                 int logits_dtype,
                 const moefast_vector* selection_bias,
                 const moefast_vector* expert_scale,
                 moefast_engine& engine);

// Floats of memory that route_row() needs, to begin at a multiple of 64 bytes.
int64_t route_workspace(const Router& router);

// Routes one token: logits [num_experts] of router.logits_dtype -> indices [top_k] and weights
// [top_k], which have values of router.weights_dtype. Whatever the logits are, NaN included,
// indices are distinct and in range. They come in the stable ascending order of the key (lowest: of
// its negative, so best first; highest: the last top_k, so best last), NaN after all other keys.
void route_row(
    const Router& router, const void* logits, float* workspace, uint32_t* indices, float* weights);

// Routes all rows, on the pool where they are many. logits.dims must be num_experts. `weights`
// [count, top_k] of weights_dtype: rounded to the router's dtype first, then to this one.
void route_rows(moefast_engine& engine,
                const Router& router,
                const moefast_rows& logits,
                uint32_t* indices,
                void* weights,
                int weights_dtype);

}  // namespace moefast

#endif
