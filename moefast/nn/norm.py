"""MLX's norms, handed to a backend."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn

from .. import ops
from .recall import training_backend


class RMSNorm(mlx.nn.RMSNorm):
    """:func:`moefast.ops.rms_norm` with a weight. See :class:`mlx.nn.RMSNorm`."""

    def __call__(self, x: mx.array) -> mx.array:
        """x: ``[..., dims]`` -> the same shape."""
        return ops.rms_norm(x, self.weight, self.eps, backend=training_backend(self))


class LayerNorm(mlx.nn.LayerNorm):
    """:func:`moefast.ops.layer_norm` with or without weight and bias. See :class:`mlx.nn.LayerNorm`."""

    def __call__(self, x: mx.array) -> mx.array:
        """x: ``[..., dims]`` -> the same shape."""
        backend = training_backend(self)
        return ops.layer_norm(x, self.get("weight"), self.get("bias"), self.eps, backend=backend)
