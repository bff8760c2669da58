"""``quantized_matmul``: the dense sibling of the expert operations; ``quantized_matmuls``: several."""

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


def quantized_matmuls(x: mx.array, *weights: Projection, backend: str = "auto") -> list[mx.array]:
    """:func:`quantized_matmul` of one ``x`` with each of several weights, such as those of queries, keys and
    values: a backend may read ``x`` once, and have its threads meet once.

    Args:
        x: ``[..., in]`` in float32, float16 or bfloat16.
        weights: one or more dense projections ``[out_i, in]``.
        backend: a name of :func:`moefast.backends`, or ``"auto"``.

    Returns:
        ``[..., out_i]`` for each weight.

    Raises:
        ValueError: a shape or dtype breaks a rule, or the named backend cannot run this.
    """
    ys: list[mx.array] = choose_several(x, weights, backend).run(x, *weights)
    return ys


def choose_several(x: mx.array, weights: tuple[Projection, ...], backend: str = "auto") -> Choice:
    """What :func:`quantized_matmuls` runs; checks its arguments."""
    check_type("quantized_matmuls", "x", x, mx.array)
    if not weights:
        refuse("quantized_matmuls", "there must be at least one weight", weights)
    for weight in weights:
        check_type("quantized_matmuls", "weight", weight, Projection)
    layouts = tuple(weight.layout for weight in weights)
    return registry.choose(_problem("quantized_matmuls", x.shape, x.dtype, layouts, device_name()), backend)


def choose(x: mx.array, weight: Projection, backend: str = "auto") -> Choice:
    """What :func:`quantized_matmul` runs; checks its arguments."""
    check_type("quantized_matmul", "x", x, mx.array)
    check_type("quantized_matmul", "weight", weight, Projection)
    problem = _problem("quantized_matmul", x.shape, x.dtype, (weight.layout,), device_name())
    return registry.choose(problem, backend)


@lru_cache(maxsize=4096)
def _problem(op: str, shape: Shape, dtype: mx.Dtype, layouts: tuple[Layout, ...], device: str) -> Problem:
    """details: a layout for each weight."""
    for layout in layouts:
        check_rows(op, "x", shape, dtype, layout.in_dims, "in")
        if layout.num_experts:
            refuse(op, "weight must be dense [out, in]", layout)
    return Problem(op, device, dtype, phase_of(shape), layouts)
