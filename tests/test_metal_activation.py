"""kernels/activation.h: equal in every bit to MLX's operations, one after another in one kernel, and close
to float64."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import mlx.core as mx
import mlx_chain
import numpy as np
import oracle
import pytest
from formats import ACTIVATIONS
from metal import emulated, needs_emulator
from mlx_kernels import TYPES, bits, numbers, of

from moefast import Activation
from moefast.backends.metal import launch
from moefast.backends.metal.activations import functor
from moefast.testing import assert_close

pytestmark = needs_emulator

SPECS = [*ACTIVATIONS, Activation(name="swiglu_oai"), Activation(name="swiglu_oai", alpha=1.3, limit=0.7)]

# One half type for every day, and one activation in all types.
CASES = [
    pytest.param(
        activation,
        kind,
        id=f"{activation!r}-{kind}",
        marks=() if kind == "bfloat16_t" or activation == Activation() else pytest.mark.slow,
    )
    for activation in SPECS
    for kind in TYPES
]


@cache
def function(activation: Activation) -> launch.Function:
    arguments = f"{functor(activation)}, " + ("gate[i], up[i]" if activation.gated else "up[i]")
    return launch.Function(
        name="activate",
        file="activation.h",
        inputs=("gate", "up"),
        outputs=("y",),
        body=f"uint i = thread_position_in_grid.x;\ny[i] = moefast::activate({arguments});",
    )


def ours(activation: Activation, gate: mx.array, up: mx.array) -> mx.array:
    with emulated(check=False):
        (y,) = function(activation)(
            [gate, up],
            template=[],
            grid=(gate.size, 1, 1),
            threadgroup=(256, 1, 1),
            outputs=[(gate.shape, gate.dtype)],
        )
    return y


def of_bits(words: np.ndarray, kind: str) -> mx.array:
    array = mx.array(words)
    return array.view(TYPES[kind])


def everything(kind: str) -> tuple[mx.array, mx.array]:
    """Every value of a half type (of float, each upper half) with some that are not far from 1."""
    words = np.arange(65536, dtype=np.uint32)
    words = words << 16 | 0x1234 if kind == "float" else words.astype(np.uint16)
    ordinary = of(kind, 3 * np.random.default_rng(3).standard_normal(words.size))
    every = of_bits(words, kind)
    some = of_bits(ordinary.view(words.dtype), kind)
    return mx.concatenate([every, some]), mx.concatenate([some, every])


@pytest.mark.parametrize(("activation", "kind"), CASES)
def test_bits_are_those_of_mlx(activation: Activation, kind: str) -> None:
    gate, up = everything(kind)
    want = mlx_chain.activate(kind, activation, bits(gate), bits(up))
    got = bits(ours(activation, gate, up))
    both_nan = np.isnan(numbers(want, kind)) & np.isnan(numbers(got, kind))
    word = f"u{want.dtype.itemsize}"
    differs = (got.view(word) != want.view(word)) & ~both_nan
    assert np.count_nonzero(differs) == 0, f"first at {np.flatnonzero(differs)[:8]}"


@pytest.mark.parametrize(("activation", "kind"), CASES)
def test_values_are_those_of_the_formula(activation: Activation, kind: str, floats: Any) -> None:
    gate, up = (floats(4096, dtype=TYPES[kind]) for _ in range(2))
    want = oracle.activate(activation, oracle.float64(gate), oracle.float64(up))
    assert_close(ours(activation, gate, up), want, "switch_glu")


def test_numbers_are_told_with_all_their_digits() -> None:
    third = Activation(name="situ", beta=1 / 3)
    assert functor(third) == "moefast::Situ{0.3333333432674408f}"
    assert functor(replace(third, linear_beta=2)) == "moefast::SituBounded{0.3333333432674408f, 2.0f}"
    assert functor(Activation()) == "moefast::Swiglu{}"
