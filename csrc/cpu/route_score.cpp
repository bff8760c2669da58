#include "route_score.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "generic/convert.h"
#include "generic/elementwise.h"

namespace moefast {
namespace {

template <int kDtype>
float rounded(float x) {
  if constexpr (kDtype == MOEFAST_FLOAT16) {
    return widen_float16(narrow_float16(x));
  } else if constexpr (kDtype == MOEFAST_BFLOAT16) {
    return widen_bfloat16(narrow_bfloat16(x));
  } else {
    return x;
  }
}

float rounded(int dtype, float x) {
  round_to(dtype, &x, 1);
  return x;
}

// Calls function.operator()<dtype>(): steps are compiled for each dtype, so that their loops
// vectorise.
template <class Function>
void with_dtype(int dtype, Function&& function) {
  if (dtype == MOEFAST_FLOAT16) {
    function.template operator()<MOEFAST_FLOAT16>();
  } else if (dtype == MOEFAST_BFLOAT16) {
    function.template operator()<MOEFAST_BFLOAT16>();
  } else {
    function.template operator()<MOEFAST_FLOAT32>();
  }
}

// exp with MLX's ends: 0 below 2^-126.5, infinity above exp(88). Scores beyond tie there, and the
// index decides; here they must tie too.
float exp_of_negative(float x) {
  return x * 1.442695f < -126.5f ? 0.0f : exp(x);
}

float exp_of_positive(float x) {
  return x > 88.0f ? std::numeric_limits<float>::infinity() : exp(x);
}

// log(1 + e) for 0 <= e <= 1, as 2 artanh(e / (2 + e)): the series to the 17th power, within 2 ulp.
float log1p(float e) {
  const float s = e / (2.0f + e);
  const float z = s * s;
  float p = 1.0f / 17;
  p = p * z + 1.0f / 15;
  p = p * z + 1.0f / 13;
  p = p * z + 1.0f / 11;
  p = p * z + 1.0f / 9;
  p = p * z + 1.0f / 7;
  p = p * z + 1.0f / 5;
  p = p * z + 1.0f / 3;
  return 2.0f * (s + s * (p * z));
}

// In lanes, so that the loops vectorise.
constexpr int kLanes = 8;

float largest(const float* x, int64_t count) {
  float lanes[kLanes];
  std::fill_n(lanes, kLanes, -std::numeric_limits<float>::infinity());
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int k = 0; k < kLanes; ++k) {
      lanes[k] = at_least(lanes[k], x[i + k]);
    }
  }
  for (; i < count; ++i) {
    lanes[0] = at_least(lanes[0], x[i]);
  }
  return *std::max_element(lanes, lanes + kLanes);
}

float sum(const float* x, int64_t count) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int k = 0; k < kLanes; ++k) {
      lanes[k] += x[i + k];
    }
  }
  for (; i < count; ++i) {
    lanes[0] += x[i];
  }
  return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) +
         ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
}

// MLX's form: exp(|x|) is rounded, the rest is float32.
template <int kDtype>
void sigmoid(float* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float low = 1.0f / (1.0f + rounded<kDtype>(exp_of_positive(std::fabs(x[i]))));
    x[i] = rounded<kDtype>(x[i] < 0.0f ? low : 1.0f - low);
  }
}

// sqrt(log(exp(x) + exp(0))), the logarithm as max(x, 0) + log1p(exp(-|x|)).
template <int kDtype>
void sqrtsoftplus(float* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float power = rounded<kDtype>(exp_of_negative(-std::fabs(x[i])));
    const float larger = x[i] > 0.0f ? x[i] : 0.0f;
    const float softplus = rounded<kDtype>(larger + rounded<kDtype>(log1p(power)));
    x[i] = rounded<kDtype>(std::sqrt(softplus));
  }
}

// A NaN, or an infinity less itself, makes all of them NaN.
template <int kDtype>
void precise_softmax(float* x, int64_t count) {
  const float most = largest(x, count);
  for (int64_t i = 0; i < count; ++i) {
    x[i] = exp_of_negative(x[i] - most);
  }
  const float factor = 1.0f / sum(x, count);
  for (int64_t i = 0; i < count; ++i) {
    x[i] = rounded<kDtype>(x[i] * factor);
  }
}

// The sum too is rounded at every step.
template <int kDtype>
void plain_softmax(float* x, int64_t count) {
  const float most = largest(x, count);
  float total = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    x[i] = rounded<kDtype>(exp_of_negative(rounded<kDtype>(x[i] - most)));
    total = rounded<kDtype>(total + x[i]);
  }
  const float factor = rounded<kDtype>(1.0f / total);
  for (int64_t i = 0; i < count; ++i) {
    x[i] = rounded<kDtype>(x[i] * factor);
  }
}

template <int kDtype>
void score_as(const moefast_router& spec, float* x, int64_t count) {
  if (spec.score == MOEFAST_SIGMOID) {
    sigmoid<kDtype>(x, count);
  } else if (spec.score == MOEFAST_SQRTSOFTPLUS) {
    sqrtsoftplus<kDtype>(x, count);
  } else if (spec.precise || kDtype == MOEFAST_FLOAT32) {
    precise_softmax<kDtype>(x, count);
  } else {
    plain_softmax<kDtype>(x, count);
  }
}

// x[i] = x[i] * factor, a number that takes the array's dtype first.
void scale_by(int dtype, float factor, float* x, int64_t count) {
  factor = rounded(dtype, factor);
  for (int64_t i = 0; i < count; ++i) {
    x[i] *= factor;
  }
  round_to(dtype, x, count);
}

void renormalize(const moefast_router& spec, int dtype, float* weights) {
  float total = rounded(dtype, std::accumulate(weights, weights + spec.top_k, 0.0f));
  if (spec.renormalize_eps != 0.0f) {
    const float eps = rounded(dtype, spec.renormalize_eps);
    if (spec.eps_max) {
      total = total < eps ? eps : total;
    } else {
      total = rounded(dtype, total + eps);
    }
  }
  for (int64_t i = 0; i < spec.top_k; ++i) {
    weights[i] /= total;
  }
  round_to(dtype, weights, spec.top_k);
}

}  // namespace

void round_to(int dtype, float* x, int64_t count) {
  if (dtype == MOEFAST_FLOAT32) {
    return;
  }
  with_dtype(dtype, [&]<int kDtype>() {
    for (int64_t i = 0; i < count; ++i) {
      x[i] = rounded<kDtype>(x[i]);
    }
  });
}

void transform_logits(const moefast_router& spec, int dtype, float* x, int64_t count) {
  if (spec.softcap > 0.0f) {
    const float cap = rounded(dtype, spec.softcap);
    with_dtype(dtype, [&]<int kDtype>() {
      for (int64_t i = 0; i < count; ++i) {
        x[i] = rounded<kDtype>(rounded<kDtype>(tanh(rounded<kDtype>(x[i] / cap))) * cap);
      }
    });
  }
  if (spec.temperature != 1.0f) {
    const float temperature = rounded(dtype, spec.temperature);
    with_dtype(dtype, [&]<int kDtype>() {
      for (int64_t i = 0; i < count; ++i) {
        x[i] = rounded<kDtype>(x[i] / temperature);
      }
    });
  }
}

void score_logits(const moefast_router& spec, int dtype, float* x, int64_t count) {
  with_dtype(dtype, [&]<int kDtype>() { score_as<kDtype>(spec, x, count); });
}

void add_selection_bias(const Router& router, const float* scores, float* keys) {
  const int64_t count = router.spec.num_experts;
  const float* bias = router.selection_bias;
  std::copy_n(scores, count, keys);
  if (bias == nullptr) {
    return;
  }
  round_to(router.cast_dtype, keys, count);
  for (int64_t i = 0; i < count; ++i) {
    keys[i] += bias[i];
  }
  round_to(router.key_dtype, keys, count);
}

void finish_weights(const Router& router, int dtype, const uint32_t* indices, float* weights) {
  const moefast_router& spec = router.spec;
  const int64_t count = spec.top_k;
  if (spec.renormalize) {
    renormalize(spec, dtype, weights);
  }
  if (router.expert_scale != nullptr) {
    for (int64_t i = 0; i < count; ++i) {
      weights[i] *= router.expert_scale[indices[i]];
    }
    round_to(router.scaled_dtype, weights, count);
  }
  if (spec.scale != 1.0f && !spec.scale_output) {
    scale_by(router.scaled_dtype, spec.scale, weights, count);
  }
  round_to(router.weights_dtype, weights, count);
}

}  // namespace moefast
