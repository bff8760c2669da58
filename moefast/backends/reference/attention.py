"""Reference attention: MLX's own, as mlx-lm calls it."""

from __future__ import annotations

from functools import partial

import mlx.core as mx

from .rope import rope


def attention(queries: mx.array, keys: mx.array, values: mx.array, scale: float, causal: bool) -> mx.array:
    """``[batch, heads, length, dims]`` -> ``[batch, length, heads * value_dims]``."""
    y = mx.fast.scaled_dot_product_attention(
        queries, keys, values, scale=scale, mask="causal" if causal else None
    )
    return y.swapaxes(1, 2).flatten(-2)


def cached_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache_keys: mx.array,
    cache_values: mx.array,
    offset: int,
    dims: int,
    traditional: bool,
    base: float | None,
    position_scale: float,
    freqs: mx.array | None,
    scale: float,
    causal: bool,
) -> tuple[mx.array, mx.array, mx.array]:
    """``[batch, length, heads * dims]`` -> ``[batch, length, heads * value_dims]``, and the cache."""

    def split(x: mx.array, size: int) -> mx.array:
        return x.reshape(*x.shape[:2], -1, size).swapaxes(1, 2)

    def put(cache: mx.array, rows: mx.array) -> mx.array:
        return mx.slice_update(cache, rows, mx.array([offset]), axes=(2,))

    turn = partial(
        rope, dims=dims, traditional=traditional, base=base, scale=position_scale, offset=offset, freqs=freqs
    )
    head_dim, end = cache_keys.shape[3], offset + queries.shape[1]
    cache_keys = put(cache_keys, turn(split(keys, head_dim)))
    cache_values = put(cache_values, split(values, cache_values.shape[3]))
    turned = turn(split(queries, head_dim))
    y = attention(turned, cache_keys[:, :, :end], cache_values[:, :, :end], scale, causal)
    return y, cache_keys, cache_values
