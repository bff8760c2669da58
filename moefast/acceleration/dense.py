"""What a model does beside its experts, on the native backend: linear layers, heads, norms, rotary positions.

On a CPU they are as slow as the experts. Each class goes before MLX's own layer in a class's bases. In
training, and on input that the operation refuses, the original runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn

from .. import ops
from ..nn.projection import plain, quantized
from ..nn.recall import product_again, product_in_full, rows
from ..registry import log
from ..weights import Shape
from .swap import runs_original


def _or_original(
    layer: Any, shape: Shape, run: Callable[[], mx.array], original: Callable[[], mx.array]
) -> mx.array:
    """``run()``, or ``original()`` in training, in phases in which that is faster (told by ``shape``), and
    where the operation refuses the call."""
    if runs_original(layer, shape):
        return original()
    try:
        return run()
    except ValueError as error:  # raised by the description of the call, before anything runs
        log.info("%s: the original, %s", type(layer).__name__, error)
        return original()


class AcceleratedLinear:
    """See :class:`mlx.nn.Linear`."""

    def __call__(self: Any, x: mx.array) -> mx.array:
        """x: ``[..., in]`` -> ``[..., out]``."""
        y = product_again(self, x)  # all calls of a generation but a layer's first
        if y is not None:
            return y
        original = super().__call__  # type: ignore[misc]
        return _or_original(self, x.shape, lambda: product_in_full(self, x, plain), lambda: original(x))


class AcceleratedQuantizedLinear:
    """See :class:`mlx.nn.QuantizedLinear`."""

    def __call__(self: Any, x: mx.array) -> mx.array:
        """x: ``[..., in]`` -> ``[..., out]``."""
        y = product_again(self, x)
        if y is not None:
            return y
        original = super().__call__  # type: ignore[misc]
        return _or_original(self, x.shape, lambda: product_in_full(self, x, quantized), lambda: original(x))


class AcceleratedEmbedding:
    """See :class:`mlx.nn.Embedding`: the head where a model ties them."""

    def as_linear(self: Any, x: mx.array) -> mx.array:
        """x: ``[..., dims]`` -> ``[..., num_embeddings]``."""
        y = product_again(self, x)
        if y is not None:
            return y
        original = super().as_linear  # type: ignore[misc]
        return _or_original(self, x.shape, lambda: product_in_full(self, x, plain), lambda: original(x))


class AcceleratedQuantizedEmbedding:
    """See :class:`mlx.nn.QuantizedEmbedding`."""

    def __call__(self: Any, x: mx.array) -> mx.array:
        """x: integers ``[...]`` -> ``[..., dims]``."""
        original = super().__call__  # type: ignore[misc]
        return _or_original(self, x.shape, lambda: rows(self, x), lambda: original(x))

    def as_linear(self: Any, x: mx.array) -> mx.array:
        """x: ``[..., dims]`` -> ``[..., num_embeddings]``."""
        y = product_again(self, x)
        if y is not None:
            return y
        original = super().as_linear  # type: ignore[misc]
        return _or_original(self, x.shape, lambda: product_in_full(self, x, quantized), lambda: original(x))


class AcceleratedRMSNorm:
    """See :class:`mlx.nn.RMSNorm`."""

    def __call__(self: Any, x: mx.array) -> mx.array:
        """x: ``[..., dims]`` -> the same shape."""
        original = super().__call__  # type: ignore[misc]

        def run() -> mx.array:
            return ops.rms_norm(x, self.weight, self.eps, backend=self._moefast_backend)

        return _or_original(self, x.shape, run, lambda: original(x))


class AcceleratedLayerNorm:
    """See :class:`mlx.nn.LayerNorm`."""

    def __call__(self: Any, x: mx.array) -> mx.array:
        """x: ``[..., dims]`` -> the same shape."""
        original = super().__call__  # type: ignore[misc]

        def run() -> mx.array:
            return ops.layer_norm(
                x, self.get("weight"), self.get("bias"), self.eps, backend=self._moefast_backend
            )

        return _or_original(self, x.shape, run, lambda: original(x))


class AcceleratedRoPE:
    """See :class:`mlx.nn.RoPE`."""

    def __call__(self: Any, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        """x: ``[batch, heads, length, head_dim]`` -> the same shape."""
        original = super().__call__  # type: ignore[misc]

        def run() -> mx.array:
            how = {"base": self.base, "scale": self.scale, "traditional": self.traditional}
            return ops.rope(x, self.dims, offset=offset, backend=self._moefast_backend, **how)

        # The heads of a token count once.
        shape = (x.shape[0], *x.shape[2:]) if x.ndim == 4 else x.shape
        return _or_original(self, shape, run, lambda: original(x, offset))


# Exactly these classes: one that derives from them may compute something else.
DENSE: dict[type, type] = {
    mlx.nn.Linear: AcceleratedLinear,
    mlx.nn.QuantizedLinear: AcceleratedQuantizedLinear,
    mlx.nn.Embedding: AcceleratedEmbedding,
    mlx.nn.QuantizedEmbedding: AcceleratedQuantizedEmbedding,
    mlx.nn.RMSNorm: AcceleratedRMSNorm,
    mlx.nn.LayerNorm: AcceleratedLayerNorm,
    mlx.nn.RoPE: AcceleratedRoPE,
}


def dense_class(layer: mlx.nn.Module) -> type | None:
    """What goes before the class of ``layer``, or None: it is none of them, or someone patched its forward
    pass."""
    kind = type(layer)
    ahead = DENSE.get(kind)
    patched = getattr(kind.__call__, "__module__", None) != kind.__module__
    return None if ahead is None or patched else ahead
