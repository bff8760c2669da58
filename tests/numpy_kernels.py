"""moefast's weights as ``moefast._kernels`` takes them: NumPy arrays, bfloat16 as uint16."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from moefast import ExpertWeights, Projection, SharedExpert

kernels: Any = pytest.importorskip("moefast._kernels", reason="moefast was installed without its kernels")


def as_numpy(array: mx.array) -> Any:
    """A contiguous copy."""
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def as_mlx(array: Any, dtype: mx.Dtype) -> mx.array:
    """The array that :func:`as_numpy` made of one of ``dtype``."""
    made = mx.array(array)
    return made.view(mx.bfloat16) if dtype == mx.bfloat16 else made


def held(p: Projection) -> Any:
    """``_kernels.Projection``."""
    weight, scales, biases, bias, global_scale = (None if a is None else as_numpy(a) for a in p.arrays)
    return kernels.Projection(weight, scales, biases, bias=bias, global_scale=global_scale, quant=p.quant)


def held_experts(weights: ExpertWeights | SharedExpert) -> Any:
    """``_kernels.Ffn``."""
    gate = None if weights.gate is None else held(weights.gate)
    up, down = held(weights.up), held(weights.down)
    return kernels.Ffn(gate=gate, up=up, down=down, activation=weights.activation)
