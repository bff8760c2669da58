"""The plan of a large step: routes sorted by expert and cut into tiles that never straddle experts."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx

from .launch import Function

MAX_EXPERTS = 1024

# Up to so many routes one threadgroup makes the plan: what it takes longer is less than a second launch.
_ONE_GROUP = 4096
# Beyond, a threadgroup has at least so many routes, and there are at most so many threadgroups: each reads
# what all have counted. None may have more than 65535, which its counters hold.
_ROUTES_EACH = 1024
_MOST_GROUPS = 64
_MOST_ROUTES_EACH = 1 << 15

_THREAD = "thread_index_in_threadgroup, simdgroup_index_in_threadgroup, thread_index_in_simdgroup"
_GROUP = "threadgroup_position_in_grid.x, threadgroups_per_grid.x"
_MEMORY = "threadgroup moefast::PlanMemory<EXPERTS, SIMDGROUPS> memory;"

_PLAN = Function(
    name="plan",
    file="plan.metal",
    inputs=("indices",),
    outputs=("order", "offsets", "tiles"),
    body=f"""{_MEMORY}
moefast::plan<EXPERTS, SIMDGROUPS, HEIGHT>(
    indices, indices_shape[0], order, offsets, tiles, memory, {{0, 1, {_THREAD}}});""",
)
_COUNT = Function(
    name="plan_count",
    file="plan.metal",
    inputs=("indices",),
    outputs=("counts",),
    body=f"""{_MEMORY}
moefast::plan_count(
    indices, indices_shape[0], counts, memory, {{{_GROUP}, {_THREAD}}});""",
)
_PLACE = Function(
    name="plan_place",
    file="plan.metal",
    inputs=("indices", "counts"),
    outputs=("order", "offsets", "tiles"),
    body=f"""{_MEMORY}
moefast::plan_place<EXPERTS, SIMDGROUPS, HEIGHT>(
    indices, indices_shape[0], counts, order, offsets, tiles, memory, {{{_GROUP}, {_THREAD}}});""",
)


class Plan(NamedTuple):
    """Routes by expert. ``E`` stands for every expert that does not exist: their routes come last.

    Attributes:
        order: ``[routes]`` uint32: the routes by expert, an expert's in their own order.
        offsets: ``[E + 2]`` uint32: the routes of expert e are ``order[offsets[e] : offsets[e + 1]]``.
        tiles: ``[n, 3]`` uint32: expert, first place in ``order``, rows (up to ``height``; 0 in the tiles
            that are not needed, which come last).
        height: rows of a full tile.
    """

    order: mx.array
    offsets: mx.array
    tiles: mx.array
    height: int


class Geometry(NamedTuple):
    """What a plan is made with.

    Attributes:
        simdgroups: of a threadgroup.
        groups: threadgroups; with more than one there are two launches.
        tiles: as many as there can be.
        template: of the launch that places; the one that counts has no HEIGHT.
    """

    simdgroups: int
    groups: int
    tiles: int
    template: tuple[tuple[str, int], ...]


@lru_cache(maxsize=1024)
def geometry(routes: int, num_experts: int, height: int) -> Geometry:
    """How a plan of so many routes is launched."""
    simdgroups = 16  # 512 threads: a GPU may refuse more of a kernel with so many registers
    while simdgroups * (num_experts + 1) > 9216:  # 18 KB of counters
        simdgroups //= 2
    each = min(max(-(-routes // _MOST_GROUPS), _ROUTES_EACH), _MOST_ROUTES_EACH)
    groups = 1 if routes <= _ONE_GROUP else -(-routes // each)
    template = (("EXPERTS", num_experts), ("SIMDGROUPS", simdgroups), ("HEIGHT", height))
    return Geometry(simdgroups, groups, routes // height + min(num_experts + 1, routes), template)


def flat_indices(indices: mx.array, num_experts: int) -> mx.array:
    """Experts ``[...]`` of any integer dtype as ``[routes]`` uint32; those that do not exist stay so."""
    if indices.dtype in (mx.int64, mx.uint64):  # a cast would wrap them into the range
        exists = (indices >= 0) & (indices < num_experts)
        indices = mx.where(exists, indices, num_experts)
    flat = indices if indices.ndim == 1 else indices.reshape(-1)
    return flat if flat.dtype == mx.uint32 else flat.astype(mx.uint32)


def plan(indices: mx.array, num_experts: int, height: int) -> Plan:
    """Sort routes by expert, in at most two launches.

    Args:
        indices: the routes' experts, any shape and integer dtype; out of ``0..num_experts - 1`` they do not
            exist.
        num_experts: 1 to 1024.
        height: rows of a tile.
    """
    flat = flat_indices(indices, num_experts)
    routes = flat.size
    how = geometry(routes, num_experts, height)
    outputs = [((routes,), mx.uint32), ((num_experts + 2,), mx.uint32), ((how.tiles, 3), mx.uint32)]
    if routes == 0:
        order, offsets, tiles = (mx.zeros(*output) for output in outputs)
        return Plan(order, offsets, tiles, height)
    group = (32 * how.simdgroups, 1, 1)
    if how.groups == 1:
        made = _PLAN([flat], template=how.template, grid=group, threadgroup=group, outputs=outputs)
    else:
        grid = (group[0] * how.groups, 1, 1)
        counts = ((how.groups, num_experts + 1), mx.uint32)
        counted = _COUNT([flat], template=how.template[:2], grid=grid, threadgroup=group, outputs=[counts])
        made = _PLACE([flat, *counted], template=how.template, grid=grid, threadgroup=group, outputs=outputs)
    order, offsets, tiles = made
    return Plan(order, offsets, tiles, height)
