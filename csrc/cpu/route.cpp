#include "route.h"

#include <algorithm>
#include <cinttypes>
#include <cmath>

#include "check.h"
#include "generic/convert.h"
#include "route_choose.h"
#include "route_score.h"
#include "vectors.h"

namespace moefast {
namespace {

// Values of RouterSpec's optional dtypes.
constexpr int kNone = -1;
constexpr int kOther = -2;  // "scores" or "logits"

// What MLX makes of two dtypes.
int promoted(int a, int b) {
  return a == b ? a : MOEFAST_FLOAT32;
}

// -- checks ---------------------------------------------------------------------------------------

void check_range(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) {
    refuse("%s must be in %" PRId64 "..%" PRId64 ", got %" PRId64 ".", name, low, high, value);
  }
}

void check_number(const char* name, float value, bool good, const char* rule) {
  if (!std::isfinite(value) || !good) {
    refuse("%s must be finite%s, got %g.", name, rule, static_cast<double>(value));
  }
}

void check_optional_dtype(const char* name, int32_t dtype, int32_t least) {
  check_range(name, dtype, least, MOEFAST_BFLOAT16);
}

void check_groups(const moefast_router& spec) {
  check_range("num_groups", spec.num_groups, 1, spec.num_experts);
  check_range("top_groups", spec.top_groups, 1, spec.num_groups);
  if (spec.num_experts % spec.num_groups != 0) {
    refuse("num_groups must divide num_experts=%" PRId64 ", got %" PRId64 ".", spec.num_experts,
           spec.num_groups);
  }
  if (spec.weights_masked && (spec.dropped_minus_inf || spec.score_selected)) {
    refuse("weights_masked needs scores over all and a fill of zero, got %s.",
           spec.score_selected ? "scores over the selected" : "-inf");
  }
  if (spec.top_groups == spec.num_groups) {
    return;
  }
  if (spec.score_selected) {
    refuse("groups need scores over all, got scores over the selected.");
  }
  if (!spec.group_max && spec.num_experts / spec.num_groups < 2) {
    refuse("the sum of a group's two best needs two experts per group, got 1.");
  }
}

// -- making ready ---------------------------------------------------------------------------------

// So many floats, rounded up to whole cache lines.
int64_t padded(int64_t floats) {
  return round_up(floats, 16);
}

}  // namespace

void check_router(const moefast_router& spec) {
  check_range("num_experts", spec.num_experts, 1, INT32_MAX);
  check_range("top_k", spec.top_k, 1, spec.num_experts);
  check_number("softcap", spec.softcap, spec.softcap >= 0, " and not negative");
  check_number("temperature", spec.temperature, spec.temperature > 0, " and above 0");
  check_range("score", spec.score, MOEFAST_SOFTMAX, MOEFAST_SQRTSOFTPLUS);
  check_optional_dtype("score_dtype", spec.score_dtype, kNone);
  check_optional_dtype("bias_dtype", spec.bias_dtype, kOther);
  check_optional_dtype("weight_dtype", spec.weight_dtype, kOther);
  check_groups(spec);
  check_number("renormalize_eps", spec.renormalize_eps, spec.renormalize_eps >= 0,
               " and not negative");
  check_number("scale", spec.scale, true, "");
  check_range("identity_experts", spec.identity_experts, 0, spec.num_experts - 1);
}

Router router_of(const moefast_router& spec,
                 int logits_dtype,
                 const moefast_vector* selection_bias,
                 const moefast_vector* expert_scale,
                 moefast_engine& engine) {
  check_router(spec);
  check_dtype("logits", logits_dtype);
  Router router{};
  router.spec = spec;
  router.logits_dtype = logits_dtype;
  router.score_dtype = spec.score_dtype == kNone ? logits_dtype : spec.score_dtype;

  // Where only the selected are scored, the logits themselves are the keys.
  const int chosen_by = spec.score_selected ? logits_dtype : router.score_dtype;
  router.cast_dtype = router.key_dtype = chosen_by;
  float* bias = floats_of("selection_bias", selection_bias, spec.num_experts, engine);
  router.selection_bias = bias;
  if (bias != nullptr && spec.bias_dtype == kOther) {
    round_to(chosen_by, bias, spec.num_experts);
  } else if (bias != nullptr) {
    router.cast_dtype = spec.bias_dtype == kNone ? chosen_by : spec.bias_dtype;
    router.key_dtype = promoted(router.cast_dtype, selection_bias->dtype);
  }

  const int gathered = spec.weights_masked ? router.key_dtype : router.score_dtype;
  router.expert_scale = floats_of("expert_scale", expert_scale, spec.num_experts, engine);
  router.scaled_dtype =
      router.expert_scale == nullptr ? gathered : promoted(gathered, expert_scale->dtype);
  router.weights_dtype = spec.weight_dtype == kNone    ? router.scaled_dtype
                         : spec.weight_dtype == kOther ? logits_dtype
                                                       : spec.weight_dtype;
  return router;
}

int64_t route_workspace(const Router& router) {
  const int64_t experts = padded(router.spec.num_experts);
  // Scores, keys, ranks of two floats each, group scores.
  return 4 * experts + padded(router.spec.num_groups);
}

void route_row(
    const Router& router, const void* logits, float* workspace, uint32_t* indices, float* weights) {
  const moefast_router& spec = router.spec;
  const int64_t experts = padded(spec.num_experts);
  float* scores = workspace;
  float* keys = scores + experts;
  auto* ranks = reinterpret_cast<Rank*>(keys + experts);
  float* group_scores = keys + 3 * experts;

  widen(router.logits_dtype, logits, spec.num_experts, scores);
  if (spec.score_selected) {
    transform_logits(spec, router.logits_dtype, scores, spec.num_experts);
  } else {
    round_to(router.score_dtype, scores, spec.num_experts);
    transform_logits(spec, router.score_dtype, scores, spec.num_experts);
    score_logits(spec, router.score_dtype, scores, spec.num_experts);
  }
  add_selection_bias(router, scores, keys);
  if (router.drops_groups()) {
    drop_groups(router, keys, group_scores, ranks);
  }
  choose_experts(spec, keys, ranks, indices);

  const float* source = spec.weights_masked ? keys : scores;
  for (int64_t i = 0; i < spec.top_k; ++i) {
    weights[i] = source[indices[i]];
  }
  if (spec.score_selected) {
    round_to(router.score_dtype, weights, spec.top_k);
    score_logits(spec, router.score_dtype, weights, spec.top_k);
  }
  finish_weights(router, spec.weights_masked ? router.key_dtype : router.score_dtype, indices,
                 weights);
}

void route_rows(moefast_engine& engine,
                const Router& router,
                const moefast_rows& logits,
                uint32_t* indices,
                void* weights,
                int weights_dtype) {
  // A logit takes some ten nanoseconds: a piece of work is worth a few dozen microseconds.
  constexpr int64_t kPiece = 4096;
  const int64_t top_k = router.spec.top_k;
  const int64_t step = std::max<int64_t>(1, kPiece / router.spec.num_experts);
  const int64_t pieces = (logits.count + step - 1) / step;
  const int64_t threads = pieces > 1 ? engine.pool.threads() : 1;
  const int64_t workspace = route_workspace(router);
  float* memory = engine.scratch.take<float>(threads * (workspace + padded(top_k)));

  const auto route_piece = [&](int64_t piece, int64_t, int thread) {
    float* mine = memory + thread * (workspace + padded(top_k));
    const int64_t end = std::min(logits.count, (piece + 1) * step);
    for (int64_t i = piece * step; i < end; ++i) {
      const auto* row =
          static_cast<const uint8_t*>(logits.data) + i * logits.stride * size_of(logits.dtype);
      route_row(router, row, mine, indices + i * top_k, mine + workspace);
      narrow(weights_dtype, mine + workspace, top_k,
             static_cast<uint8_t*>(weights) + i * top_k * size_of(weights_dtype));
    }
  };
  if (pieces > 1) {
    engine.pool.run(pieces, route_piece);
  } else if (pieces == 1) {
    route_piece(0, -1, 0);
  }
}

}  // namespace moefast

extern "C" int moefast_route(moefast_engine* engine,
                             const moefast_rows* logits,
                             const moefast_router* router,
                             const moefast_vector* selection_bias,
                             const moefast_vector* expert_scale,
                             uint32_t* indices,
                             void* weights,
                             int32_t weights_dtype) {
  using namespace moefast;
  return run_on(engine, "route", [&](moefast_engine& on) {
    check_pointer("logits", logits);
    check_pointer("router", router);
    check_rows("logits", *logits);
    check_dtype("weights", weights_dtype);
    check_router(*router);
    if (logits->dims != router->num_experts) {
      refuse("logits.dims must equal num_experts=%" PRId64 ", got %" PRId64 ".",
             router->num_experts, logits->dims);
    }
    if (logits->count > 0) {
      check_pointer("indices", indices);
      check_pointer("weights", weights);
    }
    const Router ready = router_of(*router, logits->dtype, selection_bias, expert_scale, on);
    route_rows(on, ready, *logits, indices, weights, weights_dtype);
  });
}
