"""Reference experts: what mlx-lm's SwitchGLU and MoE blocks compute, for every weight format."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from ...routing import Routing
from ...specs import RouterSpec
from ...weights import ExpertWeights, SharedExpert
from .activations import activate
from .matmul import dense, gathered
from .route import route

# From here on routes are sorted by expert, so that MLX can share an expert's weights between rows.
_SORT_FROM = 64


def switch_glu(x: mx.array, weights: ExpertWeights, indices: mx.array) -> mx.array:
    """Every route's expert output, uncombined.

    Args:
        x: ``[..., hidden]``.
        weights: stacks of E experts.
        indices: ``[..., top_k]``.

    Returns:
        ``[..., top_k, hidden]``.
    """

    def expert(rows: mx.array, chosen: mx.array, in_order: bool) -> mx.array:
        up = gathered(rows, weights.up, chosen, in_order=in_order)
        gate = None
        if weights.gate is not None:
            gate = gathered(rows, weights.gate, chosen, in_order=in_order)
        return gathered(activate(weights.activation, gate, up), weights.down, chosen, in_order=in_order)

    return each_route(x, indices, weights.layout.num_experts, expert)


def each_route(
    x: mx.array,
    indices: mx.array,
    num_experts: int,
    expert: Callable[[mx.array, mx.array, bool], mx.array],
) -> mx.array:
    """Apply ``expert(rows [..., 1, hidden], indices [...], in order?)`` to every route.

    A route to an expert that does not exist contributes nothing: its output is 0, and nothing outside the
    stacks is read.

    Returns:
        ``[..., top_k, hidden]`` for x ``[..., hidden]`` and indices ``[..., top_k]``.
    """
    exists = (indices >= 0) & (indices < num_experts)
    indices = mx.stop_gradient(mx.where(exists, indices, 0).astype(mx.uint32))
    in_order = indices.size >= _SORT_FROM
    if in_order:
        flat = indices.flatten()
        order = mx.argsort(flat)
        rows = x.reshape(-1, 1, x.shape[-1])[order // indices.shape[-1]]
        y = expert(rows, flat[order], True)
        y = mx.unflatten(y[mx.argsort(order)], 0, indices.shape)
    else:
        y = expert(mx.expand_dims(x, (-2, -3)), indices, False)
    return mx.where(exists[..., None], y.squeeze(-2), mx.array(0, y.dtype))


def combine(y: mx.array, weights: mx.array, combine_dtype: mx.Dtype | None) -> mx.array:
    """``sum_k weights_k * y_k`` in the promoted dtype of both (or ``combine_dtype``), rounded to y's.

    y: ``[..., top_k, hidden]``, weights: ``[..., top_k]`` -> ``[..., hidden]``.
    """
    if combine_dtype is not None:
        weights = weights.astype(combine_dtype)
    return (y * weights[..., None]).sum(axis=-2).astype(y.dtype)


def experts(
    x: mx.array, weights: ExpertWeights, routing: Routing, combine_dtype: mx.Dtype | None
) -> mx.array:
    """The weighted sum of a token's experts. x: ``[..., hidden]`` -> ``[..., hidden]``."""
    return combine(switch_glu(x, weights, routing.indices), routing.weights, combine_dtype)


def shared_expert(x: mx.array, shared: SharedExpert) -> mx.array:
    """The expert of every token, times ``sigmoid(output_gate(x))`` where it has that gate."""
    gate = dense(x, shared.gate) if shared.gate is not None else None
    y = dense(activate(shared.activation, gate, dense(x, shared.up)), shared.down)
    if shared.output_gate is not None:
        y = mx.sigmoid(dense(x, shared.output_gate)) * y
    return y


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
    """Routing, experts, combine and shared expert. x: ``[..., hidden]`` -> ``[..., hidden]``."""
    routing = route(logits, spec, selection_bias, expert_scale)
    y = experts(x, weights, routing, combine_dtype)
    if spec.identity_experts:
        y = y + identity_share(x, routing, weights.layout.num_experts).astype(y.dtype)
    if spec.scale_place == "output" and spec.scale != 1.0:
        y = y * spec.scale
    return y if shared is None else y + shared_expert(x, shared)


def identity_share(x: mx.array, routing: Routing, num_experts: int) -> mx.array:
    """What the experts past the end of the stack add: x itself, times their weights (LongCat-Flash)."""
    kept = mx.where(routing.indices >= num_experts, routing.weights, 0.0)
    return x * kept.sum(axis=-1, keepdims=True)
