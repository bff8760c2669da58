"""Experts of 2 to 128 tokens: an expert's weights are read once for up to 8 of its routes.

Each route gives the bits that ``decode`` gives it, whatever else is in the call. What cannot run
``decode.why_not`` says. Arrays are flat: x ``[tokens, hidden]``, indices ``[tokens, top_k]``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx

from ...errors import refuse
from ...weights import ExpertLayout, ExpertWeights
from .activations import functor
from .combine import combine
from .decode import _first, _Operands, unsigned
from .launch import Function
from .operands import arrays_of

# kernels/band.h: a threadgroup keeps a list of up to so many routes.
MAX_TOKENS = 128
MAX_TOP_K = 64

_LANES = 32
# Routes that share what is read of the weights: more would take more registers than there are for a thread.
_TALLEST = 8
# Products of a route that a simdgroup has at a time: with 8 routes 32 sums, and of 4-bit weights 64 values
# in registers.
_PRODUCTS = 4
# Threadgroups share the reading of indices: 4 KB for 127 tokens of 8 routes, when the weights that one reads
# for 2048 columns are 18 KB.
_SIMDGROUPS = 4


class _Shape(NamedTuple):
    """What a kernel is compiled for, beside the experts."""

    height: int
    top_k: int
    dtype: mx.Dtype


class _Kernel(NamedTuple):
    function: Function
    template: tuple[tuple[str, int | bool | mx.Dtype], ...]
    rows: int

    def __call__(self, inputs: list[mx.array], num_experts: int, out_dims: int) -> mx.array:
        """inputs: first x or inner, then indices."""
        indices = inputs[1]
        each = self.rows * _SIMDGROUPS
        slots = indices.size if indices.size <= num_experts else num_experts + 1
        (out,) = self.function(
            inputs,
            template=self.template,
            grid=(_LANES, -(-out_dims // each) * _SIMDGROUPS, slots),
            threadgroup=(_LANES, _SIMDGROUPS, 1),
            outputs=[((*indices.shape, out_dims), inputs[0].dtype)],
        )
        return out


def gate_up(x: mx.array, weights: ExpertWeights, indices: mx.array) -> mx.array:
    """The inner activations of every route, ``activation(gate(x), up(x))``, in one launch.

    Args:
        x: ``[tokens, hidden]``.
        weights: the experts; their ``down`` is not used.
        indices: ``[tokens, top_k]``, any integers.

    Returns:
        ``[tokens, top_k, width]`` of x's dtype; anything where an expert does not exist.

    Raises:
        ValueError: more tokens than ``MAX_TOKENS``, or a larger top_k than ``MAX_TOP_K``.
    """
    layout = weights.layout
    _check(indices)
    if not indices.size:
        return mx.zeros((*indices.shape, layout.width), x.dtype)
    kernel = _gate_up(layout, _shape(indices, x.dtype))
    return kernel([x, unsigned(indices), *_first(weights)], layout.num_experts, layout.width)


@lru_cache(maxsize=256)
def _gate_up(layout: ExpertLayout, shape: _Shape) -> _Kernel:
    operands = _Operands(gate=layout.gate, up=layout.up)
    function = Function(
        name="band_gate_up",
        file="band.metal",
        inputs=("x", "indices", *operands.names),
        outputs=("inner",),
        body=f"""
  threadgroup moefast::BandMemory<TOP_K, SIMDGROUPS> memory;
  moefast::band_gate_up<HEIGHT, ROWS, K, N, E, GATE_FAST, UP_FAST>(
      x, indices, uint(indices_shape[0]) * TOP_K, {operands.stacks["gate"]}, {operands.stacks["up"]},
      {functor(layout.activation)}, inner, memory, {_PLACE});
""",
    )
    rows = _PRODUCTS if layout.gate is None else _PRODUCTS // 2
    return _kernel(function, layout, shape, rows, {"K": layout.hidden, "N": layout.width}, operands)


def down(inner: mx.array, weights: ExpertWeights, indices: mx.array) -> mx.array:
    """Every route's output, in one launch.

    Args:
        inner: ``[tokens, top_k, width]``.
        weights: the experts; only their ``down`` is used.
        indices: ``[tokens, top_k]``, any integers; an expert that does not exist gives 0.

    Returns:
        ``[tokens, top_k, hidden]`` of inner's dtype.

    Raises:
        ValueError: see :func:`gate_up`.
    """
    layout = weights.layout
    _check(indices)
    if not indices.size:
        return mx.zeros((*indices.shape, layout.hidden), inner.dtype)
    kernel = _down(layout, _shape(indices, inner.dtype))
    return kernel([inner, unsigned(indices), *arrays_of(weights.down)], layout.num_experts, layout.hidden)


@lru_cache(maxsize=256)
def _down(layout: ExpertLayout, shape: _Shape) -> _Kernel:
    operands = _Operands(down=layout.down)
    function = Function(
        name="band_down",
        file="band.metal",
        inputs=("inner", "indices", *operands.names),
        outputs=("out",),
        body=f"""
  threadgroup moefast::BandMemory<TOP_K, SIMDGROUPS> memory;
  moefast::band_down<HEIGHT, ROWS, K, N, E, DOWN_FAST>(
      inner, indices, uint(indices_shape[0]) * TOP_K, {operands.stacks["down"]}, out, memory, {_PLACE});
""",
    )
    return _kernel(function, layout, shape, _PRODUCTS, {"K": layout.width, "N": layout.hidden}, operands)


_PLACE = """threadgroup_position_in_grid.y, threadgroup_position_in_grid.z,
      {simdgroup_index_in_threadgroup, thread_index_in_simdgroup}"""


def _kernel(
    function: Function,
    layout: ExpertLayout,
    shape: _Shape,
    rows: int,
    dims: dict[str, int],
    operands: _Operands,
) -> _Kernel:
    numbers = {
        **dims,
        "E": layout.num_experts,
        "TOP_K": shape.top_k,
        "HEIGHT": shape.height,
        "ROWS": rows,
        "SIMDGROUPS": _SIMDGROUPS,
    }
    return _Kernel(function, (("T", shape.dtype), *numbers.items(), *operands.template), rows)


def _shape(indices: mx.array, dtype: mx.Dtype) -> _Shape:
    """A token's experts are distinct: none has more routes than there are tokens. Where they are not, weights
    are read more often."""
    tokens, top_k = indices.shape
    height = 2
    while height < min(tokens, _TALLEST):
        height *= 2
    return _Shape(height, top_k, dtype)


def _check(indices: mx.array) -> None:
    tokens, top_k = indices.shape
    if tokens > MAX_TOKENS or top_k > MAX_TOP_K:
        rule = f"at most {MAX_TOKENS} tokens of {MAX_TOP_K} experts each"
        refuse("metal band", rule, tuple(indices.shape))


def switch_glu(x: mx.array, weights: ExpertWeights, indices: mx.array) -> mx.array:
    """Every route's expert output, uncombined, in two launches.

    Args:
        x: ``[tokens, hidden]``.
        weights: stacks of E experts.
        indices: ``[tokens, top_k]``, any integers; a route out of ``0..E-1`` gives 0.

    Returns:
        ``[tokens, top_k, hidden]`` in x's dtype.

    Raises:
        ValueError: see :func:`gate_up`.
    """
    indices = unsigned(indices)
    return down(gate_up(x, weights, indices), weights, indices)


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
) -> mx.array:
    """The weighted sum of each token's experts, and what a block adds to it, in three launches.

    Args:
        x, weights, indices: see :func:`switch_glu`.
        route_weights: ``[tokens, top_k]`` in any float dtype.
        identity: experts beyond the stack return their input; otherwise they contribute nothing.
        combine_dtype, scale, shared, shared_gate: see :func:`.combine.combine`.

    Returns:
        ``[tokens, hidden]`` in x's dtype.

    Raises:
        ValueError: see :func:`gate_up`.
    """
    indices = unsigned(indices)
    return combine(
        switch_glu(x, weights, indices),
        route_weights,
        combine_dtype,
        identity=(x, indices, weights.layout.num_experts) if identity else None,
        scale=scale,
        shared=shared,
        shared_gate=shared_gate,
    )
