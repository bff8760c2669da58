"""Reference norms: MLX's own, of arrays and of residual sums."""

from __future__ import annotations

import mlx.core as mx


def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
    """``[..., dims]`` -> the same shape."""
    return mx.fast.rms_norm(x, weight, eps)


def layer_norm(x: mx.array, weight: mx.array | None, bias: mx.array | None, eps: float) -> mx.array:
    """``[..., dims]`` -> the same shape."""
    return mx.fast.layer_norm(x, weight, bias, eps)


def add_rms_norm(
    x: mx.array, branch: mx.array, weight: mx.array | None, eps: float, multiplier: float
) -> tuple[mx.array, mx.array]:
    """``[..., dims]``, twice -> the sum and its norm, of that shape."""
    h = _sum(x, branch, multiplier)
    return h, rms_norm(h, weight, eps)


def add_layer_norm(
    x: mx.array,
    branch: mx.array,
    weight: mx.array | None,
    bias: mx.array | None,
    eps: float,
    multiplier: float,
) -> tuple[mx.array, mx.array]:
    """``[..., dims]``, twice -> the sum and its norm, of that shape."""
    h = _sum(x, branch, multiplier)
    return h, layer_norm(h, weight, bias, eps)


def _sum(x: mx.array, branch: mx.array, multiplier: float) -> mx.array:
    return x + (branch if multiplier == 1.0 else branch * multiplier)
