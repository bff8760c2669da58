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
from ..nn.recall import product, rows
from ..registry import log
from .swap import runs_original


def _or_original(
    layer: Any, run: Callable[[], mx.array], original: Callable[..., mx.array], x: mx.array, *others: Any
) -> mx.array:
    shape = x.shape
    if isinstance(layer, mlx.nn.RoPE) and len(shape) == 4:  # all heads of a token count once
        shape = (shape[0], *shape[2:])
    if runs_original(layer, shape):
        return original(x, *others)
    try:
        return run()
    except ValueError as error:  # raised by the description of the call, before anything runs
        log.info("%s: the original, %s", type(layer).__name__, error)
        return original(x, *others)


class AcceleratedLinear:
    """See :class:`mlx.nn.Linear`."""

    def __call__(self: Any, x: mx.array) -> mx.array:
        """x: ``[..., in]`` -> ``[..., out]``."""
        return _or_original(self, lambda: product(self, x, plain), super().__call__, x)  # type: ignore[misc]


class AcceleratedQuantizedLinear:
    """See :class:`mlx.nn.QuantizedLinear`."""

    def __call__(self: Any, x: mx.array) -> mx.array:
        """x: ``[..., in]`` -> ``[..., out]``."""
        return _or_original(self, lambda: product(self, x, quantized), super().__call__, x)  # type: ignore[misc]


class AcceleratedEmbedding:
    """See :class:`mlx.nn.Embedding`: the head where a model ties them."""

    def as_linear(self: Any, x: mx.array) -> mx.array:
        """x: ``[..., dims]`` -> ``[..., num_embeddings]``."""
        return _or_original(self, lambda: product(self, x, plain), super().as_linear, x)  # type: ignore[misc]


class AcceleratedQuantizedEmbedding:
    """See :class:`mlx.nn.QuantizedEmbedding`."""

    def __call__(self: Any, x: mx.array) -> mx.array:
        """x: integers ``[...]`` -> ``[..., dims]``."""
        return _or_original(self, lambda: rows(self, x), super().__call__, x)  # type: ignore[misc]

    def as_linear(self: Any, x: mx.array) -> mx.array:
        """x: ``[..., dims]`` -> ``[..., num_embeddings]``."""
        return _or_original(self, lambda: product(self, x, quantized), super().as_linear, x)  # type: ignore[misc]


class AcceleratedRMSNorm:
    """See :class:`mlx.nn.RMSNorm`."""

    def __call__(self: Any, x: mx.array) -> mx.array:
        """x: ``[..., dims]`` -> the same shape."""

        def run() -> mx.array:
            return ops.rms_norm(x, self.weight, self.eps, backend=self._moefast_backend)

        return _or_original(self, run, super().__call__, x)  # type: ignore[misc]


class AcceleratedLayerNorm:
    """See :class:`mlx.nn.LayerNorm`."""

    def __call__(self: Any, x: mx.array) -> mx.array:
        """x: ``[..., dims]`` -> the same shape."""

        def run() -> mx.array:
            return ops.layer_norm(
                x, self.get("weight"), self.get("bias"), self.eps, backend=self._moefast_backend
            )

        return _or_original(self, run, super().__call__, x)  # type: ignore[misc]


class AcceleratedRoPE:
    """See :class:`mlx.nn.RoPE`."""

    def __call__(self: Any, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        """x: ``[batch, heads, length, head_dim]`` -> the same shape."""

        def run() -> mx.array:
            how = {"base": self.base, "scale": self.scale, "traditional": self.traditional}
            return ops.rope(x, self.dims, offset=offset, backend=self._moefast_backend, **how)

        return _or_original(self, run, super().__call__, x, offset)  # type: ignore[misc]


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
