"""From a problem to what runs it: operators of ``moefast._native``, made once for each kind of call."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import mlx.core as mx

from ...registry import Bound, Problem
from ...routing import Routing
from ...specs import RouterSpec
from ...weights import ExpertWeights, Layout, Projection, SharedExpert, dtype_name
from .. import dtypes
from ..flat import arrays_of, multiplied, reference_of, rounded
from .loading import bindings

# What a layer does between its products. These need no plan: they take what the reference takes. Through
# NumPy the attention alone is faster than MLX's own operations.
NORMS = ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm")
BESIDE_EXPERTS = ("attention", "cached_attention", *NORMS, "rope", "embed", "logsumexp")


def bind(problem: Problem) -> Bound:
    """What runs a problem."""
    if not bindings().native:
        from . import through_numpy

        return Bound(through_numpy.bind(problem))
    if problem.op == "embed":
        return _bind_embed(problem)
    if problem.op in BESIDE_EXPERTS:
        return Bound(getattr(bindings().native, problem.op))
    operator = operator_of(problem)
    of_layers = {
        "quantized_matmul": operator.matmul_of,
        "quantized_matmuls": operator.matmuls_of,
        "moe": operator.moe_of,
    }.get(problem.op)
    return Bound(_RUN[problem.op](operator), of_layers)


def operator_of(problem: Problem) -> Any:
    """The operator of ``moefast._native`` for a problem of experts, a router or dense products."""
    return _operator(problem.op, dtype_name(problem.dtype), problem.details)


@cache
def _operator(op: str, dtype: str, details: tuple[Any, ...]) -> Any:
    """Equal plans must be one object: by that mx.compile knows equal operations. They are never freed; a
    model has a handful."""
    make = partial(bindings().native.plan, op, reference=reference_of(op, details))
    if op == "route":
        spec, bias, scale = details
        return make([dtype, bias, scale], spec=spec, out_dtype=dtypes.route(dtype, spec, bias, scale))
    if op == "moe":
        spec, layout, shared, logits, bias, scale, combine_dtype = details
        return make(
            [dtype, logits, bias, scale],
            spec=spec,
            layout=layout,
            shared=None if shared is None else shared.layout,
            shared_gate=None if shared is None else shared.output_gate,
            combine_dtype=combine_dtype,
            out_dtype=dtypes.moe(dtype, layout, shared),
        )
    if op == "quantized_matmuls":
        return make([dtype], layout=details, out_dtype=dtypes.product(dtype, details[0]))
    layout = details[0]
    if op == "quantized_matmul":
        return make([dtype], layout=layout, out_dtype=dtypes.product(dtype, layout))
    out = dtypes.feed_forward(dtype, layout)
    if op == "switch_glu":
        return make([dtype], layout=layout, out_dtype=out)
    _, _, mix, combine_dtype = details
    return make([dtype, multiplied(mix, combine_dtype)], layout=layout, out_dtype=out)


def _bind_embed(problem: Problem) -> Bound:
    (layout,) = problem.details
    assert isinstance(layout, Layout)
    assert layout.quant is not None
    native, quant = bindings().native, layout.quant
    packing = quant.group_size, quant.bits, quant.mode

    def run(indices: mx.array, weight: Projection) -> mx.array:
        p = weight
        y: mx.array = native.embed(indices, p.weight, p.scales, p.biases, p.global_scale, *packing)
        return y

    return Bound(run, partial(native.embed_of, *packing, layout.global_scale))


def _handle(weights: ExpertWeights | SharedExpert | Projection) -> Any:
    """The arrays of weights as the operators take them; remembered with the weights."""
    made = weights.prepared
    if made is None:
        made = weights.prepared = bindings().native.Weights(arrays_of(weights))
    return made


def _run_matmul(operator: Any) -> Callable[..., mx.array]:
    def run(x: mx.array, weight: Projection) -> mx.array:
        y: mx.array = operator.matmul(x, weight.prepared or _handle(weight))
        return y

    return run


def _run_matmuls(operator: Any) -> Callable[..., list[mx.array]]:
    def run(x: mx.array, *weights: Projection) -> list[mx.array]:
        arrays = [array for weight in weights for array in arrays_of(weight)]
        ys: list[mx.array] = operator.matmuls(x, bindings().native.Weights(arrays))
        return ys

    return run


def _run_switch_glu(operator: Any) -> Callable[..., mx.array]:
    def run(x: mx.array, weights: ExpertWeights, indices: mx.array) -> mx.array:
        y: mx.array = operator.switch_glu(x, indices, weights.prepared or _handle(weights))
        return y

    return run


def _run_experts(operator: Any) -> Callable[..., mx.array]:
    def run(
        x: mx.array, weights: ExpertWeights, routing: Routing, combine_dtype: mx.Dtype | None
    ) -> mx.array:
        mix = rounded(routing.weights, combine_dtype)
        y: mx.array = operator.experts(x, routing.indices, mix, weights.prepared or _handle(weights))
        return y

    return run


def _run_route(operator: Any) -> Callable[..., Routing]:
    def run(
        logits: mx.array, spec: RouterSpec, selection_bias: mx.array | None, expert_scale: mx.array | None
    ) -> Routing:
        return Routing(*operator.route(logits, selection_bias, expert_scale))

    return run


def _run_moe(operator: Any) -> Callable[..., mx.array]:
    def run(
        x: mx.array,
        logits: mx.array,
        spec: RouterSpec,
        weights: ExpertWeights,
        selection_bias: mx.array | None,
        expert_scale: mx.array | None,
        shared: SharedExpert | None,
        combine_dtype: mx.Dtype | None,
    ) -> mx.array:
        own = weights.prepared or _handle(weights)
        others = None if shared is None else shared.prepared or _handle(shared)
        y: mx.array = operator.moe(x, logits, selection_bias, expert_scale, own, others)
        return y

    return run


_RUN: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "quantized_matmul": _run_matmul,
    "quantized_matmuls": _run_matmuls,
    "switch_glu": _run_switch_glu,
    "experts": _run_experts,
    "route": _run_route,
    "moe": _run_moe,
}
