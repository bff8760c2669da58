// The logarithm of sums of exponentials as an MLX primitive.
#ifndef MOEFAST_MLX_LOGSUMEXP_H
#define MOEFAST_MLX_LOGSUMEXP_H

#include "mlx/mlx.h"

namespace moefast::binding {

// What mx.logsumexp(x, axis=-1, keepdims=True) computes, rounded once: x [..., dims] -> [..., 1].
// Throws std::invalid_argument.
mlx::core::array logsumexp(const mlx::core::array& x);

}  // namespace moefast::binding

#endif
