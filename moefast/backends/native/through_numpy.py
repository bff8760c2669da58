"""The kernels on NumPy views of evaluated arrays: what runs where ``moefast._native`` does not fit this MLX.

Eager: it evaluates its inputs. Derivatives are the reference's, through ``mx.custom_function``; under
``mx.compile`` and ``mx.vmap``, where nothing can be evaluated, it raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from ...env import settings
from ...errors import refuse
from ...registry import Problem
from ...weights import ExpertLayout, Layout, dtype_name
from .. import dtypes
from ..differentiable import differentiable
from ..reference import REFERENCE
from .loading import bindings, threads


@lru_cache(maxsize=1)
def engine() -> Any:
    """The process's engine. (Two threads may make two at once: one is dropped.)"""
    return bindings().kernels.Engine(threads(), settings.isa)


def bind(problem: Problem) -> Callable[..., Any]:
    """The callable for a problem, with the signature of the reference's function."""
    if problem.op == "attention":
        return _attention
    return differentiable(problem, lambda arrays: _eager(problem, arrays))


def _eager(problem: Problem, arrays: tuple[mx.array, ...]) -> list[mx.array]:
    """Evaluate the inputs and run the kernels."""
    _evaluate(problem.op, arrays)
    on, rest = engine(), iter(arrays)
    dtype = dtype_name(problem.dtype)
    details: tuple[Any, ...] = problem.details
    first = _numpy(next(rest))
    if problem.op == "quantized_matmul":
        out = dtypes.product(dtype, details[0])
        return [_mlx(on.matmul(first, _projection(details[0], rest), out_dtype=out), out)]
    if problem.op == "quantized_matmuls":
        out = dtypes.product(dtype, details[0])
        weights = [_projection(layout, rest) for layout in details]
        return [_mlx(on.matmul(first, weight, out_dtype=out), out) for weight in weights]
    if problem.op == "route":
        spec, bias, scale = details
        out = dtypes.route(dtype, spec, bias, scale)
        vectors = {"selection_bias": _optional(bias, rest), "expert_scale": _optional(scale, rest)}
        indices, weights = on.route(first, spec, **vectors, weights_dtype=out)
        return [mx.array(indices), _mlx(weights, out)]
    if problem.op == "moe":
        return [_moe(on, first, dtype, details, rest)]
    indices = np.asarray(next(rest))
    mix = _numpy(next(rest)) if problem.op == "experts" else None
    experts, out = _experts(details[0], rest), dtypes.feed_forward(dtype, details[0])
    if mix is None:
        return [_mlx(on.switch_glu(first, experts, indices, out_dtype=out), out)]
    return [_mlx(on.experts(first, experts, indices, np.ascontiguousarray(mix), out_dtype=out), out)]


def _evaluate(op: str, arrays: tuple[mx.array, ...]) -> None:
    try:
        mx.eval(arrays)
    except (RuntimeError, ValueError) as error:
        if "during function transformations" not in str(error):
            raise
        rule = "backend 'native' must evaluate its inputs where it runs through NumPy (see `moefast doctor`)"
        refuse(op, f"{rule}: compile and vmap with use_backend('reference')", "a traced array")


def _attention(queries: mx.array, keys: mx.array, values: mx.array, scale: float, causal: bool) -> mx.array:
    return _attention_of(scale, causal)(queries, keys, values)


@lru_cache(maxsize=256)
def _attention_of(scale: float, causal: bool) -> Callable[..., mx.array]:
    """The kernel, with the reference's derivatives."""

    @mx.custom_function
    def attention(*arrays: mx.array) -> mx.array:
        _evaluate("attention", arrays)
        heads = [_rows_together(array) for array in arrays]
        return _mlx(engine().attention(*heads, scale=scale, causal=causal), dtype_name(arrays[0].dtype))

    @attention.vjp
    def vjp(primals: Any, cotangent: Any, _: Any) -> Any:
        def again(*arrays: mx.array) -> list[mx.array]:
            return [REFERENCE.kernels["attention"].run(*arrays, scale, causal)]

        return tuple(mx.vjp(again, list(primals), [cotangent])[1])

    kernel: Callable[..., mx.array] = attention  # type: ignore[assignment]  # custom_function's call is typed to return object
    return kernel


def _moe(on: Any, x: Any, dtype: str, details: tuple[Any, ...], rest: Iterator[mx.array]) -> mx.array:
    spec, layout, shared, _, bias, scale, combine_dtype = details
    out = dtypes.moe(dtype, layout, shared)
    y = on.moe(
        x,
        _numpy(next(rest)),
        spec,
        selection_bias=_optional(bias, rest),
        expert_scale=_optional(scale, rest),
        experts=_experts(layout, rest),
        shared=None if shared is None else _experts(shared.layout, rest),
        shared_gate=_projection(shared.output_gate, rest) if shared and shared.output_gate else None,
        combine_dtype=combine_dtype,
        out_dtype=out,
    )
    return _mlx(y, out)


# -- arrays ------------------------------------------------------------------------------------------------


def _numpy(array: mx.array) -> Any:
    """A view of an evaluated array whose rows are contiguous; bfloat16 as uint16."""
    view = np.asarray(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)
    even = view.ndim <= 2 and (view.shape[-1] == 1 or view.strides[-1] == view.itemsize)
    return view if even else np.ascontiguousarray(view)


def _rows_together(array: mx.array) -> Any:
    """A view of an evaluated array, wherever its rows are; they themselves must be contiguous."""
    view = np.asarray(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)
    together = view.shape[-1] == 1 or view.strides[-1] == view.itemsize
    return view if together else np.ascontiguousarray(view)


def _mlx(array: Any, dtype: str) -> mx.array:
    made = mx.array(array)
    return made.view(mx.bfloat16) if dtype == "bfloat16" else made


def _contiguous(array: mx.array) -> Any:
    return np.ascontiguousarray(_numpy(array))


def _optional(dtype: str | None, rest: Iterator[mx.array]) -> Any:
    return None if dtype is None else _contiguous(next(rest))


def _projection(layout: Layout, rest: Iterator[mx.array]) -> Any:
    """The next arrays as the projection they belong to."""
    quant = layout.quant
    weight = _contiguous(next(rest))
    scales = None if quant is None else _contiguous(next(rest))
    biases = _contiguous(next(rest)) if quant is not None and quant.mode == "affine" else None
    bias = _optional(layout.bias, rest)
    global_scale = _contiguous(next(rest)) if layout.global_scale else None
    make = bindings().kernels.Projection
    return make(weight, scales, biases, bias=bias, global_scale=global_scale, quant=quant)


def _experts(layout: ExpertLayout, rest: Iterator[mx.array]) -> Any:
    """The next arrays as stacks of experts, or as the shared one."""
    gate = None if layout.gate is None else _projection(layout.gate, rest)
    up, down = _projection(layout.up, rest), _projection(layout.down, rest)
    return bindings().kernels.Ffn(gate=gate, up=up, down=down, activation=layout.activation)
