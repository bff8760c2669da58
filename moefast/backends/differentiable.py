"""Kernels without derivatives of their own: they get the reference's.

MLX gives no way to see that a gradient is being taken, so the kernels stand in an ``mx.custom_function``
whose derivative recomputes the reference on the flat list of the call's arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from ..registry import Problem
from ..routing import Routing
from ..specs import RouterSpec
from ..weights import ExpertWeights, Projection, SharedExpert
from .flat import DIFFERENTIABLE, arrays_of, present, reference_of, roles, rounded

Flat = Callable[..., list[mx.array]]


def differentiable(
    problem: Problem,
    run: Callable[[tuple[mx.array, ...]], list[mx.array]],
    look: Callable[[tuple[mx.array, ...]], None] | None = None,
) -> Callable[..., Any]:
    """``run`` on the flat list of a call's arrays, as a function with the reference's signature and
    derivatives.

    Args:
        problem: of an operation with experts or of a router.
        run: gives the results: one array, of ``route`` the indices and the weights.
        look: sees the arrays first. ``run`` gets other objects, which stand for the same arrays.
    """
    return with_signature(problem, on_flat_lists(problem, run, look))


def with_signature(problem: Problem, flat: Flat) -> Callable[..., Any]:
    """``flat`` as a function with the arguments of the reference's."""
    return _SIGNATURES[problem.op](flat)


def on_flat_lists(
    problem: Problem,
    run: Callable[[tuple[mx.array, ...]], list[mx.array]],
    look: Callable[[tuple[mx.array, ...]], None] | None = None,
) -> Flat:
    """As :func:`differentiable`, of a call's arrays one after another."""
    flat = _with_derivatives(problem, run)
    if look is None:
        return flat

    def looked_at(*arrays: mx.array) -> list[mx.array]:
        look(arrays)
        return flat(*arrays)

    return looked_at


def _with_derivatives(problem: Problem, run: Callable[[tuple[mx.array, ...]], list[mx.array]]) -> Flat:
    again = reference_of(problem.op, problem.details)
    chosen = [i for i, role in enumerate(roles(problem.op, problem.details)) if role == DIFFERENTIABLE]

    # One for each call: it is made sooner than MLX would take in and hand on a block's constant arrays.
    def flat(*arrays: mx.array) -> list[mx.array]:
        def with_chosen(some: Sequence[mx.array]) -> list[mx.array]:
            every = list(arrays)
            for i, array in zip(chosen, some, strict=True):
                every[i] = array
            return every

        def vjp(primals: Any, cotangents: Any, outputs: Any) -> Any:
            single = isinstance(primals, mx.array)  # of a function of one argument

            def reference(*some: mx.array) -> list[mx.array]:
                every = with_chosen(some)
                # Of a router the weights alone: its choice is constant.
                return again([*every, outputs[0]] if problem.op == "route" else every)

            wanted = [cotangents[-1]] if problem.op == "route" else list(cotangents)
            _, slopes = mx.vjp(reference, [primals] if single else list(primals), wanted)
            return slopes[0] if single else tuple(slopes)

        function: Any = mx.custom_function(lambda *some: run(tuple(with_chosen(some))))
        function.vjp(vjp)
        made: list[mx.array] = function(*[arrays[i] for i in chosen])
        return made

    return flat


def _matmul(flat: Flat) -> Callable[..., mx.array]:
    def matmul(x: mx.array, weight: Projection) -> mx.array:
        return flat(x, *arrays_of(weight))[0]

    return matmul


def _matmuls(flat: Flat) -> Callable[..., list[mx.array]]:
    def matmuls(x: mx.array, *weights: Projection) -> list[mx.array]:
        return flat(x, *(array for weight in weights for array in arrays_of(weight)))

    return matmuls


def _switch_glu(flat: Flat) -> Callable[..., mx.array]:
    def switch_glu(x: mx.array, weights: ExpertWeights, indices: mx.array) -> mx.array:
        return flat(x, indices, *arrays_of(weights))[0]

    return switch_glu


def _experts(flat: Flat) -> Callable[..., mx.array]:
    def experts(
        x: mx.array, weights: ExpertWeights, routing: Routing, combine_dtype: mx.Dtype | None
    ) -> mx.array:
        mix = rounded(routing.weights, combine_dtype)
        return flat(x, routing.indices, mix, *arrays_of(weights))[0]

    return experts


def _route(flat: Flat) -> Callable[..., Routing]:
    def route(logits: mx.array, spec: RouterSpec, bias: mx.array | None, scale: mx.array | None) -> Routing:
        indices, weights = flat(logits, *present(bias, scale))
        return Routing(mx.stop_gradient(indices), weights)

    return route


def _moe(flat: Flat) -> Callable[..., mx.array]:
    def moe(
        x: mx.array,
        logits: mx.array,
        spec: RouterSpec,
        weights: ExpertWeights,
        bias: mx.array | None,
        scale: mx.array | None,
        shared: SharedExpert | None,
        combine_dtype: mx.Dtype | None,
    ) -> mx.array:
        others = [] if shared is None else arrays_of(shared)
        return flat(x, logits, *present(bias, scale), *arrays_of(weights), *others)[0]

    return moe


_SIGNATURES: dict[str, Callable[[Flat], Callable[..., Any]]] = {
    "quantized_matmul": _matmul,
    "quantized_matmuls": _matmuls,
    "switch_glu": _switch_glu,
    "experts": _experts,
    "route": _route,
    "moe": _moe,
}
