"""MLX's own dense products on the layers that hold the arrays: what a router's costs in Python.

See :class:`moefast.registry.Bound`. MLX checks shapes and dtypes itself; where it finds something wrong, the
call is made in full, which says so in the usual words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from ...registry import Bound, Problem, device_name
from ...weights import Layout
from ..reference.matmul import dense


def bind(problem: Problem) -> Bound:
    """``quantized_matmul`` by the reference. It can be recalled where that is one operation of MLX's: on a
    GPU, and without a global scale."""
    layout: Any = problem.details[0]
    if problem.device != "gpu" or problem.phase == "empty" or layout.global_scale:
        return Bound(dense)
    return Bound(dense, _of_layer(problem.dtype, layout))


def _of_layer(dtype: mx.Dtype, layout: Layout) -> Callable[..., mx.array | None]:
    product, dims = _product(layout), layout.in_dims

    def call(x: mx.array, layer: Any, kind: type, low: int, high: int) -> mx.array | None:
        if (
            type(layer) is not kind
            or not low * dims <= x.size <= high * dims
            or x.dtype != dtype
            or device_name() != "gpu"
        ):
            return None
        try:
            return product(x, layer)
        except (KeyError, ValueError):
            return None

    return call


def _product(layout: Layout) -> Callable[[mx.array, Any], mx.array]:
    if layout.quant is None:

        def plain(x: mx.array, layer: Any) -> mx.array:
            bias = layer.get("bias")
            weight = layer["weight"].T
            return x @ weight if bias is None else mx.addmm(bias, x, weight)

        return plain
    bits, group_size, mode = layout.quant.bits, layout.quant.group_size, layout.quant.mode

    def packed(x: mx.array, layer: Any) -> mx.array:
        y = mx.quantized_matmul(
            x, layer["weight"], layer["scales"], layer.get("biases"), True, group_size, bits, mode
        )
        bias = layer.get("bias")
        return y if bias is None else y + bias

    return packed
