"""Experts of a few tokens, by mat-vec kernels: two launches for every route of every token.

``gate_up`` and ``down`` (or ``down_combine``) take flat tokens, ``[tokens, features]``; what they cannot take
:func:`why_not` says. Weights must be row-contiguous, or MLX copies them without a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx

from ...weights import (
    ExpertLayout,
    ExpertWeights,
    Layout,
    Shape,
    SharedExpert,
    SharedLayout,
    dtype_name,
)
from .activations import functor, literal
from .launch import Function, Size
from .operands import Operand, arrays_of, operand_of

# Output rows of a simdgroup, and simdgroups of a threadgroup, of gate and up. Four rows of two matrices are
# MLX's number of sums in registers, twice.
_ROWS = 4
_SIMDGROUPS = 2

_LANES = 32


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


class _Launcher(NamedTuple):
    """A function with the template arguments of one layout."""

    function: Function
    template: tuple[tuple[str, int | bool | mx.Dtype], ...]

    def __call__(
        self,
        inputs: Sequence[mx.array],
        threadgroups: tuple[int, int],
        simdgroups: int,
        outputs: Sequence[tuple[Shape, mx.Dtype]],
    ) -> list[mx.array]:
        across, along = threadgroups
        grid: Size = (_LANES, across * simdgroups, along)
        return self.function(
            inputs,
            template=self.template,
            grid=grid,
            threadgroup=(_LANES, simdgroups, 1),
            outputs=outputs,
        )


def gate_up(x: mx.array, weights: ExpertWeights, indices: mx.array) -> mx.array:
    """The inner activations of every route, ``activation(gate(x), up(x))``, in one launch.

    Args:
        x: ``[tokens, hidden]``.
        weights: the experts; their ``down`` is not used.
        indices: ``[tokens, top_k]``, any integers; an expert that does not exist gives 0.

    Returns:
        ``[tokens, top_k, width]`` of x's dtype.
    """
    layout = weights.layout
    shape = (*indices.shape, layout.width)
    if not indices.size:
        return mx.zeros(shape, x.dtype)
    (inner,) = _gate_up(layout, indices.shape[1], x.dtype)(
        [x, unsigned(indices), *_first(weights)],
        (_cover(layout.width, _ROWS * _SIMDGROUPS), indices.size),
        _SIMDGROUPS,
        [(shape, x.dtype)],
    )
    return inner


@lru_cache(maxsize=256)
def _gate_up(layout: ExpertLayout, top_k: int, dtype: mx.Dtype) -> _Launcher:
    operands = _Operands(gate=layout.gate, up=layout.up)
    function = Function(
        name="gate_up",
        file="gate_up.metal",
        inputs=("x", "indices", *operands.names),
        outputs=("inner",),
        body=_routed(layout, operands, "threadgroup_position_in_grid.z"),
    )
    return _launcher(function, dtype, operands, _routed_numbers(layout, top_k))


def _routed(layout: ExpertLayout, operands: _Operands, route: str) -> str:
    return f"""
  moefast::gate_up<T, ROWS, K, N, E, TOP_K, GATE_FAST, UP_FAST>(
      x, indices, {operands.stacks["gate"]}, {operands.stacks["up"]}, {functor(layout.activation)}, inner,
      {_GROUP}, {route}, int(thread_index_in_simdgroup));
"""


def _routed_numbers(layout: ExpertLayout, top_k: int) -> dict[str, int]:
    return {"K": layout.hidden, "N": layout.width, "E": layout.num_experts, "TOP_K": top_k}


class SharedInner(NamedTuple):
    """What the shared expert's first half leaves for :func:`down_combine`.

    Attributes:
        expert: whose down projection follows.
        inner: its inner activations, ``[tokens, shared width]``.
        logits: of its output gate, ``[tokens]``, or None if it has none.
    """

    expert: SharedExpert
    inner: mx.array
    logits: mx.array | None


def shared_gate_up(x: mx.array, shared: SharedExpert) -> SharedInner:
    """The inner activations of the shared expert and the logit of its output gate, in one launch.

    x: ``[tokens, hidden]``.
    """
    tokens = x.shape[0]
    shapes = _shared_shapes(shared.layout, tokens)
    if not tokens:
        return _shared_inner(shared, [mx.zeros(shape, x.dtype) for shape in shapes])
    outputs = _shared_gate_up(shared.layout, x.dtype)(
        [x, *_shared_first(shared)],
        (_shared_groups(shared.layout), tokens),
        _SIMDGROUPS,
        [(shape, x.dtype) for shape in shapes],
    )
    return _shared_inner(shared, outputs)


@lru_cache(maxsize=256)
def _shared_gate_up(shared: SharedLayout, dtype: mx.Dtype) -> _Launcher:
    operands = _shared_operands(shared)
    function = Function(
        name="shared_gate_up",
        file="gate_up.metal",
        inputs=("x", *operands.names),
        outputs=_shared_outputs(shared),
        body=_shared(shared, operands, "threadgroup_position_in_grid.z"),
    )
    return _launcher(function, dtype, operands, {"K": shared.layout.hidden, "SHARED_N": shared.layout.width})


def gate_up_with_shared(
    x: mx.array, weights: ExpertWeights, indices: mx.array, shared: SharedExpert
) -> tuple[mx.array, SharedInner]:
    """:func:`gate_up` and :func:`shared_gate_up` in one launch."""
    layout, (tokens, top_k) = weights.layout, indices.shape
    if not indices.size:
        return gate_up(x, weights, indices), shared_gate_up(x, shared)
    shapes = [(tokens, top_k, layout.width), *_shared_shapes(shared.layout, tokens)]
    across = max(_cover(layout.width, _ROWS * _SIMDGROUPS), _shared_groups(shared.layout))
    inner, *outputs = _gate_up_with_shared(layout, shared.layout, top_k, x.dtype)(
        [x, unsigned(indices), *_first(weights), *_shared_first(shared)],
        (across, tokens * (top_k + 1)),
        _SIMDGROUPS,
        [(shape, x.dtype) for shape in shapes],
    )
    return inner, _shared_inner(shared, outputs)


@lru_cache(maxsize=256)
def _gate_up_with_shared(
    layout: ExpertLayout, shared: SharedLayout, top_k: int, dtype: mx.Dtype
) -> _Launcher:
    operands, more = _Operands(gate=layout.gate, up=layout.up), _shared_operands(shared)
    function = Function(
        name="gate_up_with_shared",
        file="gate_up.metal",
        inputs=("x", "indices", *operands.names, *more.names),
        outputs=("inner", *_shared_outputs(shared)),
        body=f"""
  const uint token = threadgroup_position_in_grid.z / (TOP_K + 1);
  const uint slot = threadgroup_position_in_grid.z % (TOP_K + 1);
  if (slot < uint(TOP_K)) {{{_routed(layout, operands, "token * TOP_K + slot")}  }} else {{
    {_shared(shared, more, "token")}  }}
""",
    )
    operands.template += more.template
    numbers = {**_routed_numbers(layout, top_k), "SHARED_N": shared.layout.width}
    return _launcher(function, dtype, operands, numbers)


def _shared_operands(shared: SharedLayout) -> _Operands:
    layout = shared.layout
    return _Operands(shared_gate=layout.gate, shared_up=layout.up, shared_output=shared.output_gate)


def _shared(shared: SharedLayout, operands: _Operands, token: str) -> str:
    stacks = operands.stacks
    return f"""
  moefast::shared_gate_up<T, ROWS, K, SHARED_N, SHARED_GATE_FAST, SHARED_UP_FAST, SHARED_OUTPUT_FAST>(
      x, {stacks["shared_gate"]}, {stacks["shared_up"]}, {functor(shared.layout.activation)},
      {stacks["shared_output"]}, shared_inner,
      {"shared_logits" if shared.output_gate else "moefast::None{}"},
      {_GROUP}, {token}, int(thread_index_in_simdgroup));
"""


def _shared_outputs(shared: SharedLayout) -> tuple[str, ...]:
    return ("shared_inner",) if shared.output_gate is None else ("shared_inner", "shared_logits")


def _shared_shapes(shared: SharedLayout, tokens: int) -> list[Shape]:
    inner = (tokens, shared.layout.width)
    return [inner] if shared.output_gate is None else [inner, (tokens,)]


def _shared_groups(shared: SharedLayout) -> int:
    """Threadgroups: one simdgroup more than the rows need computes the output gate."""
    simdgroups = _cover(shared.layout.width, _ROWS) + (shared.output_gate is not None)
    return _cover(simdgroups, _SIMDGROUPS)


def _shared_first(shared: SharedExpert) -> list[mx.array]:
    output_gate = () if shared.output_gate is None else arrays_of(shared.output_gate)
    return [*_first(shared), *output_gate]


def _shared_inner(shared: SharedExpert, outputs: Sequence[mx.array]) -> SharedInner:
    return SharedInner(shared, outputs[0], outputs[1] if len(outputs) > 1 else None)


def down(inner: mx.array, weights: ExpertWeights, indices: mx.array) -> mx.array:
    """Every route's output, in one launch.

    Args:
        inner: ``[tokens, top_k, width]``.
        weights: the experts; only their ``down`` is used.
        indices: ``[tokens, top_k]``, any integers; an expert that does not exist gives 0.

    Returns:
        ``[tokens, top_k, hidden]`` of inner's dtype.
    """
    layout = weights.layout
    shape = (*indices.shape, layout.hidden)
    if not indices.size:
        return mx.zeros(shape, inner.dtype)
    (out,) = _down(layout, inner.dtype)(
        [inner, unsigned(indices), *arrays_of(weights.down)],
        (_cover(layout.hidden, _ROWS * _SIMDGROUPS), indices.size),
        _SIMDGROUPS,
        [(shape, inner.dtype)],
    )
    return out


@lru_cache(maxsize=256)
def _down(layout: ExpertLayout, dtype: mx.Dtype) -> _Launcher:
    operands = _Operands(down=layout.down)
    function = Function(
        name="down",
        file="down.metal",
        inputs=("inner", "indices", *operands.names),
        outputs=("out",),
        body=f"""
  moefast::down<T, ROWS, K, N, E, DOWN_FAST>(
      inner, indices, {operands.stacks["down"]}, out,
      {_GROUP}, threadgroup_position_in_grid.z, int(thread_index_in_simdgroup));
""",
    )
    numbers = {"K": layout.width, "N": layout.hidden, "E": layout.num_experts}
    return _launcher(function, dtype, operands, numbers)


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
    layout = weights.layout
    tokens, top_k = indices.shape
    shape = (tokens, layout.hidden)
    if not tokens:
        return mx.zeros(shape, inner.dtype)
    inputs = [inner, unsigned(indices), route_weights, *arrays_of(weights.down)]
    shared_layout = None
    if shared is not None:
        shared_layout = shared.expert.layout
        inputs += [shared.inner, *arrays_of(shared.expert.down)]
        if shared.logits is not None:
            inputs.append(shared.logits)
    if identity is not None:
        inputs.append(identity)
    launcher = _down_combine(
        layout,
        shared_layout,
        top_k,
        inner.dtype,
        route_weights.dtype,
        combine_dtype or route_weights.dtype,
        identity is not None,
        scale,
    )
    tasks = top_k + (0 if shared_layout is None else _shared_tasks(shared_layout))
    (out,) = launcher(
        inputs, (_cover(layout.hidden, _ROWS), tokens), _simdgroups(tasks), [(shape, inner.dtype)]
    )
    return out


@lru_cache(maxsize=256)
def _down_combine(
    layout: ExpertLayout,
    shared: SharedLayout | None,
    top_k: int,
    dtype: mx.Dtype,
    weights: mx.Dtype,
    combine: mx.Dtype,
    identity: bool,
    scale: float,
) -> _Launcher:
    operands = _Operands(down=layout.down)
    names = ["inner", "indices", "weights", *operands.names]
    numbers = {"K": layout.width, "N": layout.hidden, "E": layout.num_experts, "TOP_K": top_k}
    tasks, shared_text = 0, "moefast::NoSharedDown{}"
    if shared is not None:
        tasks = _shared_tasks(shared)
        more = _Operands(shared=shared.layout.down)
        operands.template.extend(more.template)
        logits = "moefast::None{}" if shared.output_gate is None else "shared_logits"
        names += ["shared_inner", *more.names, *(["shared_logits"] if shared.output_gate else [])]
        numbers["SHARED_K"] = shared.layout.width
        numbers["SHARED_TASKS"] = tasks
        shared_text = (
            f"moefast::shared_down<SHARED_FAST, SHARED_K, SHARED_TASKS>("
            f"shared_inner, {more.stacks['shared']}, {logits})"
        )
    if identity:
        names.append("x")
    function = Function(
        name="down_combine",
        file="down.metal",
        inputs=tuple(names),
        outputs=("out",),
        body=f"""
  threadgroup T slots[(TOP_K + 1) * ROWS];
  moefast::down_combine<C, A, I, ROWS, SIMDGROUPS, K, N, E, TOP_K, DOWN_FAST>(
      inner, indices, weights, {operands.stacks["down"]},
      {shared_text}, {"x" if identity else "moefast::None{}"}, {literal(scale)}, out, slots,
      int(threadgroup_position_in_grid.y), threadgroup_position_in_grid.z,
      int(simdgroup_index_in_threadgroup), int(thread_index_in_simdgroup));
""",
    )
    launcher = _launcher(function, dtype, operands, numbers, _simdgroups(top_k + tasks))
    types = {"C": combine, "A": _promoted(dtype, combine), "I": _promoted(dtype, weights)}
    return launcher._replace(template=(*types.items(), *launcher.template))


def _shared_tasks(shared: SharedLayout) -> int:
    """Among how many simdgroups the shared expert's rows of a threadgroup are split."""
    return 1


def _simdgroups(tasks: int) -> int:
    """Of a threadgroup that has so many: not more than 1024 threads."""
    return min(tasks, 32)


def _promoted(a: mx.Dtype, b: mx.Dtype) -> mx.Dtype:
    return a if a == b else mx.float32  # of two float dtypes


# The simdgroup's number among those of its route.
_GROUP = "int(threadgroup_position_in_grid.y * SIMDGROUPS + simdgroup_index_in_threadgroup)"


class _Operands:
    """Projections as a kernel sees them, by prefix; those that are None it does not have.

    Attributes:
        names: of their buffers.
        stacks: Metal text of each.
        template: their template arguments; also ``<PREFIX>_FAST``.
    """

    def __init__(self, **layouts: Layout | None):
        self.names: list[str] = []
        self.stacks: dict[str, str] = {}
        self.template: list[tuple[str, int | bool]] = []
        for prefix, layout in layouts.items():
            self.template.append((f"{prefix.upper()}_FAST", layout is not None and _is_fast(layout)))
            self.stacks[prefix] = "moefast::None{}"
            if layout is not None:
                operand = operand_of(prefix, layout)
                self.names += operand.names
                self.template += operand.template
                self.stacks[prefix] = _stack(prefix, operand)


def _launcher(
    function: Function,
    dtype: mx.Dtype,
    operands: _Operands,
    numbers: dict[str, int],
    simdgroups: int = _SIMDGROUPS,
) -> _Launcher:
    more = {"ROWS": _ROWS, "SIMDGROUPS": simdgroups}
    return _Launcher(function, (("T", dtype), *numbers.items(), *more.items(), *operands.template))


def _first(weights: ExpertWeights | SharedExpert) -> list[mx.array]:
    """The arrays of gate and up."""
    gate = () if weights.gate is None else arrays_of(weights.gate)
    return [*gate, *arrays_of(weights.up)]


def unsigned(indices: mx.array) -> mx.array:
    """Indices as the kernels take them; what is no index of an expert still is none."""
    if indices.dtype == mx.uint32:
        return indices
    if indices.dtype.size == 8:  # the upper half must not be lost
        indices = mx.where((indices < 0) | (indices > 0xFFFFFFFF), 0xFFFFFFFF, indices)
    return indices.astype(mx.uint32)


def _is_fast(layout: Layout) -> bool:
    """Whether MLX 0.32.4 takes the mat-vec kernel with longer chunks.

    K must be a number of its blocks (``qmv_fast_k_alignment`` of MLX's ``quantized.cpp``) and, in a stack, N
    one of its threadgroups' 8 rows; of a single matrix that kernel also takes others.
    """
    if layout.quant is None:
        return False
    bits = layout.quant.bits
    pack = 8 if bits in (3, 5) else 4 if bits == 6 else 32 // bits
    block = pack * (1 if bits == 2 else 2) * _LANES
    return layout.in_dims % block == 0 and (layout.num_experts == 0 or layout.out_dims % 8 == 0)


def _stack(prefix: str, operand: Operand) -> str:
    """Metal text of a projection's buffers."""
    parts = (f"{prefix}_{part}" for part in ("weight", "scales", "biases", "bias", "global_scale"))
    buffers = ", ".join(part if part in operand.names else "moefast::None{}" for part in parts)
    template = ", ".join(name for name, _ in operand.template)
    return f"moefast::stack_of<{template}>({buffers})"


def _cover(size: int, tile: int) -> int:
    return (size + tile - 1) // tile
