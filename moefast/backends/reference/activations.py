"""The activations of the experts, as mlx-lm computes them.

They are compiled because mlx-lm's are: on an Apple GPU the fused kernel rounds like mlx-lm's own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import mlx.core as mx
import mlx.nn as nn

from ...specs import Activation

Gated = Callable[[mx.array, mx.array], mx.array]


def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    y: mx.array = nn.silu(gate) * up
    return y


def _swiglu_oai(gate: mx.array, up: mx.array, *, alpha: float, limit: float) -> mx.array:
    gate = mx.minimum(gate, limit)  # capped from above only; the linear part on both sides
    up = mx.clip(up, -limit, limit)
    return (up + 1.0) * (gate * mx.sigmoid(alpha * gate))


def _swiglu_clipped(gate: mx.array, up: mx.array, *, limit: float) -> mx.array:
    return mx.minimum(nn.silu(gate), limit) * mx.clip(up, -limit, limit)


def _swiglu_clamped(gate: mx.array, up: mx.array, *, limit: float) -> mx.array:
    dtype = up.dtype
    gate = mx.minimum(gate.astype(mx.float32), limit)
    up = mx.clip(up.astype(mx.float32), -limit, limit)
    return _swiglu(gate, up).astype(dtype)


def _geglu_tanh(gate: mx.array, up: mx.array) -> mx.array:
    y: mx.array = nn.gelu_approx(gate) * up
    return y


def _situ(gate: mx.array, up: mx.array, *, beta: float, linear_beta: float | None) -> mx.array:
    dtype = up.dtype
    gate, up = gate.astype(mx.float32), up.astype(mx.float32)
    bounded = beta * mx.tanh(gate / beta) * mx.sigmoid(gate)
    if linear_beta is not None:
        up = linear_beta * mx.tanh(up / linear_beta)
    return (bounded * up).astype(dtype)


_GATED: dict[str, Callable[..., mx.array]] = {
    "swiglu": _swiglu,
    "swiglu_oai": _swiglu_oai,
    "swiglu_clipped": _swiglu_clipped,
    "swiglu_clamped": _swiglu_clamped,
    "geglu_tanh": _geglu_tanh,
    "situ": _situ,
}
_PLAIN: dict[str, Callable[[mx.array], mx.array]] = {
    "gelu_tanh": nn.gelu_approx,
    "relu2": nn.relu2,
}


@lru_cache(maxsize=64)
def _gated(activation: Activation) -> Gated:
    function: Gated = mx.compile(partial(_GATED[activation.name], **activation.parameters()), shapeless=True)
    return function


def activate(activation: Activation, gate: mx.array | None, up: mx.array) -> mx.array:
    """``activation`` of the projections' outputs; all arrays alike in shape and dtype.

    Shazeer, "GLU Variants Improve Transformer" (2020), for the gated family.
    """
    if gate is None:
        return _PLAIN[activation.name](up)
    return _gated(activation)(gate, up)
