"""Stacks of weights must lie row by row: of any others MLX would make a copy at each launch, silently."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import mlx.core as mx

from ...registry import Declined

# Arrays that have been looked at, by address. An entry goes when its array does, before the address can be
# another's: being in here is enough.
_known: dict[int, weakref.ref[mx.array]] = {}


def check_contiguous(arrays: Sequence[mx.array]) -> None:
    """Raise :class:`Declined` if one of these weights is not row-contiguous.

    An array is evaluated and looked at once. Where that is impossible, because it is traced, it passes.
    """
    for array in arrays:
        if id(array) not in _known:
            _look_at(array)


def _look_at(array: mx.array) -> None:
    try:
        mx.eval(array)
        lies_in_rows = memoryview(array).c_contiguous  # type: ignore[arg-type]
    except (RuntimeError, ValueError) as error:
        if "transformation" not in str(error):
            raise
        return
    if not lies_in_rows:
        shape = tuple(array.shape)
        raise Declined(f"a weight {shape} does not lie row by row in memory, and weights are never copied")
    address = id(array)
    _known[address] = weakref.ref(array, lambda _: _known.pop(address, None))
