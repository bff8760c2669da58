"""``switch_glu`` and ``experts``: the routed feed-forward networks, uncombined and combined."""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx

from ..backends import registry
from ..errors import refuse
from ..registry import Problem, device_name, phase_of
from ..routing import Routing
from ..weights import ExpertLayout, ExpertWeights, Shape, dtype_name, form_of
from ._checks import check_combine_dtype, check_indices, check_rows, check_type, dtype_of


def switch_glu(x: mx.array, weights: ExpertWeights, indices: mx.array, *, backend: str = "auto") -> mx.array:
    """The output of every route, uncombined: what mlx-lm's SwitchGLU (or SwitchMLP) returns.

    Args:
        x: ``[..., hidden]`` in float32, float16 or bfloat16.
        weights: stacks of E experts, quantized or not.
        indices: ``[..., top_k]`` integers in ``0..E-1``, over the leading dimensions of ``x``.
        backend: a name of :func:`moefast.backends`, or ``"auto"``.

    Returns:
        ``[..., top_k, hidden]``: ``down_e(activation(gate_e(x), up_e(x)))`` for each route's expert e.

    Raises:
        ValueError: a shape or dtype breaks a rule, or the named backend cannot run this.
    """
    check_type("switch_glu", "x", x, mx.array)
    check_type("switch_glu", "weights", weights, ExpertWeights)
    check_type("switch_glu", "indices", indices, mx.array)
    problem = _problem(
        "switch_glu", x.shape, x.dtype, weights.layout, form_of(indices), None, None, device_name()
    )
    y: mx.array = registry.choose(problem, backend).run(x, weights, indices)
    return y


def experts(
    x: mx.array,
    weights: ExpertWeights,
    routing: Routing,
    *,
    combine_dtype: mx.Dtype | None = None,
    backend: str = "auto",
) -> mx.array:
    """The weighted sum of each token's experts.

    Args:
        x: ``[..., hidden]`` in float32, float16 or bfloat16.
        weights: stacks of E experts, quantized or not.
        routing: indices and weights ``[..., top_k]``.
        combine_dtype: dtype the weights are cast to before they multiply; by default products and sums
            are taken in the promoted dtype of outputs and weights.
        backend: a name of :func:`moefast.backends`, or ``"auto"``.

    Returns:
        ``[..., hidden]``: ``sum_k weight_k * down_k(activation(gate_k(x), up_k(x)))``.

    Raises:
        ValueError: a shape or dtype breaks a rule, or the named backend cannot run this.
    """
    check_type("experts", "x", x, mx.array)
    check_type("experts", "weights", weights, ExpertWeights)
    check_type("experts", "routing", routing, Routing)
    problem = _problem(
        "experts",
        x.shape,
        x.dtype,
        weights.layout,
        form_of(routing.indices),
        form_of(routing.weights),
        combine_dtype,
        device_name(),
    )
    y: mx.array = registry.choose(problem, backend).run(x, weights, routing, combine_dtype)
    return y


@lru_cache(maxsize=4096)
def _problem(
    op: str,
    shape: Shape,
    dtype: mx.Dtype,
    layout: ExpertLayout,
    indices: tuple[Shape, mx.Dtype],
    route_weights: tuple[Shape, mx.Dtype] | None,
    combine_dtype: mx.Dtype | None,
    device: str,
) -> Problem:
    """details: layout, top_k, dtype of the routing weights or None, combine_dtype or None."""
    check_rows(op, "x", shape, dtype, layout.hidden, "hidden")
    check_indices(op, "indices" if op == "switch_glu" else "routing.indices", indices, shape)
    if route_weights is not None:
        check_rows(op, "routing.weights", *route_weights, indices[0][-1], "top_k")
        if route_weights[0] != indices[0]:
            refuse(op, f"routing.weights must be shaped like routing.indices {indices[0]}", route_weights[0])
    check_combine_dtype(op, combine_dtype)
    details = (layout, indices[0][-1], dtype_of(route_weights), combine_dtype and dtype_name(combine_dtype))
    return Problem(op, device, dtype, phase_of(shape), details)
