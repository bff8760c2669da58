"""The operations, out of the kernels' parts: which of them run, in what order.

===========  ======================================================  =====================
tokens       launches of ``moe``, from logits on                     one waits for another
===========  ======================================================  =====================
decode       route, gate+up, down+combine (:mod:`.one_token`)        3
band         route, gate+up, down, combine                           4
tiles        route, plan (1 or 2), gate+up, down, combine            5 or 6
===========  ======================================================  =====================

A shared expert's run beside them: one launch in decode (gate+up; its down is folded into down+combine), and
MLX's own dense products otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import mlx.core as mx

from ...registry import Bound, Problem
from ...routing import Routing
from ...specs import RouterSpec
from ...weights import ExpertWeights, SharedExpert
from ..differentiable import on_flat_lists, with_signature
from ..flat import arguments_of
from ..reference.experts import shared_expert
from ..reference.matmul import dense
from . import band, decode, one_token, prefill, route
from .combine import combine
from .contiguous import check_contiguous
from .dispatch import kernels_for, thresholds
from .matvec import Fidelity, Variant
from .of_layers import of_layers


def bind(problem: Problem, fidelity: Fidelity = "exact") -> Bound:
    """What runs ``problem``: the kernels, with the reference's derivatives."""
    own = _own(problem)
    look = None if problem.op == "route" else lambda arrays: check_contiguous(arrays[own:])
    run: Callable[[tuple[mx.array, ...]], Any] = _on_flat_list(problem, Variant(thresholds().rows, fidelity))

    def run_flat(arrays: tuple[mx.array, ...]) -> list[mx.array]:
        made = run(arrays)
        return [made] if isinstance(made, mx.array) else list(made)

    call = with_signature(problem, on_flat_lists(problem, run_flat, look))
    return Bound(call, of_layers(problem, run) if problem.op == "moe" else None)


def _on_flat_list(problem: Problem, variant: Variant) -> Callable[[tuple[mx.array, ...]], Any]:
    if problem.op == "moe" and problem.phase == "decode":
        return one_token.bind(problem, variant)
    run = _OPERATIONS[problem.op](problem, variant)

    def on_flat_list(arrays: tuple[mx.array, ...]) -> Any:
        return run(*arguments_of(problem.op, problem.details, iter(arrays)))

    return on_flat_list


def _own(problem: Problem) -> int:
    """How many arrays of a call are not weights."""
    if problem.op == "moe":
        return 2 + sum(dtype is not None for dtype in problem.details[4:6])
    if problem.op == "route":
        return 1 + sum(dtype is not None for dtype in problem.details[1:])
    return 2 if problem.op == "switch_glu" else 3


def _route(problem: Problem, variant: Variant) -> Callable[..., Any]:
    return route.bind(problem)


def _switch_glu(problem: Problem, variant: Variant) -> Callable[..., mx.array]:
    def switch_glu(x: mx.array, weights: ExpertWeights, indices: mx.array) -> mx.array:
        rows, chosen = _flat(x, indices)
        y = _uncombined(rows, weights, chosen, variant)
        return y.reshape(*indices.shape, weights.layout.hidden)

    return switch_glu


def _uncombined(x: mx.array, weights: ExpertWeights, indices: mx.array, variant: Variant) -> mx.array:
    kernels = kernels_for(indices.shape[0], indices.shape[1], weights.layout.num_experts)
    if kernels == "decode":
        return decode.down(decode.gate_up(x, weights, indices, variant), weights, indices, variant)
    if kernels == "band":
        return band.switch_glu(x, weights, indices, variant.fidelity)
    run = prefill.switch_glu_by_mlx if kernels == "by_mlx" else prefill.switch_glu
    return run(x, weights, indices)


def _experts(problem: Problem, variant: Variant) -> Callable[..., mx.array]:
    return partial(_combined, variant)


def _moe(problem: Problem, variant: Variant) -> Callable[..., mx.array]:
    details: tuple[Any, ...] = problem.details
    spec, _, _, logits_dtype, bias, scale, _ = details
    router = route.bind(
        problem._replace(op="route", dtype=getattr(mx, logits_dtype), details=(spec, bias, scale))
    )
    identity = spec.identity_experts > 0
    factor = spec.scale if spec.scale_place == "output" else 1.0

    def moe(
        x: mx.array,
        logits: mx.array,
        spec: RouterSpec,
        weights: ExpertWeights,
        selection_bias: mx.array | None,
        expert_scale: mx.array | None,
        shared: SharedExpert | None,
        combine_dtype: mx.Dtype | None,
    ) -> mx.array:
        routing = router(logits, spec, selection_bias, expert_scale)
        extras: dict[str, Any] = {"identity": identity, "scale": factor, "shared": shared}
        return _combined(variant, x, weights, routing, combine_dtype, **extras)

    return moe


def _combined(
    variant: Variant,
    x: mx.array,
    weights: ExpertWeights,
    routing: Routing,
    combine_dtype: mx.Dtype | None,
    *,
    identity: bool = False,
    scale: float = 1.0,
    shared: SharedExpert | None = None,
) -> mx.array:
    """The routed experts' sum, and what a block adds to it."""
    rows, indices = _flat(x, routing.indices)
    mix = routing.weights.reshape(indices.shape)
    kernels = kernels_for(indices.shape[0], indices.shape[1], weights.layout.num_experts)
    extras: dict[str, Any] = {"identity": identity, "scale": scale}
    if kernels == "decode":
        beside = None if shared is None else decode.shared_gate_up(rows, shared, variant)
        inner = decode.gate_up(rows, weights, indices, variant)
        own = rows if identity else None
        extras |= {"shared": beside, "identity": own, "variant": variant}
        return decode.down_combine(inner, weights, indices, mix, combine_dtype, **extras).reshape(x.shape)
    if shared is not None:
        extras["shared"], extras["shared_gate"] = _shared_output(rows, shared)
    if kernels == "by_mlx":
        apart = prefill.switch_glu_by_mlx(rows, weights, indices)
        num_experts = weights.layout.num_experts
        extras["identity"] = (rows, indices, num_experts) if identity else None
        return combine(apart, mix, combine_dtype, **extras).reshape(x.shape)
    run = partial(band.experts, fidelity=variant.fidelity) if kernels == "band" else prefill.experts
    return run(rows, weights, indices, mix, combine_dtype, **extras).reshape(x.shape)


def _shared_output(x: mx.array, shared: SharedExpert) -> tuple[mx.array, mx.array | None]:
    """The shared expert's output and the logit of its gate, by MLX's own dense products."""
    gate = None if shared.output_gate is None else dense(x, shared.output_gate)
    ungated = SharedExpert(gate=shared.gate, up=shared.up, down=shared.down, activation=shared.activation)
    return shared_expert(x, ungated), gate


def _flat(x: mx.array, indices: mx.array) -> tuple[mx.array, mx.array]:
    """``[tokens, hidden]`` and ``[tokens, top_k]``."""
    tokens = prod(x.shape[:-1])
    return x.reshape(tokens, x.shape[-1]), indices.reshape(tokens, indices.shape[-1])


# From a problem to what runs it, with the arguments of the reference's function.
_OPERATIONS: dict[str, Callable[[Problem, Variant], Callable[..., Any]]] = {
    "route": _route,
    "switch_glu": _switch_glu,
    "experts": _experts,
    "moe": _moe,
}
