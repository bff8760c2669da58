"""The residual stream between a layer's last branch and the norm that reads it."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import mlx.core as mx
import mlx.nn as mlx_nn


class Residual(NamedTuple):
    """``x + multiplier * branch``, not added up yet.

    What reads a residual stream is a norm, and sum and norm are one operation (:func:`moefast.ops.
    add_rms_norm`). So a layer hands on its last branch as it is, and the next layer's first norm adds it.

    Attributes:
        x: ``[..., hidden]``.
        branch: like ``x``; None where there is nothing to add.
        multiplier: factor on the branch.
    """

    x: mx.array
    branch: mx.array | None = None
    multiplier: float = 1.0

    def sum(self) -> mx.array:
        """The stream, ``[..., hidden]``."""
        if self.branch is None:
            return self.x
        return self.x + (self.branch if self.multiplier == 1.0 else self.branch * self.multiplier)

    def normed(self, norm: mlx_nn.Module) -> tuple[mx.array, mx.array]:
        """The stream, and what ``norm``, one of :mod:`moefast.nn`, makes of it."""
        if self.branch is None:
            return self.x, norm(self.x)
        h, y = norm(self.x, self.branch, self.multiplier)
        return h, y


Stream = TypeVar("Stream", mx.array, Residual)


class ResidualLayer(mlx_nn.Module):
    """A decoder layer: :meth:`join`, which a model defines, on arrays and on :class:`Residual` streams."""

    def __call__(self, x: Stream, mask: mx.array | str | None = None, cache: Any | None = None) -> Stream:
        """x: ``[batch, length, hidden]`` -> the same shape; or of a stream, another."""
        if isinstance(x, Residual):
            return self.join(x, mask, cache)
        return self.join(Residual(x), mask, cache).sum()

    def join(self, stream: Residual, mask: mx.array | str | None, cache: Any | None) -> Residual:
        """The stream after this layer's branches joined it."""
        raise NotImplementedError
