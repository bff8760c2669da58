"""Reference rotary positions: MLX's own."""

from __future__ import annotations

import mlx.core as mx


def rope(
    x: mx.array,
    dims: int,
    traditional: bool,
    base: float | None,
    scale: float,
    offset: int | mx.array,
    freqs: mx.array | None,
) -> mx.array:
    """``[batch, heads, length, head_dim]`` -> the same shape."""
    return mx.fast.rope(x, dims, traditional=traditional, base=base, scale=scale, offset=offset, freqs=freqs)
