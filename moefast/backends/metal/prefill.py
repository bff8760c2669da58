"""Experts of many tokens: routes sorted by expert, and two grouped products over tiles of them.

Nothing here looks at gradients or chooses between kernels. Arrays are flat: x ``[tokens, hidden]``, indices
``[tokens, top_k]``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx

from ...weights import ExpertLayout, ExpertWeights, Layout
from ..reference.activations import activate
from ..reference.matmul import gathered
from .activations import functor
from .combine import combine
from .launch import Function
from .operands import arrays_of, operand_of
from .plan import Plan, flat_indices, plan

_THREADS = 128
# kernels/tile.h: rows of weights of a tile, of one matrix or two.
_TILE_WIDTH = 64
_TALLEST = 64

_GROUP = "threadgroup_position_in_grid.xy"
_THREAD = "{thread_index_in_threadgroup, simdgroup_index_in_threadgroup, thread_index_in_simdgroup}"
_MEMORY = "threadgroup moefast::TileMemory<T, HEIGHT> memory;"


def height_of(routes: int, num_experts: int) -> int:
    """Rows of a tile, by the routes that an expert has on average.

    Tiles of 32 rows and 64 columns gain 13-22 % over 16 rows from 32 routes on, and lose 20-40 % up to 24
    (measured by others on M1 to M4, for tiles that multiply their empty rows, too). Ours leave those out, and
    read an expert's weights once where tiles of 16 rows would twice, so none is lower than 32. 64 rows halve
    what is dequantised; nobody has measured from where on they pay, but from 128 routes on at most a third
    of their rows are empty.
    """
    return 64 if routes // num_experts >= 128 else 32


class _Product(NamedTuple):
    """One of the two products, for weights of one layout.

    Attributes:
        function, template: of the kernel.
        projections: names of its weights, in the order of its inputs.
        columns: of the result.
        blocks: threadgroups to a tile.
    """

    function: Function
    template: tuple[tuple[str, int | mx.Dtype], ...]
    projections: tuple[str, ...]
    columns: int
    blocks: int

    def __call__(self, x: mx.array, weights: ExpertWeights, made: Plan) -> mx.array:
        inputs = [x, made.order, made.tiles]
        for name in self.projections:
            inputs += arrays_of(getattr(weights, name))
        (out,) = self.function(
            inputs,
            template=self.template,
            grid=(self.blocks * _THREADS, made.tiles.shape[0], 1),
            threadgroup=(_THREADS, 1, 1),
            outputs=[((made.order.size, self.columns), x.dtype)],
        )
        return out


@lru_cache(maxsize=256)
def _gate_up(layout: ExpertLayout, dtype: mx.Dtype, top_k: int, height: int) -> _Product:
    activation = functor(layout.activation)
    projections = {"up": layout.up} if layout.gate is None else {"gate": layout.gate, "up": layout.up}
    function = Function(
        name="grouped_gate_up",
        file="grouped_gemm.metal",
        inputs=("x", "order", "tiles", *_names(projections)),
        outputs=("inner",),
        body=f"""{_MEMORY}
moefast::grouped_gate_up<EXPERTS, TOP_K, HIDDEN, WIDTH>(
    {activation},
    {"moefast::None{}" if layout.gate is None else _stack("gate", layout.gate)},
    {_stack("up", layout.up)},
    x, order, tiles, inner, memory, {_GROUP}, {_THREAD});""",
    )
    template = (*_template(layout, dtype, height, projections), ("TOP_K", top_k))
    each = _TILE_WIDTH // len(projections)
    return _Product(function, template, tuple(projections), layout.width, -(-layout.width // each))


@lru_cache(maxsize=256)
def _down(layout: ExpertLayout, dtype: mx.Dtype, height: int) -> _Product:
    function = Function(
        name="grouped_down",
        file="grouped_gemm.metal",
        inputs=("inner", "order", "tiles", *_names({"down": layout.down})),
        outputs=("out",),
        body=f"""{_MEMORY}
moefast::grouped_down<EXPERTS, HIDDEN, WIDTH>(
    {_stack("down", layout.down)}, inner, order, tiles, out, memory, {_GROUP}, {_THREAD});""",
    )
    template = _template(layout, dtype, height, {"down": layout.down})
    return _Product(function, template, ("down",), layout.hidden, -(-layout.hidden // _TILE_WIDTH))


def _template(
    layout: ExpertLayout, dtype: mx.Dtype, height: int, projections: dict[str, Layout]
) -> tuple[tuple[str, int | mx.Dtype], ...]:
    return (
        ("T", dtype),
        ("HEIGHT", height),
        ("EXPERTS", layout.num_experts),
        ("HIDDEN", layout.hidden),
        ("WIDTH", layout.width),
        *(number for prefix, own in projections.items() for number in operand_of(prefix, own).template),
    )


def _names(projections: dict[str, Layout]) -> list[str]:
    return [name for prefix, layout in projections.items() for name in operand_of(prefix, layout).names]


def _stack(prefix: str, layout: Layout) -> str:
    """Metal text of a projection's stack."""
    names = operand_of(prefix, layout).names
    parts = [f"{prefix}_{part}" for part in ("weight", "scales", "biases", "bias", "global_scale")]
    given = ", ".join(part if part in names else "moefast::None{}" for part in parts)
    upper = prefix.upper()
    return f"moefast::stack_of<{upper}_MODE, {upper}_BITS, {upper}_GROUP>({given})"


def gate_up(x: mx.array, weights: ExpertWeights, made: Plan, top_k: int) -> mx.array:
    """``activation(gate(x), up(x))`` of every route, ``[routes, width]`` in the plan's order."""
    return _gate_up(weights.layout, x.dtype, top_k, made.height)(x, weights, made)


def down(inner: mx.array, weights: ExpertWeights, made: Plan) -> mx.array:
    """``down(inner)`` of every route, ``[routes, hidden]``, in the order of routes again."""
    return _down(weights.layout, inner.dtype, made.height)(inner, weights, made)


def switch_glu(
    x: mx.array, weights: ExpertWeights, indices: mx.array, *, height: int | None = None
) -> mx.array:
    """Every route's expert output, uncombined: 3 or 4 launches.

    Args:
        x: ``[tokens, hidden]``.
        weights: stacks of E experts; scales, biases and unquantized weights of x's dtype.
        indices: ``[tokens, top_k]``, any integers; a route out of ``0..E-1`` gives 0.
        height: rows of a tile, 32 or 64; by default as the number of routes suggests.

    Returns:
        ``[tokens, top_k, hidden]`` in x's dtype.
    """
    tokens, top_k = indices.shape
    layout = weights.layout
    if indices.size == 0:
        return mx.zeros((tokens, top_k, layout.hidden), x.dtype)
    made = plan(indices, layout.num_experts, height or height_of(indices.size, layout.num_experts))
    return down(gate_up(x, weights, made, top_k), weights, made).reshape(tokens, top_k, layout.hidden)


def experts(
    x: mx.array,
    weights: ExpertWeights,
    indices: mx.array,
    route_weights: mx.array,
    combine_dtype: mx.Dtype | None = None,
    *,
    identity: bool = False,
    scale: float = 1.0,
    shared: mx.array | None = None,
    shared_gate: mx.array | None = None,
    height: int | None = None,
) -> mx.array:
    """The weighted sum of each token's experts, and what a block adds to it: 4 or 5 launches.

    Args:
        x, weights, indices, height: see :func:`switch_glu`.
        route_weights: ``[tokens, top_k]`` in any float dtype.
        identity: experts beyond the stack return their input; otherwise they contribute nothing, as negative
            ones do in any case.
        combine_dtype, scale, shared, shared_gate: see :func:`.combine.combine`.

    Returns:
        ``[tokens, hidden]`` in x's dtype.
    """
    num_experts = weights.layout.num_experts
    return combine(
        switch_glu(x, weights, indices, height=height),
        route_weights,
        combine_dtype,
        identity=(x, indices, num_experts) if identity else None,
        scale=scale,
        shared=shared,
        shared_gate=shared_gate,
    )


def switch_glu_by_mlx(x: mx.array, weights: ExpertWeights, indices: mx.array) -> mx.array:
    """:func:`switch_glu` out of MLX's own grouped products, over the plan's order.

    For devices with matrix units that MLX's kernels use and those here do not. Rows of x are copied.
    """
    tokens, top_k = indices.shape
    layout = weights.layout
    if indices.size == 0:
        return mx.zeros((tokens, top_k, layout.hidden), x.dtype)
    flat = flat_indices(indices, layout.num_experts)
    order = plan(flat, layout.num_experts, _TALLEST).order
    places = mx.put_along_axis(mx.zeros_like(order), order, mx.arange(order.size, dtype=mx.uint32), axis=0)
    # Routes of experts that do not exist are the last: as the last expert's they leave the rest in order.
    chosen = mx.minimum(flat, layout.num_experts - 1)[order]
    rows = x[order // top_k][:, None, :]
    up = gathered(rows, weights.up, chosen, in_order=True)
    gate = None if weights.gate is None else gathered(rows, weights.gate, chosen, in_order=True)
    y = gathered(activate(weights.activation, gate, up), weights.down, chosen, in_order=True)
    y = mx.where((flat < layout.num_experts)[:, None], y.squeeze(-2)[places], mx.array(0, y.dtype))
    return y.reshape(tokens, top_k, layout.hidden)
