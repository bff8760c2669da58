"""Activations as the kernels are told of them: a functor of kernels/activation.h with its numbers."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ...specs import Activation

_FUNCTORS = {
    "swiglu": "Swiglu",
    "swiglu_oai": "SwigluOai",
    "swiglu_clipped": "SwigluClipped",
    "swiglu_clamped": "SwigluClamped",
    "geglu_tanh": "GegluTanh",
    "situ": "Situ",
    "gelu_tanh": "GeluTanh",
    "relu2": "Relu2",
}


@lru_cache(maxsize=64)
def functor(activation: Activation) -> str:
    """Metal text of the activation: ``moefast::SwigluOai{1.7020000219345093f, 7.0f}``."""
    name = _FUNCTORS[activation.name]
    numbers = [value for value in activation.parameters().values() if value is not None]
    if activation.name == "situ" and activation.linear_beta is not None:
        name = "SituBounded"
    return f"moefast::{name}{{{', '.join(map(literal, numbers))}}}"


def literal(value: float) -> str:
    """The float32 that MLX makes of the number: all its digits, so that nothing rounds it once more."""
    return f"{float(np.float32(value))!r}f"
