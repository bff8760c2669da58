"""Experts of 2 to 128 tokens: an expert's weights are read once for up to 8 of its routes.

Each route gives the bits that ``decode`` gives it, whatever else is in the call. What cannot run
``decode.why_not`` says. Arrays are flat: x ``[tokens, hidden]``, indices ``[tokens, top_k]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import mlx.core as mx

from ...errors import refuse
from ...weights import ExpertLayout, ExpertWeights
from .activations import functor
from .combine import combine
from .launch import Function
from .matvec import LANE, ROUTE, ROWS, Fidelity, Launcher, Operands, cover, launcher, reader, unsigned

# kernels/band.h: a threadgroup keeps a list of up to so many routes.
MAX_TOKENS = 128
MAX_TOP_K = 64

# Routes that share what is read of the weights. With ROWS products of each a simdgroup has 32 sums, and of
# 4-bit weights 64 values, in 32 registers: twice as much of either is more than a thread has.
_TALLEST = 8
# Threadgroups read all indices, simdgroups a part each: 4 KB for 127 tokens of 8 routes, when 16 rows of
# weights of 2048 columns and 4 bits are 18 KB.
_SIMDGROUPS = 4

_MEMORY = "threadgroup moefast::BandMemory<TOP_K, SIMDGROUPS> memory;"
_ROUTES = "uint(indices_shape[0]) * TOP_K"
_PLACE = f"threadgroup_position_in_grid.y, {ROUTE}, {{simdgroup_index_in_threadgroup, uint({LANE})}}"


def gate_up(x: mx.array, weights: ExpertWeights, indices: mx.array, fidelity: Fidelity = "exact") -> mx.array:
    """The inner activations of every route, ``activation(gate(x), up(x))``, in one launch.

    Args:
        x: ``[tokens, hidden]``.
        weights: the experts; their ``down`` is not used.
        indices: ``[tokens, top_k]``, any integers.
        fidelity: see :class:`.matvec.Variant`; here and in the other functions.

    Returns:
        ``[tokens, top_k, width]`` of x's dtype; anything where an expert does not exist.

    Raises:
        ValueError: more tokens than ``MAX_TOKENS``, or a larger top_k than ``MAX_TOP_K``.
    """
    return _launch(_gate_up, x, weights, indices, fidelity)


Read = Callable[[Any], Sequence[mx.array]]
Bound = tuple[Launcher, Read, int]


@lru_cache(maxsize=256)
def _gate_up(layout: ExpertLayout, height: int, top_k: int, dtype: mx.Dtype, fidelity: Fidelity) -> Bound:
    layouts = {"gate": layout.gate, "up": layout.up}
    operands = Operands(fidelity, **layouts)
    rows = ROWS if layout.gate is None else ROWS // 2  # of each matrix
    function = Function(
        name="band_gate_up",
        file="band.metal",
        inputs=("x", "indices", *operands.names),
        outputs=("inner",),
        body=f"""
  {_MEMORY}
  moefast::band_gate_up<HEIGHT, {rows}, K, N, E, GATE_FAST, UP_FAST>(
      x, indices, {_ROUTES}, {operands.stacks["gate"]}, {operands.stacks["up"]},
      {functor(layout.activation)}, inner, memory, {_PLACE});
""",
    )
    numbers = {"K": layout.hidden, "N": layout.width, **_numbers(layout, height, top_k)}
    groups = cover(layout.width, rows * _SIMDGROUPS)
    launch = launcher(function, {"T": dtype}, numbers, [operands], groups, _SIMDGROUPS)
    return launch, reader(layouts), layout.width


def down(
    inner: mx.array, weights: ExpertWeights, indices: mx.array, fidelity: Fidelity = "exact"
) -> mx.array:
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
    return _launch(_down, inner, weights, indices, fidelity)


@lru_cache(maxsize=256)
def _down(layout: ExpertLayout, height: int, top_k: int, dtype: mx.Dtype, fidelity: Fidelity) -> Bound:
    layouts = {"down": layout.down}
    operands = Operands(fidelity, **layouts)
    function = Function(
        name="band_down",
        file="band.metal",
        inputs=("inner", "indices", *operands.names),
        outputs=("out",),
        body=f"""
  {_MEMORY}
  moefast::band_down<HEIGHT, ROWS, K, N, E, DOWN_FAST>(
      inner, indices, {_ROUTES}, {operands.stacks["down"]}, out, memory, {_PLACE});
""",
    )
    numbers = {"K": layout.width, "N": layout.hidden, **_numbers(layout, height, top_k)}
    groups = cover(layout.hidden, ROWS * _SIMDGROUPS)
    launch = launcher(function, {"T": dtype}, numbers, [operands], groups, _SIMDGROUPS)
    return launch, reader(layouts), layout.hidden


def _numbers(layout: ExpertLayout, height: int, top_k: int) -> dict[str, int]:
    return {"E": layout.num_experts, "TOP_K": top_k, "HEIGHT": height}


def _launch(
    bind: Callable[[ExpertLayout, int, int, mx.Dtype, Fidelity], Bound],
    x: mx.array,
    weights: ExpertWeights,
    indices: mx.array,
    fidelity: Fidelity,
) -> mx.array:
    tokens, top_k = indices.shape
    if tokens > MAX_TOKENS or top_k > MAX_TOP_K:
        refuse("metal band", f"takes {MAX_TOKENS} tokens of {MAX_TOP_K} experts", (tokens, top_k))
    layout, dtype = weights.layout, x.dtype
    launch, read, rows = bind(layout, _height(tokens), top_k, dtype, fidelity)
    shape = (tokens, top_k, rows)
    routes = tokens * top_k
    if not routes:
        return mx.zeros(shape, dtype)
    slots = routes if routes <= layout.num_experts else layout.num_experts + 1
    return launch([x, unsigned(indices), *read(weights)], slots, [(shape, dtype)])[0]


def _height(tokens: int) -> int:
    """Routes of a tile. A token's experts are distinct, so none has more routes than there are tokens; where
    they are not, weights are read more often."""
    return 2 if tokens <= 2 else 4 if tokens <= 4 else _TALLEST


def switch_glu(
    x: mx.array, weights: ExpertWeights, indices: mx.array, fidelity: Fidelity = "exact"
) -> mx.array:
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
    return down(gate_up(x, weights, indices, fidelity), weights, indices, fidelity)


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
    fidelity: Fidelity = "exact",
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
        switch_glu(x, weights, indices, fidelity),
        route_weights,
        combine_dtype,
        identity=(x, indices, weights.layout.num_experts) if identity else None,
        scale=scale,
        shared=shared,
        shared_gate=shared_gate,
    )
