"""Rotary positions with their settings."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn

from .. import ops
from .recall import training_backend


class Rope(mlx.nn.Module):
    """:func:`moefast.ops.rope` with its settings.

    Args:
        dims: the first so many values of each head turn.
        traditional: pairs are neighbours instead of halves.
        base, freqs: one of them; see :func:`moefast.ops.rope`.
        scale: factor on the positions.
        factor: on the values that turn, before they do (YaRN's attention factor).
    """

    def __init__(
        self,
        dims: int,
        *,
        traditional: bool = False,
        base: float | None = None,
        freqs: mx.array | None = None,
        scale: float = 1.0,
        factor: float = 1.0,
    ):
        super().__init__()
        self.dims = dims
        self.traditional = traditional
        self.base = base
        self.scale = scale
        self.factor = factor
        self._freqs = freqs  # no parameter

    @property
    def rotation(self) -> ops.Rotation | None:
        """The settings, unless a factor makes them more than a rotation."""
        if self.factor != 1.0:
            return None
        return ops.Rotation(self.dims, self.traditional, self.base, self.scale, self._freqs)

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        """x: ``[batch, heads, length, head_dim]``, offset: of all rows or ``[batch]`` -> the shape of x."""
        if self.factor != 1.0:
            x = x.at[..., : self.dims].multiply(self.factor)
        return ops.rope(
            x,
            self.dims,
            offset=offset,
            base=self.base,
            freqs=self._freqs,
            scale=self.scale,
            traditional=self.traditional,
            backend=training_backend(self),
        )
