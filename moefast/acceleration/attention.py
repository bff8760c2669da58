"""Attention of mlx-lm's models, on the native backend: theirs but for one function that it calls.

mlx-lm's attention layers differ in everything but the product itself, for which nearly all call
``scaled_dot_product_attention`` of ``mlx_lm.models.base``, a global of their module. An accelerated layer
runs the very same code with :func:`moefast.ops.attention` under that name. On a CPU MLX's own takes tens of
times as long.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import mlx.core as mx
import mlx.nn

from .. import ops
from ..registry import log
from ..weights import FLOATS
from .known import why_changed
from .swap import runs_original

_NAME = "scaled_dot_product_attention"


def attention_class(layer: mlx.nn.Module) -> type | None:
    """What goes before the class of ``layer``, or None where it does not call mlx-lm's function itself, or
    that is not the one that was read."""
    base = sys.modules.get("mlx_lm.models.base")
    forward = type(layer).__call__
    if base is None or not isinstance(forward, FunctionType) or _NAME not in forward.__code__.co_names:
        return None
    theirs = getattr(base, _NAME)
    if forward.__globals__.get(_NAME) is not theirs or why_changed([f"base.{_NAME}"]) is not None:
        return None
    return _ahead(forward, theirs)


class _Globals(dict[str, Any]):
    """A module's globals but for some names; those that change later are seen."""

    def __init__(self, others: dict[str, Any], **own: Any):
        # Python looks for these without asking __missing__, for an import within the function.
        asked = ("__builtins__", "__name__", "__package__", "__spec__")
        super().__init__(own, **{name: others[name] for name in asked if name in others})
        self._others = others

    def __missing__(self, name: str) -> Any:
        return self._others[name]


@cache
def _ahead(forward: FunctionType, theirs: Callable[..., mx.array]) -> type:
    """A class whose ``__call__`` is ``forward`` with another attention; in training it is ``forward``."""

    def attention(
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        cache: Any,
        scale: float,
        mask: Any,
        sinks: mx.array | None = None,
    ) -> mx.array:
        now: Callable[..., mx.array] = forward.__globals__[_NAME]
        if now is not theirs:  # someone has put another in its place since
            return now(queries, keys, values, cache, scale, mask, sinks)
        causal = isinstance(mask, str) and mask == "causal"
        plain = (mask is None or causal) and sinks is None and not hasattr(cache, "bits")
        if not plain or not isinstance(scale, float | int) or not _takes(queries, keys, values, causal):
            return theirs(queries, keys, values, cache, scale, mask, sinks)
        batch, heads, length, _ = queries.shape
        try:
            y = ops.attention(queries, keys, values, scale=scale, causal=causal)
        except ValueError as error:  # from the description of the call, before anything runs
            log.info("attention: the original, %s", error)
            return theirs(queries, keys, values, cache, scale, mask, sinks)
        return y.reshape(batch, length, heads, -1).transpose(0, 2, 1, 3)

    names = _Globals(forward.__globals__, **{_NAME: attention})
    accelerated = FunctionType(
        forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__
    )
    accelerated.__kwdefaults__ = forward.__kwdefaults__

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        x = arguments[0] if arguments else None
        original = runs_original(self, x.shape) if isinstance(x, mx.array) else self.training
        return (forward if original else accelerated)(self, *arguments, **options)

    members = {"__call__": call, "_moefast_made_by": (_ahead, (forward, theirs))}
    return type("AcceleratedAttention", (), members)


def _takes(queries: mx.array, keys: mx.array, values: mx.array, causal: bool) -> bool:
    """Whether :func:`moefast.ops.attention` is defined for these."""
    shapes = queries.shape, keys.shape, values.shape
    if any(len(shape) != 4 for shape in shapes) or queries.dtype not in FLOATS:
        return False
    (batch, heads, length, dims), (kv_batch, kv_heads, count, kv_dims), values_shape = shapes
    return (
        queries.dtype == keys.dtype == values.dtype
        and (kv_batch, kv_dims, values_shape[:3]) == (batch, dims, shapes[1][:3])
        and heads % kv_heads == 0
        and count >= (length if causal else 1)
    )
