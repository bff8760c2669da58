"""Experts of a few tokens, by mat-vec kernels: two launches for every route of every token.

``gate_up`` and ``down`` (or ``down_combine``) take flat tokens, ``[tokens, features]``; what they cannot take
:func:`why_not` says. Weights must be row-contiguous, or MLX copies them without a word.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from ...weights import ExpertLayout, ExpertWeights, Layout, SharedExpert, SharedLayout, dtype_name
from . import decode_kernels as kernels
from .matvec import EXACT, Variant, unsigned
from .operands import arrays_of


def why_not(dtype: mx.Dtype, layout: ExpertLayout, shared: SharedLayout | None = None) -> str | None:
    """Why these kernels cannot run such experts on activations of ``dtype``, or None."""
    projections = {"gate": layout.gate, "up": layout.up, "down": layout.down}
    if shared is not None:
        projections |= {
            "shared gate": shared.layout.gate,
            "shared up": shared.layout.up,
            "shared down": shared.layout.down,
            "output gate": shared.output_gate,
        }
    for name, projection in projections.items():
        if projection is not None and (reason := _why_not(dtype, projection)):
            return f"{name}: {reason}"
    return None


def _why_not(dtype: mx.Dtype, layout: Layout) -> str | None:
    name = dtype_name(dtype)
    if layout.dtype not in (dtype, mx.uint8):
        what = "weights" if layout.quant is None else "scales"
        return f"{what} are {dtype_name(layout.dtype)}, x is {name}"
    if layout.bias not in (None, name):
        return f"its bias is {layout.bias}, x is {name}"
    return None


def gate_up(x: mx.array, weights: ExpertWeights, indices: mx.array, variant: Variant = EXACT) -> mx.array:
    """The inner activations of every route, ``activation(gate(x), up(x))``, in one launch.

    Args:
        x: ``[tokens, hidden]``.
        weights: the experts; their ``down`` is not used.
        indices: ``[tokens, top_k]``, any integers; an expert that does not exist gives 0.

        variant: how the kernel is made, here as in the other functions.

    Returns:
        ``[tokens, top_k, width]`` of x's dtype.
    """
    tokens, top_k = indices.shape
    shape = (tokens, top_k, weights.layout.width)
    if not tokens:
        return mx.zeros(shape, x.dtype)
    launch = kernels.gate_up(weights.layout, top_k, x.dtype, variant)
    inputs = [x, unsigned(indices), *arrays_of(weights.gate), *arrays_of(weights.up)]
    return launch(inputs, tokens * top_k, [(shape, x.dtype)])[0]


class SharedInner(NamedTuple):
    """What the shared expert's first half leaves for :func:`down_combine`.

    Attributes:
        expert: whose down projection follows.
        inner: its inner activations, ``[tokens, shared width]``.
        logits: of its output gate, ``[tokens]``, or None if it has none.
    """

    expert: SharedExpert
    inner: mx.array
    logits: mx.array | None = None


def shared_gate_up(x: mx.array, shared: SharedExpert, variant: Variant = EXACT) -> SharedInner:
    """The inner activations of the shared expert and the logit of its output gate, in one launch.

    x: ``[tokens, hidden]``.
    """
    shapes = _shared_shapes(x, shared)
    if not x.shape[0]:
        return SharedInner(shared, *(mx.zeros(shape, x.dtype) for shape in shapes))
    launch = kernels.shared_gate_up(shared.layout, x.dtype, variant)
    outputs = [(shape, x.dtype) for shape in shapes]
    return SharedInner(shared, *launch([x, *_shared_arrays(shared)], x.shape[0], outputs))


def gate_up_with_shared(
    x: mx.array, weights: ExpertWeights, indices: mx.array, shared: SharedExpert, variant: Variant = EXACT
) -> tuple[mx.array, SharedInner]:
    """:func:`gate_up` and :func:`shared_gate_up` in one launch."""
    tokens, top_k = indices.shape
    shapes = [(tokens, top_k, weights.layout.width), *_shared_shapes(x, shared)]
    if not tokens:
        inner, *others = (mx.zeros(shape, x.dtype) for shape in shapes)
        return inner, SharedInner(shared, *others)
    launch = kernels.gate_up_with_shared(weights.layout, shared.layout, top_k, x.dtype, variant)
    arrays = [*arrays_of(weights.gate), *arrays_of(weights.up), *_shared_arrays(shared)]
    outputs = [(shape, x.dtype) for shape in shapes]
    inner, *others = launch([x, unsigned(indices), *arrays], tokens * (top_k + 1), outputs)
    return inner, SharedInner(shared, *others)


def _shared_arrays(shared: SharedExpert) -> list[mx.array]:
    return [*arrays_of(shared.gate), *arrays_of(shared.up), *arrays_of(shared.output_gate)]


def _shared_shapes(x: mx.array, shared: SharedExpert) -> list[tuple[int, ...]]:
    inner = (x.shape[0], shared.layout.layout.width)
    return [inner] if shared.output_gate is None else [inner, inner[:1]]


def down(inner: mx.array, weights: ExpertWeights, indices: mx.array, variant: Variant = EXACT) -> mx.array:
    """Every route's output, in one launch.

    Args:
        inner: ``[tokens, top_k, width]``.
        weights: the experts; only their ``down`` is used.
        indices: ``[tokens, top_k]``, any integers; an expert that does not exist gives 0.

    Returns:
        ``[tokens, top_k, hidden]`` of inner's dtype.
    """
    tokens, top_k = indices.shape
    shape = (tokens, top_k, weights.layout.hidden)
    if not tokens:
        return mx.zeros(shape, inner.dtype)
    launch = kernels.down(weights.layout, inner.dtype, variant)
    inputs = [inner, unsigned(indices), *arrays_of(weights.down)]
    return launch(inputs, tokens * top_k, [(shape, inner.dtype)])[0]


def down_combine(
    inner: mx.array,
    weights: ExpertWeights,
    indices: mx.array,
    route_weights: mx.array,
    combine_dtype: mx.Dtype | None = None,
    *,
    shared: SharedInner | None = None,
    identity: mx.array | None = None,
    scale: float = 1.0,
    variant: Variant = EXACT,
) -> mx.array:
    """``sum_k route_weights_k * down(inner_k)``, and what else the block adds up, in one launch.

    The result is ``(sum + identity share) * scale + sigmoid(logits) * shared output``, rounded after each
    step as mlx-lm's operations are (``moe`` of the reference).

    Args:
        inner: ``[tokens, top_k, width]``.
        weights: the experts; only their ``down`` is used.
        indices: ``[tokens, top_k]``, any integers; an expert that does not exist contributes 0.
        route_weights: float ``[tokens, top_k]``; products and sums are of the dtype to which MLX promotes
            theirs and inner's.
        combine_dtype: what they are cast to first.
        shared: of the shared expert.
        identity: x ``[tokens, hidden]``, where experts past the end of the stack return it.
        scale: on everything but the shared expert.

    Returns:
        ``[tokens, hidden]`` of inner's dtype.
    """
    tokens, top_k = indices.shape
    shape = (tokens, weights.layout.hidden)
    if not tokens:
        return mx.zeros(shape, inner.dtype)
    dtype = route_weights.dtype
    kind = kernels.CombineKind(dtype, combine_dtype or dtype, identity is not None, scale)
    layout = None if shared is None else shared.expert.layout
    launch = kernels.down_combine(weights.layout, layout, top_k, inner.dtype, kind, variant)
    inputs = [inner, unsigned(indices), route_weights, *arrays_of(weights.down)]
    if shared is not None:
        inputs += [shared.inner, *arrays_of(shared.expert.down)]
        if shared.logits is not None:
            inputs.append(shared.logits)
    if identity is not None:
        inputs.append(identity)
    return launch(inputs, tokens, [(shape, inner.dtype)])[0]
