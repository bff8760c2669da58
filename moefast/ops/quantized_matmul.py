"""``quantized_matmul``: the dense sibling of the expert operations."""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx

from ..backends import registry
from ..errors import refuse
from ..registry import Choice, Problem, device_name, phase_of
from ..weights import Layout, Projection, Shape
from ._checks import check_rows, check_type


def quantized_matmul(x: mx.array, weight: Projection, *, backend: str = "auto") -> mx.array:
    """``x @ weight.T + bias`` for a quantized (or plain) dense weight.

    Shared experts, attention projections and the head go through here: on a CPU they take as long as the
    experts.

    Args:
        x: ``[..., in]`` in float32, float16 or bfloat16.
        weight: a :class:`moefast.Projection` ``[out, in]`` without stacking axis.
        backend: a name of :func:`moefast.backends`, or ``"auto"``.

    Returns:
        ``[..., out]`` in the promoted dtype of ``x`` and the weight's float arrays.

    Raises:
        ValueError: a shape or dtype breaks a rule, or the named backend cannot run this.
    """
    y: mx.array = choose(x, weight, backend).run(x, weight)
    return y


def choose(x: mx.array, weight: Projection, backend: str = "auto") -> Choice:
    """What :func:`quantized_matmul` runs; checks its arguments."""
    check_type("quantized_matmul", "x", x, mx.array)
    check_type("quantized_matmul", "weight", weight, Projection)
    return registry.choose(_problem(x.shape, x.dtype, weight.layout, device_name()), backend)


@lru_cache(maxsize=4096)
def _problem(shape: Shape, dtype: mx.Dtype, layout: Layout, device: str) -> Problem:
    """details: layout."""
    check_rows("quantized_matmul", "x", shape, dtype, layout.in_dims, "in")
    if layout.num_experts:
        refuse("quantized_matmul", "weight must be dense [out, in]", layout)
    return Problem("quantized_matmul", device, dtype, phase_of(shape), (layout,))
