// The activations of the experts, as MLX's compiled kernels compute them on a GPU: every
// intermediate result is rounded to the arrays' type T, except where MLX's own functions compute
// half in float.
//
// activate(functor, gate, up), or activate(functor, up) without a gate. The functors have the names
// of moefast.Activation's; their numbers are members, which a body gives as literals:
// SwigluOai{1.702f, 7.0f}. The reference is moefast/backends/reference/activations.py under
// mx.compile; equal to the bit where exp, tanh and pow are the same functions.
#ifndef MOEFAST_ACTIVATION_H
#define MOEFAST_ACTIVATION_H

#include "common.h"

namespace moefast {

// What MLX's functions of T compute in: a function of half returns float, one of bfloat bfloat.
template <typename T>
struct Intermediate {
  using type = T;
};

template <>
struct Intermediate<half> {
  using type = float;
};

// NaN wins only on the left: MLX's Minimum and Maximum.
template <typename T>
T minimum(T x, T y) {
  return isnan(float(x)) || x < y ? x : y;
}

template <typename T>
T maximum(T x, T y) {
  return isnan(float(x)) || x > y ? x : y;
}

template <typename T>
T clip(T x, T limit) {
  return minimum(maximum(x, T(-limit)), limit);
}

template <typename T>
T sigmoid(T x) {
  using U = typename Intermediate<T>::type;
  U e = U(precise::exp(abs(float(x))));
  U y = U(U(1) / U(U(1) + e));
  return T(x < T(0) ? y : U(U(1) - y));
}

template <typename T>
T tanh_of(T x) {
  return T(precise::tanh(float(x)));
}

// MLX has no cube: x ** 3 is a power. Compiled at run time, as MLX compiles the activations, a
// `pow` of float is the fast one; so is theirs.
template <typename T>
T cube(T x) {
  return T(pow(float(x), 3.0f));
}

template <>
inline half cube(half x) {
  return pow(x, half(3));
}

template <typename T>
T silu(T x) {
  return T(x * sigmoid(x));
}

// Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016).
template <typename T>
T gelu_tanh(T x) {
  T halved = T(T(0.5f) * x);
  T inner = T(x + T(T(0.044715f) * cube(x)));
  T bounded = tanh_of(T(T(0.7978845608f) * inner));  // sqrt(2 / pi)
  return T(halved * T(T(1) + bounded));
}

struct Swiglu {
  template <typename T>
  T operator()(T gate, T up) const thread {
    return T(silu(gate) * up);
  }
};

// The linear part is clipped on both sides, the gate from above only.
struct SwigluOai {
  float alpha;
  float limit;

  template <typename T>
  T operator()(T gate, T up) const thread {
    T g = minimum(gate, T(limit));
    T linear = T(clip(up, T(limit)) + T(1));
    return T(linear * T(g * sigmoid(T(T(alpha) * g))));
  }
};

struct SwigluClipped {
  float limit;

  template <typename T>
  T operator()(T gate, T up) const thread {
    return T(minimum(silu(gate), T(limit)) * clip(up, T(limit)));
  }
};

// In float, rounded once.
struct SwigluClamped {
  float limit;

  template <typename T>
  T operator()(T gate, T up) const thread {
    return T(silu(minimum(float(gate), limit)) * clip(float(up), limit));
  }
};

struct GegluTanh {
  template <typename T>
  T operator()(T gate, T up) const thread {
    return T(gelu_tanh(gate) * up);
  }
};

// In float, rounded once.
struct Situ {
  float beta;

  template <typename T>
  T operator()(T gate, T up) const thread {
    return T(bounded(float(gate)) * float(up));
  }

  float bounded(float gate) const thread {
    float tail = beta * precise::tanh(gate / beta);
    return tail * sigmoid(gate);
  }
};

// And the linear part bounded as well.
struct SituBounded {
  float beta;
  float linear_beta;

  template <typename T>
  T operator()(T gate, T up) const thread {
    float linear = linear_beta * precise::tanh(float(up) / linear_beta);
    return T(Situ{beta}.bounded(float(gate)) * linear);
  }
};

struct GeluTanh {
  template <typename T>
  T operator()(T up) const thread {
    return gelu_tanh(up);
  }
};

struct Relu2 {
  template <typename T>
  T operator()(T up) const thread {
    T kept = maximum(up, T(0));
    return T(kept * kept);
  }
};

template <typename Activation, typename T>
T activate(Activation activation, T gate, T up) {
  return activation(gate, up);
}

template <typename Activation, typename T>
T activate(Activation activation, T up) {
  return activation(up);
}

}  // namespace moefast

#endif
