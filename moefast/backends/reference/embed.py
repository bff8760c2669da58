"""Reference lookups: MLX's own gathers and dequantization."""

from __future__ import annotations

import mlx.core as mx

from ...weights import Projection


def embed(indices: mx.array, projection: Projection) -> mx.array:
    """``[...]`` -> ``[..., dims]``."""
    p = projection
    assert p.quant is not None
    assert p.scales is not None
    dtype = mx.bfloat16 if p.layout.dtype == mx.uint8 else p.layout.dtype
    shape = (*indices.shape, p.layout.in_dims)
    if not indices.size:  # MLX takes neither no rows at all nor a vector
        return mx.zeros(shape, dtype)
    rows = indices.flatten()
    y = mx.dequantize(
        p.weight[rows],
        p.scales[rows],
        None if p.biases is None else p.biases[rows],
        global_scale=p.global_scale,
        # With a global scale MLX's CPU multiplies in float32, and leaves it at that.
        dtype=dtype if p.global_scale is None else mx.float32,
        **p.quant.mlx_arguments(),
    )
    return y.reshape(shape).astype(dtype)
