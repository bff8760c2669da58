// Rotary positions as an MLX primitive.
#ifndef MOEFAST_MLX_ROPE_H
#define MOEFAST_MLX_ROPE_H

#include <optional>
#include <variant>

#include "mlx/mlx.h"

namespace moefast::binding {

// What mx.fast.rope computes, rounded once: x [batch, heads, length, dims], of which the first
// `rotated` turn; offset: of all, or an integer array, () or [batch]; freqs [rotated / 2] in
// float32 instead of a base. Throws std::invalid_argument.
mlx::core::array rope(const mlx::core::array& x,
                      int rotated,
                      bool traditional,
                      std::optional<float> base,
                      float scale,
                      const std::variant<int, mlx::core::array>& offset,
                      const std::optional<mlx::core::array>& freqs);

}  // namespace moefast::binding

#endif
