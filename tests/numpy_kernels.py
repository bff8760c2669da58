"""``moefast._kernels`` for tests: moefast's weights as it takes them (NumPy arrays, bfloat16 as uint16), and
an engine for each instruction set of this machine."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from moefast import ExpertWeights, Projection, SharedExpert

kernels: Any = pytest.importorskip("moefast._kernels", reason="moefast was installed without its kernels")

ISAS: list[str] = kernels.isas()
isas = pytest.mark.parametrize("isa", ISAS)


@cache
def engine_of(isa: str) -> Any:
    """An engine of two threads, the same every time."""
    return kernels.Engine(2, isa)


def on_each(check: Callable[[Any], None]) -> None:
    """Run a check with each instruction set's engine: its truth takes longer to compute than they do."""
    for isa in ISAS:
        try:
            check(engine_of(isa))
        except AssertionError as error:
            raise AssertionError(f"on {isa}: {error}") from error


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


def run_experts(
    engine: Any, x: mx.array, weights: ExpertWeights, indices: mx.array, mix: mx.array
) -> tuple[mx.array, mx.array]:
    """The routes' outputs, and their weighted sum."""
    stacks, rows, chosen = held_experts(weights), as_numpy(x), as_numpy(indices)
    apart = engine.switch_glu(rows, stacks, chosen)
    combined = engine.experts(rows, stacks, chosen, as_numpy(mix))
    return as_mlx(apart, x.dtype), as_mlx(combined, x.dtype)
