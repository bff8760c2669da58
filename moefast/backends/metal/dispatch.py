"""Which kernels run how many tokens: the one table of thresholds, by generation of the GPU.

No figure here is our own measurement on an Apple GPU; each says where it comes from. ``moefast tune``
measures them on the machine it runs on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Literal, NamedTuple

import mlx.core as mx

from ... import tuning
from .launch import emulated

# decode: a route for a simdgroup, each reads its expert's weights. band: an expert's weights are read once
# for several of its routes. tiles: routes sorted by expert, matrix tiles. by_mlx: MLX's own grouped products
# over our plan.
Kernels = Literal["decode", "band", "tiles", "by_mlx"]

# Beyond, the plan pays for itself: the band's kernels look through all routes of the call for those of an
# expert. More experts a token than any model has are left to tiles.
_MOST_BAND_TOKENS = 127
_MOST_BAND_CHOSEN = 64


class Thresholds(NamedTuple):
    """From where on a device is given which kernels.

    Attributes:
        band: tokens. Two tokens of 128 experts, 8 each, share an expert in four of ten cases; mat-vec of one
            row reaches 258-387 GB/s where the same machine reads 542 with four rows (M3 Ultra, reported for
            MLX's kernels).
        tiles: routes an expert has on average. Tiles lose 2 to 2.7 times to mat-vec at 64-900 routes, 7 an
            expert at most (reported for MLX's kernels on M1 to M4), and gain from 32 an expert on.
        by_mlx: routes an expert has on average from which MLX's kernels take over, because they use matrix
            units that ours do not; None where there are none.
        merged: whether a shared expert's first half shares decode's first launch with the routed experts,
            instead of running beside it. Nobody has measured which is faster.
        rows: output rows of a simdgroup in decode. Fewer keep more simdgroups busy where a layer is narrow
            for its GPU, and read x more often; one was reported faster on some machines and slower on others.
            Bits do not depend on it.
    """

    band: int
    tiles: int
    by_mlx: int | None
    merged: bool = False
    rows: int = 4


# By the first generation they hold for, latest first.
_TABLE: dict[int, Thresholds] = {
    17: Thresholds(band=2, tiles=16, by_mlx=32),  # M5: the first with matrix units (NAX) that MLX uses
    0: Thresholds(band=2, tiles=16, by_mlx=None),
}


@cache
def _generation() -> int:
    """17 for ``applegpu_g17s``; 0 where there is no such GPU."""
    found = re.search(r"applegpu_g(\d+)", str(mx.device_info().get("architecture", "")))
    return int(found[1]) if found else 0


def thresholds(generation: int | None = None) -> Thresholds:
    """Of a generation; by default of this device: as ``moefast tune`` measured them on it, or else those of
    its generation. The emulator has those of the first."""
    tried = _tried.get()
    if tried is not None:
        return tried
    if generation is None:
        found = None if emulated() else _tuned()
        if found is not None:
            return found
        generation = 0 if emulated() else _generation()
    return next(row for first, row in _TABLE.items() if generation >= first)


@contextmanager
def trying(limits: Thresholds) -> Iterator[None]:
    """Within the block kernels are chosen by these: for who measures them. What was bound before keeps the
    choices that are made once; see :meth:`moefast.registry.Registry.forget`."""
    token = _tried.set(limits)
    try:
        yield
    finally:
        _tried.reset(token)


_tried: ContextVar[Thresholds | None] = ContextVar("moefast_metal_thresholds", default=None)


def _tuned() -> Thresholds | None:
    found = tuning.stored().get("metal_thresholds")
    return None if found is None else Thresholds(**found)


def kernels_for(tokens: int, top_k: int, num_experts: int, generation: int | None = None) -> Kernels:
    """What a call of so many tokens runs."""
    limits = thresholds(generation)
    if tokens < limits.band:
        return "decode"
    each = tokens * top_k // num_experts
    if tokens <= _MOST_BAND_TOKENS and top_k <= _MOST_BAND_CHOSEN and each < limits.tiles:
        return "band"
    return "by_mlx" if limits.by_mlx is not None and each >= limits.by_mlx else "tiles"
