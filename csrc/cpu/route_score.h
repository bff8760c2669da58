// The steps of routing that compute: logits to scores, scores to keys, chosen scores to weights.
#ifndef MOEFAST_CPU_ROUTE_SCORE_H
#define MOEFAST_CPU_ROUTE_SCORE_H

#include "route.h"

namespace moefast {

// x[i] = x[i] rounded to dtype.
void round_to(int dtype, float* x, int64_t count);

// Softcap and temperature, on logits of dtype.
void transform_logits(const moefast_router& spec, int dtype, float* x, int64_t count);

// Logits of dtype become scores of dtype. Softmax is over the `count` values given.
void score_logits(const moefast_router& spec, int dtype, float* x, int64_t count);

// keys = scores + selection_bias; without one, the scores themselves.
void add_selection_bias(const Router& router, const float* scores, float* keys);

// Chosen scores of dtype become weights: divided by their sum, scaled, rounded to weights_dtype.
void finish_weights(const Router& router, int dtype, const uint32_t* indices, float* weights);

}  // namespace moefast

#endif
