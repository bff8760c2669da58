"""MLX's norms, handed to a backend."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn

from .. import ops
from .recall import training_backend


class RMSNorm(mlx.nn.RMSNorm):
    """:func:`moefast.ops.rms_norm` with a weight. See :class:`mlx.nn.RMSNorm`."""

    def __call__(self, x: mx.array, branch: mx.array | None = None, multiplier: float = 1.0) -> Any:
        """x: ``[..., dims]`` -> the same shape. With a branch of a residual stream: ``h = x + multiplier *
        branch`` and the norm of that, as :func:`moefast.ops.add_rms_norm`."""
        backend = training_backend(self)
        if branch is None:
            return ops.rms_norm(x, self.weight, self.eps, backend=backend)
        return ops.add_rms_norm(x, branch, self.weight, self.eps, multiplier=multiplier, backend=backend)


class LayerNorm(mlx.nn.LayerNorm):
    """:func:`moefast.ops.layer_norm` with or without weight and bias. See :class:`mlx.nn.LayerNorm`."""

    def __call__(self, x: mx.array, branch: mx.array | None = None, multiplier: float = 1.0) -> Any:
        """x: ``[..., dims]`` -> the same shape. With a branch of a residual stream: ``h = x + multiplier *
        branch`` and the norm of that, as :func:`moefast.ops.add_layer_norm`."""
        backend = training_backend(self)
        own = self.get("weight"), self.get("bias"), self.eps
        if branch is None:
            return ops.layer_norm(x, *own, backend=backend)
        return ops.add_layer_norm(x, branch, *own, multiplier=multiplier, backend=backend)
