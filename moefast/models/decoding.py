"""One more token without the model's Python.

What a model's layers do with a token is the same for every token, but for the position. Yet Python, and
MLX after it, describe it anew each time, operation by operation, on cores that the kernels need
(docs/notes/native-on-cpu.md: what that costs). So two steps are watched, and where they were the same, the
native backend makes the following ones from what it saw, as one operation each.

It looks at the whole model again before every step: modules, their types and attributes, shapes and dtypes,
the default backend. If anything is not as it was, the step is made by Python, and watched. Arrays are taken
from the model as it is. What it cannot see are functions of modules that somebody replaces: who spies on
those sets ``MOEFAST_REPLAY=0``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn
from mlx_lm.models.cache import KVCache

from ..backends import registry
from ..backends.native.loading import bindings
from ..env import settings


class Decoding:
    """What the native backend saw of a model's last steps. Copies of a model, and what unpickles, begin
    without."""

    __slots__ = ("seen",)

    def __init__(self, native: Any):
        self.seen = native.Decoding()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


class Step:
    """A decoding step that is about to be made: one token a sequence, on caches with room for it.

    Attributes:
        logits: where it could be made from what was seen: ``[batch, 1, vocabulary]``, and the caches are
            advanced.
    """

    __slots__ = ("_before", "_call", "logits")

    def __init__(self, decoding: Decoding, model: mlx.nn.Module, inputs: mx.array, caches: list[KVCache]):
        offset = caches[0].offset
        self._before = [array for cache in caches for array in (cache.keys, cache.values)]
        self._call = decoding.seen, model, inputs, caches, offset
        self.logits: mx.array | None = decoding.seen.again(model, inputs, caches, offset, _facts())

    def made(self, logits: mx.array) -> None:
        """Watch it: it was made in full."""
        seen, model, inputs, caches, offset = self._call
        seen.record(model, inputs, caches, offset, self._before, logits, _facts())


def step_of(model: mlx.nn.Module, inputs: mx.array, cache: Sequence[Any] | None) -> Step | None:
    """The step that a call of ``model`` is, or None where it is something else, or no step to be watched.

    Args:
        model: calls this first, with its own arguments.
        inputs: token ids ``[batch, length]``.
        cache: of each layer, or None.
    """
    own = model.__dict__
    if not cache or inputs.shape[-1] != 1 or own["_training"]:
        return None
    if any(type(c) is not KVCache or c.keys is None or c.offset >= c.keys.shape[2] for c in cache):
        return None
    caches = list(cache)
    if any(c.offset != caches[0].offset for c in caches):
        return None
    decoding = own.get("_decoding")
    if decoding is None:
        native = bindings().native if settings.replay else None
        if native is None:
            return None
        decoding = own["_decoding"] = Decoding(native)
    return Step(decoding, model, inputs, caches)


def _facts() -> tuple[Any, ...]:
    """What a step depends on beside the model."""
    return registry.default, registry.age
