"""Reference norms: MLX's own."""

from __future__ import annotations

import mlx.core as mx


def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
    """``[..., dims]`` -> the same shape."""
    return mx.fast.rms_norm(x, weight, eps)


def layer_norm(x: mx.array, weight: mx.array | None, bias: mx.array | None, eps: float) -> mx.array:
    """``[..., dims]`` -> the same shape."""
    return mx.fast.layer_norm(x, weight, bias, eps)
