"""Weights in huge pages of memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import mlx.nn
from mlx.utils import tree_flatten

from .backends.native.loading import bindings
from .env import settings
from .errors import refuse
from .registry import device_name

__all__ = ["huge_pages"]


def huge_pages(weights: mlx.nn.Module | Iterable[mx.array]) -> int:
    """Ask the system to move weights into huge pages (2 MB instead of 4 KB), where they lie.

    Decoding on a CPU reads every weight as fast as memory delivers, and looks up each page first
    (docs/notes/native-on-cpu.md: what that costs). Addresses and values stay as they are. The move takes half
    a second to two per GB, and nothing where it has been done before. :func:`moefast.load` does it; for a
    model that mlx-lm loaded, call this.

    Args:
        weights: a model, or arrays of any shape and dtype; those not evaluated yet are left as they are.

    Returns:
        How many bytes are in huge pages now; 0 where the system has no such request (Linux before 6.1,
        macOS), on a GPU, without ``moefast._native``, and with ``MOEFAST_HUGE_PAGES=0``.

    Raises:
        ValueError: something else than a model or arrays.
    """
    if isinstance(weights, mlx.nn.Module):
        flat: Any = tree_flatten(weights.parameters())
        arrays = [array for _, array in flat]
    else:
        arrays = list(weights)
    for array in arrays:
        if not isinstance(array, mx.array):
            refuse("huge_pages", "weights must be an mlx.nn.Module or arrays", type(array).__name__)
    native = bindings().native
    if native is None or device_name() != "cpu" or not settings.huge_pages:
        return 0
    moved: int = native.huge_pages(arrays)
    return moved
