// Scaled dot-product attention as an MLX primitive.
#ifndef MOEFAST_MLX_ATTENTION_H
#define MOEFAST_MLX_ATTENTION_H

#include "mlx/mlx.h"

namespace moefast::binding {

// queries [batch, heads, length, dims], keys and values [batch, kv_heads, keys, dims] of one dtype
// -> [batch, length, heads * dims of values]. `causal`: query i sees keys up to i + keys - length.
// Derivatives are those of mx.fast.scaled_dot_product_attention. Throws std::invalid_argument.
mlx::core::array attention(const mlx::core::array& queries,
                           const mlx::core::array& keys,
                           const mlx::core::array& values,
                           float scale,
                           bool causal);

}  // namespace moefast::binding

#endif
