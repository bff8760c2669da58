// The activations of moefast.Activation in float32, and y += a x.
//
// exp and tanh are polynomials within 2 ulp, without branches. The templates take a number or a
// vector of them. Comparisons are written so that NaN fails them and passes through.
#ifndef MOEFAST_CPU_GENERIC_ELEMENTWISE_H
#define MOEFAST_CPU_GENERIC_ELEMENTWISE_H

#include "../types.h"
#include "vector.h"

namespace moefast {
namespace {

template <class F>
inline F at_most(F x, float limit) {
  return x > splat<F>(limit) ? splat<F>(limit) : x;
}

template <class F>
inline F at_least(F x, float limit) {
  return x < splat<F>(limit) ? splat<F>(limit) : x;
}

template <class F>
inline F clip(F x, float limit) {
  return at_least(at_most(x, limit), -limit);
}

// x = n ln 2 + r with |r| <= ln 2 / 2, n whole.
template <class F>
struct Reduced {
  F r;
  decltype(as_ints(F{})) n;
};

template <class F>
inline Reduced<F> reduce(F x) {
  const float whole = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest whole number
  const F shifted = x * 1.44269504f + whole;
  const F n = shifted - whole;
  // ln 2 in two parts, the first with few bits: n times it is exact.
  const F r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  return {r, as_ints(shifted) - static_cast<int32_t>(bits_of(whole))};
}

// exp(r) - 1 for |r| <= ln 2 / 2.
template <class F>
inline F exp_fraction(F r) {
  F p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * (r * r) + r;
}

template <class I>
inline auto power_of_two(I n) {  // -126 <= n <= 127
  return as_floats((n + 127) << 23);
}

template <class F>
inline F exp(F x) {
  const Reduced<F> part = reduce(at_least(at_most(x, 89.0f), -104.0f));  // inf and 0 beyond
  // In two steps: 2^n itself may be out of range.
  const auto half = part.n >> 1;
  return (exp_fraction(part.r) + 1.0f) * power_of_two(half) * power_of_two(part.n - half);
}

template <class F>
inline F tanh(F x) {
  const auto sign = as_ints(x) & static_cast<int32_t>(0x80000000);
  const F magnitude = at_most(as_floats(as_ints(x) ^ sign), 9.5f);  // 1 from 9.02 on
  // (e^2x - 1) / (e^2x - 1 + 2), where e^2x - 1 keeps its relative accuracy near 0.
  const Reduced<F> part = reduce(2.0f * magnitude);
  const F scale = power_of_two(part.n);
  const F less_one = exp_fraction(part.r) * scale + (scale - 1.0f);
  return as_floats(as_ints(less_one / (less_one + 2.0f)) | sign);
}

template <class F>
inline F sigmoid(F x) {
  return 1.0f / (1.0f + exp(-x));
}

template <class F>
inline F silu(F x) {
  return x / (1.0f + exp(-x));
}

// 0.5 x (1 + tanh z) is x sigmoid(2 z), which does not cancel.
template <class F>
inline F gelu_tanh(F x) {
  const F z = 0.7978845608f * (x + 0.044715f * (x * x * x));
  return x / (1.0f + exp(-2.0f * z));
}

// up[i] = function(gate[i], up[i]), a vector at a time; what is left goes through a vector, too.
template <class Function>
inline void each(const float* gate, float* up, int64_t count, Function function) {
  int64_t i = 0;
  for (; i + kFloats <= count; i += kFloats) {
    store_floats(up + i, function(load_floats(gate + i), load_floats(up + i)));
  }
  if (i < count) {
    const size_t bytes = static_cast<size_t>(count - i) * 4;
    float last_gate[kFloats] = {}, last_up[kFloats] = {};
    __builtin_memcpy(last_gate, gate + i, bytes);
    __builtin_memcpy(last_up, up + i, bytes);
    store_floats(last_up, function(load_floats(last_gate), load_floats(last_up)));
    __builtin_memcpy(up + i, last_up, bytes);
  }
}

// up[i] = activation(gate[i], up[i]); gate is NULL where the activation has none.
inline void activate(const moefast_activation& activation,
                     const float* gate,
                     float* up,
                     int64_t count) {
  const float alpha = activation.alpha;
  const float limit = activation.limit;
  const float beta = activation.beta;
  const float linear = activation.linear_beta;
  switch (activation.kind) {
    case MOEFAST_SWIGLU:
      return each(gate, up, count, [](Floats g, Floats u) { return silu(g) * u; });
    case MOEFAST_SWIGLU_OAI:
      return each(gate, up, count, [=](Floats g, Floats u) {
        g = at_most(g, limit);
        return (clip(u, limit) + 1.0f) * (g / (1.0f + exp(-(alpha * g))));
      });
    case MOEFAST_SWIGLU_CLIPPED:
      return each(gate, up, count,
                  [=](Floats g, Floats u) { return at_most(silu(g), limit) * clip(u, limit); });
    case MOEFAST_SWIGLU_CLAMPED:
      return each(gate, up, count,
                  [=](Floats g, Floats u) { return silu(at_most(g, limit)) * clip(u, limit); });
    case MOEFAST_GEGLU_TANH:
      return each(gate, up, count, [](Floats g, Floats u) { return gelu_tanh(g) * u; });
    case MOEFAST_SITU:
      if (linear == linear) {
        return each(gate, up, count, [=](Floats g, Floats u) {
          return beta * tanh(g / beta) * sigmoid(g) * (linear * tanh(u / linear));
        });
      }
      return each(gate, up, count,
                  [=](Floats g, Floats u) { return beta * tanh(g / beta) * sigmoid(g) * u; });
    case MOEFAST_GELU_TANH:
      return each(up, up, count, [](Floats, Floats u) { return gelu_tanh(u); });
    case MOEFAST_RELU2:
      return each(up, up, count, [](Floats, Floats u) {
        u = at_least(u, 0.0f);
        return u * u;
      });
  }
}

// y[i] += a * x[i]
inline void add_scaled(float a, const float* x, int64_t count, float* y) {
  each(x, y, count, [=](Floats of_x, Floats of_y) { return of_y + a * of_x; });
}

}  // namespace
}  // namespace moefast

#endif
