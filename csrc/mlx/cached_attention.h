// What an attention layer does between its projections, as one MLX primitive.
#ifndef MOEFAST_MLX_CACHED_ATTENTION_H
#define MOEFAST_MLX_CACHED_ATTENTION_H

#include <optional>
#include <tuple>

#include "mlx/mlx.h"

namespace moefast::binding {

// Rotates queries [batch, length, heads * dims] and keys [batch, length, kv_heads * dims], puts
// keys and values behind the first `offset` rows of the cache, [batch, kv_heads, capacity, dims],
// and attends to all rows up to them. All of one float dtype. `rotated`..`freqs`: see rope(). The
// result: [batch, length, heads * dims of values], and the cache with the new rows in it, in the
// same memory where nobody else holds it. Throws std::invalid_argument.
std::tuple<mlx::core::array, mlx::core::array, mlx::core::array> cached_attention(
    const mlx::core::array& queries,
    const mlx::core::array& keys,
    const mlx::core::array& values,
    const mlx::core::array& cache_keys,
    const mlx::core::array& cache_values,
    int offset,
    int rotated,
    bool traditional,
    std::optional<float> base,
    float position_scale,
    const std::optional<mlx::core::array>& freqs,
    float scale,
    bool causal);

}  // namespace moefast::binding

#endif
