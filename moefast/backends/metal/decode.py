"""Experts of a few tokens, by mat-vec kernels: two launches for every route of every token.

``gate_up`` and ``down`` (or ``down_combine``) take flat tokens, ``[tokens, features]``; what they cannot take
:func:`why_not` says. Weights must be row-contiguous, or MLX copies them without a word. Each function has a
``bind_``: all that depends on layouts and dtypes alone, worked out once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx

from ...weights import ExpertLayout, ExpertWeights, Layout, SharedExpert, SharedLayout, dtype_name
from .activations import functor, literal
from .launch import Function
from .matvec import GROUP, LANE, ROUTE, ROWS, SIMDGROUPS, Operands, cover, launcher, reader, unsigned


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


# -- gate, up, activation ----------------------------------------------------------------------------------


def gate_up(x: mx.array, weights: ExpertWeights, indices: mx.array) -> mx.array:
    """The inner activations of every route, ``activation(gate(x), up(x))``, in one launch.

    Args:
        x: ``[tokens, hidden]``.
        weights: the experts; their ``down`` is not used.
        indices: ``[tokens, top_k]``, any integers; an expert that does not exist gives 0.

    Returns:
        ``[tokens, top_k, width]`` of x's dtype.
    """
    return bind_gate_up(weights.layout, indices.shape[1], x.dtype)(x, weights, indices)


GateUp = Callable[[mx.array, ExpertWeights, mx.array], mx.array]


@lru_cache(maxsize=256)
def bind_gate_up(layout: ExpertLayout, top_k: int, dtype: mx.Dtype) -> GateUp:
    """:func:`gate_up` of weights of this layout, for so many experts per token and x of ``dtype``."""
    layouts = {"gate": layout.gate, "up": layout.up}
    operands, width = Operands(**layouts), layout.width
    function = Function(
        name="gate_up",
        file="gate_up.metal",
        inputs=("x", "indices", *operands.names),
        outputs=("inner",),
        body=_routed(layout, operands, ROUTE),
    )
    numbers = _routed_numbers(layout, top_k)
    launch = launcher(function, {"T": dtype}, numbers, [operands], cover(width, ROWS * SIMDGROUPS))
    arrays = reader(layouts)

    def run(x: mx.array, weights: ExpertWeights, indices: mx.array) -> mx.array:
        tokens = x.shape[0]
        shape = (tokens, top_k, width)
        if not tokens:
            return mx.zeros(shape, dtype)
        inputs = [x, unsigned(indices), *arrays(weights)]
        return launch(inputs, tokens * top_k, [(shape, dtype)])[0]

    return run


def _routed(layout: ExpertLayout, operands: Operands, route: str) -> str:
    return f"""
  moefast::gate_up<T, ROWS, K, N, E, TOP_K, GATE_FAST, UP_FAST>(
      x, indices, {operands.stacks["gate"]}, {operands.stacks["up"]}, {functor(layout.activation)}, inner,
      {GROUP}, {route}, {LANE});
"""


def _routed_numbers(layout: ExpertLayout, top_k: int) -> dict[str, int]:
    return {"K": layout.hidden, "N": layout.width, "E": layout.num_experts, "TOP_K": top_k}


# -- of the shared expert ----------------------------------------------------------------------------------


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


def shared_gate_up(x: mx.array, shared: SharedExpert) -> SharedInner:
    """The inner activations of the shared expert and the logit of its output gate, in one launch.

    x: ``[tokens, hidden]``.
    """
    return bind_shared_gate_up(shared.layout, x.dtype)(x, shared)


@lru_cache(maxsize=256)
def bind_shared_gate_up(
    shared: SharedLayout, dtype: mx.Dtype
) -> Callable[[mx.array, SharedExpert], SharedInner]:
    """:func:`shared_gate_up` of a shared expert of this layout, for x of ``dtype``."""
    part = _Shared(shared)
    function = Function(
        name="shared_gate_up",
        file="gate_up.metal",
        inputs=("x", *part.operands.names),
        outputs=part.outputs,
        body=part.body(ROUTE),
    )
    numbers = {"K": shared.layout.hidden, "SHARED_N": shared.layout.width}
    launch = launcher(function, {"T": dtype}, numbers, [part.operands], part.threadgroups)

    def run(x: mx.array, expert: SharedExpert) -> SharedInner:
        tokens = x.shape[0]
        shapes = part.shapes(tokens)
        if not tokens:
            return SharedInner(expert, *(mx.zeros(shape, dtype) for shape in shapes))
        outputs = [(shape, dtype) for shape in shapes]
        return SharedInner(expert, *launch([x, *part.arrays(expert)], tokens, outputs))

    return run


class _Shared:
    """The shared expert's part of a launch of gate_up.metal."""

    def __init__(self, shared: SharedLayout):
        layout = shared.layout
        self.gated = shared.output_gate is not None
        self.width = layout.width
        self.activation = functor(layout.activation)
        layouts = {"gate": layout.gate, "up": layout.up, "output_gate": shared.output_gate}
        self.operands = Operands(**{f"shared_{name}": of for name, of in layouts.items()})
        self.outputs = ("shared_inner", "shared_logits") if self.gated else ("shared_inner",)
        self.arrays = reader(layouts)
        # One simdgroup more than the rows need computes the output gate.
        self.threadgroups = cover(cover(self.width, ROWS) + self.gated, SIMDGROUPS)

    def body(self, token: str) -> str:
        stacks = self.operands.stacks
        return f"""
  moefast::shared_gate_up<T, ROWS, K, SHARED_N, SHARED_GATE_FAST, SHARED_UP_FAST, SHARED_OUTPUT_GATE_FAST>(
      x, {stacks["shared_gate"]}, {stacks["shared_up"]}, {self.activation}, {stacks["shared_output_gate"]},
      shared_inner, {"shared_logits" if self.gated else "moefast::None{}"},
      {GROUP}, {token}, {LANE});
"""

    def shapes(self, tokens: int) -> list[tuple[int, ...]]:
        inner = (tokens, self.width)
        return [inner, (tokens,)] if self.gated else [inner]


def gate_up_with_shared(
    x: mx.array, weights: ExpertWeights, indices: mx.array, shared: SharedExpert
) -> tuple[mx.array, SharedInner]:
    """:func:`gate_up` and :func:`shared_gate_up` in one launch."""
    bound = bind_gate_up_with_shared(weights.layout, shared.layout, indices.shape[1], x.dtype)
    return bound(x, weights, indices, shared)


GateUpWithShared = Callable[[mx.array, ExpertWeights, mx.array, SharedExpert], tuple[mx.array, SharedInner]]


@lru_cache(maxsize=256)
def bind_gate_up_with_shared(
    layout: ExpertLayout, shared: SharedLayout, top_k: int, dtype: mx.Dtype
) -> GateUpWithShared:
    """:func:`gate_up_with_shared` of such weights."""
    layouts = {"gate": layout.gate, "up": layout.up}
    operands, part = Operands(**layouts), _Shared(shared)
    function = Function(
        name="gate_up_with_shared",
        file="gate_up.metal",
        inputs=("x", "indices", *operands.names, *part.operands.names),
        outputs=("inner", *part.outputs),
        body=f"""
  const uint token = {ROUTE} / (TOP_K + 1), slot = {ROUTE} % (TOP_K + 1);
  if (slot < uint(TOP_K)) {{{_routed(layout, operands, "token * TOP_K + slot")}  }} else {{
    {part.body("token")}  }}
""",
    )
    numbers = {**_routed_numbers(layout, top_k), "SHARED_N": shared.layout.width}
    threadgroups = max(cover(layout.width, ROWS * SIMDGROUPS), part.threadgroups)
    launch = launcher(function, {"T": dtype}, numbers, [operands, part.operands], threadgroups)
    arrays = reader(layouts)

    def run(
        x: mx.array, weights: ExpertWeights, indices: mx.array, expert: SharedExpert
    ) -> tuple[mx.array, SharedInner]:
        tokens = x.shape[0]
        shapes = [(tokens, top_k, layout.width), *part.shapes(tokens)]
        if not tokens:
            inner, *outputs = (mx.zeros(shape, dtype) for shape in shapes)
        else:
            inputs = [x, unsigned(indices), *arrays(weights), *part.arrays(expert)]
            inner, *outputs = launch(inputs, tokens * (top_k + 1), [(shape, dtype) for shape in shapes])
        return inner, SharedInner(expert, *outputs)

    return run


# -- down --------------------------------------------------------------------------------------------------


def down(inner: mx.array, weights: ExpertWeights, indices: mx.array) -> mx.array:
    """Every route's output, in one launch.

    Args:
        inner: ``[tokens, top_k, width]``.
        weights: the experts; only their ``down`` is used.
        indices: ``[tokens, top_k]``, any integers; an expert that does not exist gives 0.

    Returns:
        ``[tokens, top_k, hidden]`` of inner's dtype.
    """
    return bind_down(weights.layout, inner.dtype)(inner, weights, indices)


@lru_cache(maxsize=256)
def bind_down(
    layout: ExpertLayout, dtype: mx.Dtype
) -> Callable[[mx.array, ExpertWeights, mx.array], mx.array]:
    """:func:`down` of weights of this layout, for inner activations of ``dtype``."""
    layouts = {"down": layout.down}
    operands = Operands(**layouts)
    function = Function(
        name="down",
        file="down.metal",
        inputs=("inner", "indices", *operands.names),
        outputs=("out",),
        body=f"""
  moefast::down<T, ROWS, K, N, E, DOWN_FAST>(
      inner, indices, {operands.stacks["down"]}, out, {GROUP}, {ROUTE}, {LANE});
""",
    )
    numbers = {"K": layout.width, "N": layout.hidden, "E": layout.num_experts}
    threadgroups = cover(layout.hidden, ROWS * SIMDGROUPS)
    launch = launcher(function, {"T": dtype}, numbers, [operands], threadgroups)
    arrays = reader(layouts)

    def run(inner: mx.array, weights: ExpertWeights, indices: mx.array) -> mx.array:
        tokens, top_k = indices.shape
        shape = (tokens, top_k, layout.hidden)
        if not tokens:
            return mx.zeros(shape, dtype)
        inputs = [inner, unsigned(indices), *arrays(weights)]
        return launch(inputs, tokens * top_k, [(shape, dtype)])[0]

    return run


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
    kind = CombineKind(route_weights.dtype, combine_dtype or route_weights.dtype, identity is not None, scale)
    layout = None if shared is None else shared.expert.layout
    bound = bind_down_combine(weights.layout, layout, indices.shape[1], inner.dtype, kind)
    return bound(inner, weights, indices, route_weights, shared, identity)


class CombineKind(NamedTuple):
    """How :func:`down_combine` ends.

    Attributes:
        weights: dtype of the routing weights.
        combine: what they are cast to.
        identity: experts past the end of the stack return x.
        scale: on everything but the shared expert.
    """

    weights: mx.Dtype
    combine: mx.Dtype
    identity: bool = False
    scale: float = 1.0


DownCombine = Callable[
    [
        mx.array,
        ExpertWeights,
        mx.array,
        mx.array,
        SharedInner | None,
        mx.array | None,
    ],
    mx.array,
]


@lru_cache(maxsize=256)
def bind_down_combine(
    layout: ExpertLayout, shared: SharedLayout | None, top_k: int, dtype: mx.Dtype, kind: CombineKind
) -> DownCombine:
    """:func:`down_combine` of such weights; its arguments are ``(inner, weights, indices, route_weights,
    shared, identity)``."""
    layouts = {"down": layout.down}
    operands = [Operands(**layouts)]
    names = ["inner", "indices", "weights", *operands[0].names]
    numbers = {"K": layout.width, "N": layout.hidden, "E": layout.num_experts, "TOP_K": top_k}
    tasks, shared_text = 0, "moefast::NoSharedDown{}"
    if shared is not None:
        tasks = 1
        operands.append(Operands(shared_down=shared.layout.down))
        gated = shared.output_gate is not None
        names += ["shared_inner", *operands[1].names, *(["shared_logits"] if gated else [])]
        numbers |= {"SHARED_K": shared.layout.width, "SHARED_TASKS": tasks}
        shared_text = (
            "moefast::shared_down<SHARED_DOWN_FAST, SHARED_K, SHARED_TASKS>(shared_inner, "
            f"{operands[1].stacks['shared_down']}, {'shared_logits' if gated else 'moefast::None{}'})"
        )
    if kind.identity:
        names.append("x")
    function = Function(
        name="down_combine",
        file="down.metal",
        inputs=tuple(names),
        outputs=("out",),
        body=f"""
  threadgroup T slots[(TOP_K + 1) * ROWS];
  moefast::down_combine<C, A, I, ROWS, SIMDGROUPS, K, N, E, TOP_K, DOWN_FAST>(
      inner, indices, weights, {operands[0].stacks["down"]},
      {shared_text}, {"x" if kind.identity else "moefast::None{}"}, {literal(kind.scale)}, out, slots,
      int(threadgroup_position_in_grid.y), {ROUTE}, int(simdgroup_index_in_threadgroup), {LANE});
""",
    )
    types = {
        "T": dtype,
        "C": kind.combine,
        "A": _promoted(dtype, kind.combine),
        "I": _promoted(dtype, kind.weights),
    }
    simdgroups = min(top_k + tasks, 12)  # 384 threads: as many as any GPU has of a kernel full of registers
    launch = launcher(function, types, numbers, operands, cover(layout.hidden, ROWS), simdgroups)
    arrays = reader(layouts)
    shared_arrays = None if shared is None else reader({"down": shared.layout.down})

    def run(
        inner: mx.array,
        weights: ExpertWeights,
        indices: mx.array,
        route_weights: mx.array,
        shared_inner: SharedInner | None = None,
        identity: mx.array | None = None,
    ) -> mx.array:
        tokens = indices.shape[0]
        shape = (tokens, layout.hidden)
        if not tokens:
            return mx.zeros(shape, dtype)
        inputs = [inner, unsigned(indices), route_weights, *arrays(weights)]
        if shared_inner is not None and shared_arrays is not None:
            inputs += [shared_inner.inner, *shared_arrays(shared_inner.expert)]
            if shared_inner.logits is not None:
                inputs.append(shared_inner.logits)
        if identity is not None:
            inputs.append(identity)
        return launch(inputs, tokens, [(shape, dtype)])[0]

    return run


def _promoted(a: mx.Dtype, b: mx.Dtype) -> mx.Dtype:
    return a if a == b else mx.float32  # of two float dtypes
