"""Router and experts as two modules that the decoder layer calls one after the other (Gemma 4)."""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx

from .. import ops
from ..routing import Routing
from ..specs import RouterSpec
from .experts import weights_of
from .swap import runs_original

ROUTER, EXPERTS = "gemma4_text.Router", "gemma4_text.Experts"


class AcceleratedRouter:
    """Softmax of the top logits of a normalised input, times each expert's own factor."""

    _moefast_backend: str

    def __call__(self: Any, x: mx.array) -> tuple[mx.array, mx.array]:
        """x: ``[..., hidden]`` -> indices and weights ``[..., top_k]``."""
        if runs_original(self, x.shape):
            return super().__call__(x)  # type: ignore[misc,no-any-return]
        normed = mx.fast.rms_norm(x, self.scale * self._root_size, self.eps)
        routing = ops.route(
            self.proj(normed),
            apart_spec(self),
            expert_scale=self.per_expert_scale,
            backend=self._moefast_backend,
        )
        return routing.indices, routing.weights


class AcceleratedApartExperts:
    """The weighted sum of a token's experts."""

    _moefast_backend: str

    def __call__(self: Any, x: mx.array, indices: mx.array, weights: mx.array) -> mx.array:
        """x: ``[..., hidden]``, indices and weights: ``[..., top_k]`` -> ``[..., hidden]``."""
        stacks = None if runs_original(self, x.shape) else weights_of(self.switch_glu)
        if stacks is None or weights.dtype != x.dtype:  # which then decides the output's
            return super().__call__(x, indices, weights)  # type: ignore[misc,no-any-return]
        return ops.experts(x, stacks, Routing(indices, weights), backend=self._moefast_backend)


def apart_spec(router: Any) -> RouterSpec:
    """Of the router as it is now."""
    return _spec(router.per_expert_scale.shape[0], router.config.top_k_experts)


@cache
def _spec(num_experts: int, top_k: int) -> RouterSpec:
    return RouterSpec(
        num_experts=num_experts, top_k=top_k, score_over="selected", precise=False, ties="highest"
    )
