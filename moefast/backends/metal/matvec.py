"""What the mat-vec kernels of kernels/dot.h are told of projections, and how they are laid out in threads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any, Literal, NamedTuple

import mlx.core as mx

from ...weights import Layout, Shape
from .launch import Function, Prepared
from .operands import Operand, operand_of

# The order in which products are added up: MLX's, or the one that reads least.
Fidelity = Literal["exact", "fast"]


# Output rows of a simdgroup. Four rows of two matrices are MLX's number of sums in registers, twice.
ROWS = 4


class Variant(NamedTuple):
    """How the kernels are made, where they can be made in several ways.

    Attributes:
        rows: output rows of a simdgroup, in decode: bits do not depend on it.
        fidelity: ``fast`` takes the longer chunks of :func:`is_fast` whatever K and N are: of 4-bit weights a
            lane reads 8 bytes at once, not 4, and half as many lanes ask for a group's scale and offset.
    """

    rows: int = ROWS
    fidelity: Fidelity = "exact"


EXACT = Variant()
# Of a threadgroup, where it is free.
SIMDGROUPS = 2

_LANES = 32

# The simdgroup's number among those of its route: Metal text.
GROUP = "int(threadgroup_position_in_grid.y * SIMDGROUPS + simdgroup_index_in_threadgroup)"
ROUTE = "threadgroup_position_in_grid.z"
LANE = "int(thread_index_in_simdgroup)"


def cover(size: int, tile: int) -> int:
    """How many tiles cover ``size``."""
    return (size + tile - 1) // tile


def unsigned(indices: mx.array) -> mx.array:
    """Indices as the kernels take them; what is no index of an expert still is none."""
    if indices.dtype == mx.uint32:
        return indices
    if indices.dtype.size == 8:  # the upper half must not be lost
        indices = mx.where((indices < 0) | (indices > 0xFFFFFFFF), 0xFFFFFFFF, indices)
    return indices.astype(mx.uint32)


def is_fast(layout: Layout) -> bool:
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


class Operands:
    """The projections of a kernel, by prefix; those that are None it does not have.

    Args:
        fidelity: whether chunks are as long as MLX's.

    Attributes:
        names: of their buffers.
        stacks: Metal text of each.
        template: their template arguments, with ``<PREFIX>_FAST``.
    """

    def __init__(self, fidelity: Fidelity, **layouts: Layout | None):
        self.names: list[str] = []
        self.stacks: dict[str, str] = {}
        self.template: list[tuple[str, int | bool]] = []
        for prefix, layout in layouts.items():
            fast = layout is not None and (fidelity == "fast" or is_fast(layout))
            self.template.append((f"{prefix.upper()}_FAST", fast))
            self.stacks[prefix] = "moefast::None{}"
            if layout is not None:
                operand = operand_of(prefix, layout)
                self.names += operand.names
                self.template += operand.template
                self.stacks[prefix] = _stack(prefix, operand)


def _stack(prefix: str, operand: Operand) -> str:
    parts = (f"{prefix}_{part}" for part in ("weight", "scales", "biases", "bias", "global_scale"))
    buffers = ", ".join(part if part in operand.names else "moefast::None{}" for part in parts)
    template = ", ".join(name for name, _ in operand.template)
    return f"moefast::stack_of<{template}>({buffers})"


def reader(layouts: Mapping[str, Layout | None]) -> Callable[[Any], Sequence[mx.array]]:
    """What reads the arrays of these attributes, in the order of :class:`Operands`' names."""
    names = [
        name.replace(f"{prefix}_", f"{prefix}.", 1)
        for prefix, layout in layouts.items()
        if layout is not None
        for name in operand_of(prefix, layout).names
    ]
    get: Callable[[Any], Any] = attrgetter(*names)
    return get if len(names) > 1 else lambda holder: (get(holder),)


class Launcher(NamedTuple):
    """A function with the template arguments of one kind of call.

    Attributes:
        threadgroups: along the rows.
    """

    function: Function
    template: tuple[tuple[str, int | bool | mx.Dtype], ...]
    threadgroups: int
    simdgroups: int

    def __call__(
        self, inputs: Sequence[mx.array], routes: int, outputs: Sequence[tuple[Shape, mx.Dtype]]
    ) -> list[mx.array]:
        """Launch it for so many routes (or tokens)."""
        return self.function(inputs, outputs=outputs, **self._geometry(routes))

    def prepare(self, routes: int, dtypes: Sequence[mx.Dtype]) -> Prepared:
        """A launch for so many routes (or tokens), again and again."""
        return self.function.prepare(dtypes=dtypes, **self._geometry(routes))

    def _geometry(self, routes: int) -> dict[str, Any]:
        return {
            "template": self.template,
            "grid": (_LANES, self.threadgroups * self.simdgroups, routes),
            "threadgroup": (_LANES, self.simdgroups, 1),
        }


def launcher(
    function: Function,
    types: Mapping[str, mx.Dtype],
    numbers: Mapping[str, int],
    operands: Sequence[Operands],
    threadgroups: int,
    simdgroups: int = SIMDGROUPS,
    rows: int = ROWS,
) -> Launcher:
    """A function with everything that is fixed when it is compiled."""
    template: list[tuple[str, int | bool | mx.Dtype]] = [*types.items(), *numbers.items()]
    template += [("ROWS", rows), ("SIMDGROUPS", simdgroups)]
    for operand in operands:
        template += operand.template
    return Launcher(function, tuple(template), threadgroups, simdgroups)
