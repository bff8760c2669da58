"""Reference attention: MLX's own, as mlx-lm calls it."""

from __future__ import annotations

import mlx.core as mx


def attention(queries: mx.array, keys: mx.array, values: mx.array, scale: float, causal: bool) -> mx.array:
    """``[batch, heads, length, dims]`` -> ``[batch, length, heads * value_dims]``."""
    y = mx.fast.scaled_dot_product_attention(
        queries, keys, values, scale=scale, mask="causal" if causal else None
    )
    return y.swapaxes(1, 2).flatten(-2)
