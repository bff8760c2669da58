"""Experts of one token at a time: decode's launches, worked out at the first call of a problem.

A problem fixes layouts and dtypes, so that nothing is looked up by them again: in Python that is what a
decoded token waits for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from ...weights import ExpertWeights, SharedExpert
from . import decode
from .dispatch import thresholds


class OneToken:
    """``gate_up`` and ``down_combine``, with the shared expert's launch beside the first, or within it where
    the device's thresholds say so (``merged``)."""

    def __init__(self) -> None:
        self._run: Callable[..., mx.array] | None = None

    def __call__(
        self,
        x: mx.array,
        weights: ExpertWeights,
        indices: mx.array,
        route_weights: mx.array,
        combine_dtype: mx.Dtype | None,
        *,
        identity: bool = False,
        scale: float = 1.0,
        shared: SharedExpert | None = None,
    ) -> mx.array:
        """Arguments as of :func:`.decode.down_combine`, x ``[tokens, hidden]`` -> ``[tokens, hidden]``."""
        if self._run is None:
            dtype = route_weights.dtype
            kind = decode.CombineKind(dtype, combine_dtype or dtype, identity, scale)
            self._run = _bound(x.dtype, weights, indices.shape[1], kind, shared)
        return self._run(x, weights, indices, route_weights, shared)


def _bound(
    dtype: mx.Dtype,
    weights: ExpertWeights,
    top_k: int,
    kind: decode.CombineKind,
    shared: SharedExpert | None,
) -> Callable[..., mx.array]:
    layout = weights.layout
    others = None if shared is None else shared.layout
    down_combine = decode.bind_down_combine(layout, others, top_k, dtype, kind)
    if others is not None and thresholds().merged:
        together = decode.bind_gate_up_with_shared(layout, others, top_k, dtype)

        def merged(x: mx.array, weights: Any, indices: mx.array, mix: mx.array, shared: Any) -> mx.array:
            inner, beside = together(x, weights, indices, shared)
            return down_combine(inner, weights, indices, mix, beside, x if kind.identity else None)

        return merged
    gate_up = decode.bind_gate_up(layout, top_k, dtype)
    shared_gate_up = None if others is None else decode.bind_shared_gate_up(others, dtype)

    def apart(x: mx.array, weights: Any, indices: mx.array, mix: mx.array, shared: Any) -> mx.array:
        beside = None if shared_gate_up is None else shared_gate_up(x, shared)
        inner = gate_up(x, weights, indices)
        return down_combine(inner, weights, indices, mix, beside, x if kind.identity else None)

    return apart
