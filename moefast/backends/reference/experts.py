"""Reference experts: what mlx-lm's SwitchGLU and MoE blocks compute, for every weight format."""

from __future__ import annotations

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
    indices = mx.stop_gradient(indices)
    in_order = indices.size >= _SORT_FROM
    if in_order:
        top_k = indices.shape[-1]
        flat = indices.flatten()
        order = mx.argsort(flat)
        rows, chosen = x.reshape(-1, 1, x.shape[-1])[order // top_k], flat[order]
    else:
        rows, chosen = mx.expand_dims(x, (-2, -3)), indices
    up = gathered(rows, weights.up, chosen, in_order=in_order)
    gate = gathered(rows, weights.gate, chosen, in_order=in_order) if weights.gate is not None else None
    hidden = activate(weights.activation, gate, up)
    y = gathered(hidden, weights.down, chosen, in_order=in_order)
    if in_order:
        y = mx.unflatten(y[mx.argsort(order)], 0, indices.shape)
    return y.squeeze(-2)


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
    if spec.identity_experts:
        y = _with_identity_experts(x, weights, routing, combine_dtype)
    else:
        y = experts(x, weights, routing, combine_dtype)
    if spec.scale_place == "output" and spec.scale != 1.0:
        y = y * spec.scale
    return y if shared is None else y + shared_expert(x, shared)


def _with_identity_experts(
    x: mx.array, weights: ExpertWeights, routing: Routing, combine_dtype: mx.Dtype | None
) -> mx.array:
    """Routes to experts past the end of the stack return x itself, times their weight."""
    identity = routing.indices >= weights.layout.num_experts
    real = Routing(
        mx.where(identity, 0, routing.indices).astype(mx.uint32),
        mx.where(identity, 0.0, routing.weights).astype(routing.weights.dtype),
    )
    kept = mx.where(identity, routing.weights, 0.0).sum(axis=-1, keepdims=True)
    y = experts(x, weights, real, combine_dtype)
    return (y + x * kept).astype(y.dtype)
