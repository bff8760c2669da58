// RMSNorm and LayerNorm as MLX primitives.
#ifndef MOEFAST_MLX_NORM_H
#define MOEFAST_MLX_NORM_H

#include <optional>
#include <tuple>

#include "mlx/mlx.h"

namespace moefast::binding {

// What mx.fast.rms_norm and mx.fast.layer_norm compute, rounded once: x [..., dims], weight and
// bias [dims] -> like x, of the dtype that all of them promote to. Throws std::invalid_argument.
mlx::core::array rms_norm(const mlx::core::array& x,
                          const std::optional<mlx::core::array>& weight,
                          float eps);
mlx::core::array layer_norm(const mlx::core::array& x,
                            const std::optional<mlx::core::array>& weight,
                            const std::optional<mlx::core::array>& bias,
                            float eps);

using SumAndNorm = std::tuple<mlx::core::array, mlx::core::array>;

// x + multiplier * branch, and the norm of that: the bits of the operations one by one. branch like
// x, in a dtype of its own. Throws std::invalid_argument.
SumAndNorm add_rms_norm(const mlx::core::array& x,
                        const mlx::core::array& branch,
                        const std::optional<mlx::core::array>& weight,
                        float eps,
                        float multiplier);
SumAndNorm add_layer_norm(const mlx::core::array& x,
                          const mlx::core::array& branch,
                          const std::optional<mlx::core::array>& weight,
                          const std::optional<mlx::core::array>& bias,
                          float eps,
                          float multiplier);

}  // namespace moefast::binding

#endif
