"""Denormals: kept, or flushed to zero as Apple's GPUs do with those of float and bfloat."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_kernels import bits, numbers

from moefast import emulator
from moefast.emulator.__main__ import main
from moefast.env import settings

pytestmark = pytest.mark.skipif(
    find_spec("ziglang") is None and not settings.clang, reason="needs the compiler of moefast[emulator]"
)

SOURCE = """
#include <metal_stdlib>
using namespace metal;
template <typename T>
[[kernel]] void k(
    device const T* x [[buffer(0)]], device T* y [[buffer(1)]], device int* compared [[buffer(2)]],
    uint i [[thread_position_in_grid]]) {
  T v = x[i], one = x[0], tiny = x[1], least = x[4];
  y[8 * i] = v;              // moved
  y[8 * i + 1] = v + T(0);
  y[8 * i + 2] = v * one;
  y[8 * i + 3] = T(fma(v, one, tiny));
  y[8 * i + 4] = v - least;
  y[8 * i + 5] = T(sqrt(v));
  y[8 * i + 6] = v / one;
  y[8 * i + 7] = T(exp(float(v) - 90.0f));  // a denormal of float
  compared[i] = (v != T(0)) + 2 * (v > T(0)) + 4 * (bool)v;
}
template [[host_name("k")]] [[kernel]] decltype(k<TYPE>) k<TYPE>;
"""
WORDS = {"float": np.uint32, "half": np.uint16, "bfloat": np.uint16}
LEAST = {"float": 0x00800000, "half": 0x0400, "bfloat": 0x0080}  # the smallest normal number
ONE = {"float": 0x3F800000, "half": 0x3C00, "bfloat": 0x3F80}
KINDS = {"float": "float", "half": "float16_t", "bfloat": "bfloat16_t"}
SIGN = {"float": 0x80000000, "half": 0x8000, "bfloat": 0x8000}


def launch(kind: str, **options: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bits of the arguments, of the results, and what the comparisons said."""
    least, sign = LEAST[kind], SIGN[kind]
    words = [ONE[kind], 1, least - 1, least // 2, least, least + 1, 0]
    words += [sign | 1, sign | (least - 1), sign | least]
    x = np.array(words, WORDS[kind]).view(np.float32 if kind == "float" else np.float16)
    x = x.view(np.uint16) if kind == "bfloat" else x
    kernel = emulator.compile(SOURCE.replace("TYPE", kind), "k")
    outputs = {1: emulator.Output((len(x), 8), x.dtype), 2: emulator.Output((len(x),), np.int32)}
    result = emulator.launch(kernel, {0: x, **outputs}, (len(x), 1, 1), (len(x), 1, 1), **options)
    return x, result.buffers[1], result.buffers[2]


def flushed(words: np.ndarray, kind: str) -> np.ndarray:
    """Denormals as zeros of the same sign."""
    if kind == "half":
        return words
    words = words.view(WORDS[kind])
    magnitude = words & (SIGN[kind] - 1)
    return np.where(magnitude < LEAST[kind], words & SIGN[kind], words).astype(words.dtype)


@pytest.mark.parametrize("mode", ["run", "check"])
@pytest.mark.parametrize("denormals", ["keep", "flush"])
@pytest.mark.parametrize("kind", list(WORDS))
def test_arithmetic_and_comparisons(kind: str, denormals: str, mode: str) -> None:
    x, y, compared = launch(kind, mode=mode, denormals=denormals)
    word = WORDS[kind]
    y = y.view(word)
    seen = x.view(word) if denormals == "keep" else flushed(x, kind).view(word)

    def rounded(values: np.ndarray) -> np.ndarray:
        """float64 as bits of the type, as the mode has its denormals."""
        exact = values.astype(np.float32).astype(np.float16) if kind == "half" else values.astype(np.float32)
        if kind == "bfloat":
            exact = bits(mx.array(exact).astype(mx.bfloat16))
        return exact.view(word) if denormals == "keep" else flushed(exact, kind).view(word)

    as_type = seen.view(np.uint16 if kind == "bfloat" else x.dtype)
    values = numbers(as_type, KINDS[kind])
    np.testing.assert_array_equal(y[:, 0], x.view(word), err_msg="moved")
    np.testing.assert_array_equal(y[:, 1], rounded(values + 0.0), err_msg="sum")
    np.testing.assert_array_equal(y[:, 2], seen, err_msg="product")
    np.testing.assert_array_equal(y[:, 3], rounded(values + values[1]), err_msg="fma")
    np.testing.assert_array_equal(y[:, 6], seen, err_msg="quotient")
    np.testing.assert_array_equal(y[:, 4], rounded(values - values[4]), err_msg="difference")
    positive = values > 0
    np.testing.assert_array_equal(
        y[positive, 5], rounded(np.sqrt(np.abs(values)))[positive], err_msg="square root"
    )
    np.testing.assert_array_equal(y[:, 7] == 0, kind == "half" or denormals == "flush", err_msg="exp")
    np.testing.assert_array_equal(compared, (values != 0) * 5 + (values > 0) * 2)


@pytest.mark.parametrize("mode", ["run", "check"])
def test_one_launch_does_not_decide_for_the_next(mode: str) -> None:
    first = launch("float", mode=mode)[1]
    assert launch("float", mode=mode, denormals="flush")[1].tobytes() != first.tobytes()
    assert launch("float", mode=mode)[1].tobytes() == first.tobytes()
    # NumPy, in this process, is left as it was.
    assert np.float32(1e-30) * np.float32(1e-10) > 0


@pytest.mark.parametrize("mode", ["run", "check"])
def test_of_metal_kernel(mode: Any) -> None:
    x = mx.array([1e-39, 1.0])

    def sums(denormals: Any) -> list[float]:
        kernel = emulator.metal_kernel(
            "sum",
            ["x"],
            ["y"],
            "uint i = thread_position_in_grid.x; y[i] = x[i] + 0.0f;",
            mode=mode,
            denormals=denormals,
        )
        (y,) = kernel(
            inputs=[x],
            grid=(2, 1, 1),
            threadgroup=(2, 1, 1),
            output_shapes=[(2,)],
            output_dtypes=[mx.float32],
        )
        return np.array(y).tolist()

    assert sums("keep") == np.array(x).tolist()
    assert sums("flush") == [0.0, 1.0]


def test_from_the_shell(tmp_path: Path) -> None:
    file, given, kept = tmp_path / "k.metal", tmp_path / "x.npy", tmp_path / "y.npy"
    file.write_text(
        "kernel void k(const device float* x [[buffer(0)]], device float* y [[buffer(1)]]) { *y = *x * 2; }"
    )
    np.save(given, np.array([1e-39], np.float32))
    buffers = ["--buffer", f"0={given}", "--buffer", "1=empty:float32:1", "--save", f"1={kept}"]
    for denormals, expected in (("keep", np.float32(1e-39) * 2), ("flush", 0)):
        assert main([str(file), "--grid", "1", "--denormals", denormals, *buffers]) == 0
        assert np.load(kept)[0] == expected


def test_refused() -> None:
    with pytest.raises(ValueError, match=r"denormals must be 'keep' or 'flush', got 'lose'"):
        launch("float", denormals="lose")
