"""Weights as the kernels take them: names of buffers, and what is fixed when a kernel is compiled."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from ...weights import Layout, Projection

# As kernels/common.h numbers them.
MODES = {"plain": 0, "affine": 1, "mxfp4": 2, "mxfp8": 3, "nvfp4": 4}


class Operand(NamedTuple):
    """One projection's buffers and template arguments.

    Attributes:
        names: of the buffers: ``<prefix>_weight``, and where the layout has them ``_scales``, ``_biases``,
            ``_bias``, ``_global_scale``.
        template: ``<PREFIX>_MODE``, ``_BITS``, ``_GROUP`` (0 where unquantized).
    """

    names: tuple[str, ...]
    template: tuple[tuple[str, int], ...]


_PARTS = ("weight", "scales", "biases", "bias", "global_scale")


def operand_of(prefix: str, layout: Layout) -> Operand:
    """How kernels see a projection of this layout."""
    quant = layout.quant
    present = (
        True,
        quant is not None,
        quant is not None and quant.mode == "affine",
        layout.bias is not None,
        layout.global_scale,
    )
    names = tuple(f"{prefix}_{part}" for part, there in zip(_PARTS, present, strict=True) if there)
    mode, bits, group = ("plain", 0, 0) if quant is None else (quant.mode, quant.bits, quant.group_size)
    numbers = {"MODE": MODES[mode], "BITS": bits, "GROUP": group}
    return Operand(names, tuple((f"{prefix.upper()}_{name}", value) for name, value in numbers.items()))


def arrays_of(projection: Projection | None) -> tuple[mx.array, ...]:
    """The arrays of a projection that are there, in the order of :class:`Operand`'s names; none of None."""
    return () if projection is None else tuple(array for array in projection.arrays if array is not None)
