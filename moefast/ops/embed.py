"""``embed``: rows of a quantized weight, so that a backend may look them up.

No MoE operation; but MLX's CPU gathers packed values, scales and biases apart, and puts the dequantization
together out of many small operations: for one token it takes as long as a layer of fast experts.
"""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx

from ..backends import registry
from ..errors import refuse
from ..registry import Choice, Problem, device_name, phase_of
from ..weights import Layout, Projection, Shape
from ._checks import check_type


def embed(indices: mx.array, weight: Projection, *, backend: str = "auto") -> mx.array:
    """``weight[indices]``, dequantized.

    Args:
        indices: integers ``[...]`` in ``-rows..rows - 1``; negative ones count from the end. With others the
            result is undefined, as MLX's is; on the native backend evaluating it raises ValueError.
        weight: a quantized :class:`moefast.Projection` ``[rows, dims]`` without stacking axis or bias.
        backend: a name of :func:`moefast.backends`, or ``"auto"``.

    Returns:
        ``[..., dims]`` in the dtype of affine scales, else in bfloat16.

    Raises:
        ValueError: a shape or dtype breaks a rule, or the named backend cannot run this.
    """
    y: mx.array = choose(indices, weight, backend).run(indices, weight)
    return y


def choose(indices: mx.array, weight: Projection, backend: str = "auto") -> Choice:
    """What :func:`embed` runs; checks its arguments."""
    check_type("embed", "indices", indices, mx.array)
    check_type("embed", "weight", weight, Projection)
    return registry.choose(_problem(indices.shape, indices.dtype, weight.layout, device_name()), backend)


@lru_cache(maxsize=4096)
def _problem(shape: Shape, dtype: mx.Dtype, layout: Layout, device: str) -> Problem:
    """details: layout."""
    if not mx.issubdtype(dtype, mx.integer):
        refuse("embed", "indices must be integers", dtype)
    if layout.quant is None or layout.num_experts or layout.bias is not None:
        refuse("embed", "weight must be quantized, dense [rows, dims] and without bias", layout)
    out = mx.bfloat16 if layout.dtype == mx.uint8 else layout.dtype
    return Problem("embed", device, out, phase_of((*shape, 1)), (layout,))
