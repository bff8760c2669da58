"""kernels/activation.h: equal in every bit to MLX's operations, one after another in one kernel, and close
to float64."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from typing import Any

import mlx.core as mx
import numpy as np
import oracle
import pytest
from formats import ACTIVATIONS
from metal import emulated
from mlx_kernels import ROOT, TYPES, bits, numbers, of, out

from moefast import Activation, emulator
from moefast.backends.metal import launch
from moefast.backends.metal.activations import functor
from moefast.env import settings
from moefast.testing import assert_close

pytestmark = pytest.mark.skipif(
    find_spec("ziglang") is None and not settings.clang, reason="needs the compiler of moefast[emulator]"
)

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

# What mx.compile makes one kernel of, as moefast/backends/reference/activations.py has it: the result of each
# line is a temporary of type T (or float, after a cast). A name in braces is a number.
_SILU = ["T s = Sigmoid()(g)", "T a = Multiply()(g, s)"]
_CLIP = ["T m = Maximum()(u, T(-{limit}))", "T c = Minimum()(m, T({limit}))"]
_GELU = [
    "T h = Multiply()(T(0.5f), v)",
    "T p = Power()(v, T(3))",
    "T q = Multiply()(T(0.044715f), p)",
    "T i = Add()(v, q)",
    "T j = Multiply()(T(0.79788456f), i)",
    "T t = Tanh()(j)",
    "T o = Add()(T(1), t)",
    "T a = Multiply()(h, o)",
]
_FLOAT = ["float G = static_cast<float>(g)", "float U = static_cast<float>(u)"]
CHAINS: dict[str, list[str]] = {
    "swiglu": [*_SILU, "T y = Multiply()(a, u)"],
    "swiglu_oai": [
        "T n = Minimum()(g, T({limit}))",
        *_CLIP,
        "T l = Add()(c, T(1))",
        "T k = Multiply()(T({alpha}), n)",
        "T s = Sigmoid()(k)",
        "T a = Multiply()(n, s)",
        "T y = Multiply()(l, a)",
    ],
    "swiglu_clipped": [*_SILU, "T b = Minimum()(a, T({limit}))", *_CLIP, "T y = Multiply()(b, c)"],
    "swiglu_clamped": [
        *_FLOAT,
        "float n = Minimum()(G, float({limit}))",
        "float s = Sigmoid()(n)",
        "float a = Multiply()(n, s)",
        "float m = Maximum()(U, float(-{limit}))",
        "float c = Minimum()(m, float({limit}))",
        "float r = Multiply()(a, c)",
        "T y = static_cast<T>(r)",
    ],
    "geglu_tanh": ["T v = g", *_GELU, "T y = Multiply()(a, u)"],
    "situ": [
        *_FLOAT,
        "float d = Divide()(G, float({beta}))",
        "float t = Tanh()(d)",
        "float b = Multiply()(float({beta}), t)",
        "float s = Sigmoid()(G)",
        "float a = Multiply()(b, s)",
        "float r = Multiply()(a, U)",
        "T y = static_cast<T>(r)",
    ],
    "situ bounded": [
        *_FLOAT,
        "float d = Divide()(G, float({beta}))",
        "float t = Tanh()(d)",
        "float b = Multiply()(float({beta}), t)",
        "float s = Sigmoid()(G)",
        "float a = Multiply()(b, s)",
        "float e = Divide()(U, float({linear_beta}))",
        "float w = Tanh()(e)",
        "float l = Multiply()(float({linear_beta}), w)",
        "float r = Multiply()(a, l)",
        "T y = static_cast<T>(r)",
    ],
    "gelu_tanh": ["T v = u", *_GELU, "T y = a"],
    "relu2": ["T k = Maximum()(u, T(0))", "T y = Square()(k)"],
}


def mlx_chain(kind: str, activation: Activation, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """The activation by MLX's own operations, in the kernel that it generates: bits."""
    name = activation.name + " bounded" * (activation.linear_beta is not None)
    constants = {k: f"{np.float32(v)!s}f" for k, v in activation.parameters().items() if v is not None}
    lines = "".join(f"  {line.format(**constants)};\n" for line in CHAINS[name])
    source = (
        "".join(f'#include "{ROOT}{header}"\n' for header in ("utils.h", "unary_ops.h", "binary_ops.h"))
        + f"typedef {kind} T;\n[[kernel]] void k(device const T* gate [[buffer(0)]], "
        + "device const T* up [[buffer(1)]], device T* out [[buffer(2)]], "
        + "uint3 pos [[thread_position_in_grid]]) {\n  uint index = pos.x;\n"
        + f"  T g = gate[index];\n  T u = up[index];\n{lines}  out[index] = y;\n}}\n"
    )
    kernel = emulator.compile(source, "k", include_dirs=[emulator.mlx_include_dir()], name="chain.metal")
    result = emulator.launch(kernel, [gate, up, out(kind, gate.size)], (gate.size, 1, 1), (256, 1, 1))
    return result.buffers[2]


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
    want = mlx_chain(kind, activation, bits(gate), bits(up))
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
