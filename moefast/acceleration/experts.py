"""mlx-lm's stacked experts, with :func:`moefast.switch_glu` in the place of their forward pass."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn

from .. import ops
from ..weights import ExpertWeights
from .stacks import activation_of, expert_weights
from .swap import runs_original

STACKS = ("switch_layers.SwitchGLU", "switch_layers.SwitchMLP")


class AcceleratedExperts:
    """Goes before SwitchGLU or SwitchMLP in a class's bases.

    In training, and where a projection is adapted, the original runs.
    """

    _moefast_backend: str

    def __call__(self: Any, x: mx.array, indices: mx.array) -> mx.array:
        """x: ``[..., input_dims]``, indices: ``[..., top_k]`` -> ``[..., top_k, input_dims]``."""
        weights = None if runs_original(self, x.shape) else weights_of(self)
        if weights is None or x.shape[:-1] != indices.shape[:-1]:
            return super().__call__(x, indices)  # type: ignore[misc,no-any-return]
        return ops.switch_glu(x, weights, indices, backend=self._moefast_backend)


def weights_of(experts: mlx.nn.Module) -> ExpertWeights | None:
    """What operations take of a SwitchGLU or SwitchMLP as it is now; None where it has to be called."""
    activation = activation_of(experts.activation)
    return None if activation is None else expert_weights(experts, activation)
