// Rotary positions as an MLX primitive.
#ifndef MOEFAST_MLX_ROPE_H
#define MOEFAST_MLX_ROPE_H

#include <optional>
#include <variant>
#include <vector>

#include "mlx/mlx.h"
#include "moefast.h"

namespace moefast::binding {

// What mx.fast.rope computes, rounded once: x [batch, heads, length, head_dim], of which the first
// `dims` turn; offset: of all, or an integer array, () or [batch]; freqs [dims / 2] instead of a
// base. Throws std::invalid_argument.
mlx::core::array rope(const mlx::core::array& x,
                      int dims,
                      bool traditional,
                      std::optional<float> base,
                      float scale,
                      const std::variant<int, mlx::core::array>& offset,
                      const std::optional<mlx::core::array>& freqs);

// How far values turn, but for the freqs that stand for a missing base.
struct Rotation {
  int dims;
  bool traditional;
  std::optional<float> base;
  float scale;

  bool operator==(const Rotation&) const = default;
};

// The freqs in float32, or none where there is a base. Throws std::invalid_argument.
std::optional<mlx::core::array> checked_freqs(const char* operation,
                                              const Rotation& rotation,
                                              int head_dim,
                                              const std::optional<mlx::core::array>& freqs);

mlx::core::array rotated_by_mlx(const mlx::core::array& x,
                                const Rotation& rotation,
                                const std::variant<int, mlx::core::array>& offset,
                                const std::optional<mlx::core::array>& freqs);

// On a stream's thread; offsets [batch].
void rotate(const moefast_heads& x,
            const Rotation& rotation,
            const float* freqs,
            const std::vector<int64_t>& offsets,
            const moefast_heads& out);

}  // namespace moefast::binding

#endif
