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
from typing import Any, NamedTuple

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


class Step(NamedTuple):
    """A decoding step that Python is about to make, to be watched.

    Attributes:
        seen: where to.
        model, inputs, caches, offset: whose step, of what, on which caches, how far they were filled.
        before: keys and values of every cache.
    """

    seen: Any
    model: mlx.nn.Module
    inputs: mx.array
    caches: list[KVCache]
    offset: int
    before: list[mx.array]

    def made(self, logits: mx.array) -> None:
        """Watch it: it was made, and gave ``logits``."""
        self.seen.record(*self[1:], logits, _facts())


def again(model: mlx.nn.Module, inputs: mx.array, cache: Sequence[Any] | None) -> mx.array | None:
    """What a call of ``model`` gives, without its Python, and the caches advanced; or None, and nothing
    done, where the call is not a step like those that were seen.

    Args:
        model: calls this first, with its own arguments.
        inputs: token ids ``[batch, length]``.
        cache: of each layer, or None.

    Returns:
        Logits ``[batch, 1, vocabulary]``.
    """
    own = model.__dict__
    decoding = own.get("_decoding")
    if decoding is None or cache is None or own["_training"] or not settings.replay:
        return None
    logits: mx.array | None = decoding.seen.again(model, inputs, cache, _facts())
    return logits


def watch(model: mlx.nn.Module, inputs: mx.array, cache: Sequence[Any] | None) -> Step | None:
    """The step that a call of ``model`` is: one token a sequence, on plain caches with room for it. None
    where it is something else. Arguments as of :func:`again`, which found it to be none like the last."""
    own = model.__dict__
    if not cache or inputs.shape[-1] != 1 or own["_training"] or not settings.replay:
        return None
    if any(type(c) is not KVCache or c.keys is None or c.offset >= c.keys.shape[2] for c in cache):
        return None
    caches, offset = list(cache), cache[0].offset
    if any(c.offset != offset for c in caches):
        return None
    decoding = own.get("_decoding")
    if decoding is None:
        native = bindings().native
        if native is None:
            return None
        decoding = own["_decoding"] = Decoding(native)
    before = [array for c in caches for array in (c.keys, c.values)]
    return Step(decoding.seen, model, inputs, caches, offset, before)


def _facts() -> tuple[Any, ...]:
    """What a step depends on beside the model."""
    return registry.default, registry.age
