"""The CPU kernels on values at the edges: outliers, denormals, zeros, huge and tiny, infinite, NaN."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import oracle
import pytest
from factories import Floats, MakeProjection
from formats import BY_NAME, DTYPES, Format
from numpy_kernels import as_mlx, as_numpy, engine_of, held, isas

from moefast.testing import assert_close, float64

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)

HIDDEN = 128

STORED = [BY_NAME[name] for name in ("plain", "affine4-g64", "affine3-g32", "affine8-g128", "mxfp4", "nvfp4")]
stored = pytest.mark.parametrize("format_", STORED, ids=lambda format_: format_.name)


@pytest.fixture
def product(request: pytest.FixtureRequest, projection: MakeProjection) -> Any:
    """``product(isa, format_, x)`` and the oracle's answer, by one and the same weight."""
    kept: dict[Any, Any] = {}

    def run(isa: str, format_: Format, x: mx.array) -> tuple[mx.array, Any]:
        weight = kept.setdefault((format_, x.dtype), projection(80, 2 * HIDDEN, **format_.of(x.dtype)))
        y = engine_of(isa).matmul(as_numpy(x), held(weight))
        with np.errstate(invalid="ignore"):
            return as_mlx(y, x.dtype), oracle.project(float64(x), weight)

    return run


@isas
@dtypes
@stored
@pytest.mark.parametrize("tokens", [1, 40])
def test_outliers(
    tokens: int, isa: str, dtype: mx.Dtype, format_: Format, product: Any, floats: Floats
) -> None:
    """Single values of 60 times the others' size: what coarse quantization of activations cannot hold."""
    x = floats(tokens, 2 * HIDDEN, dtype=dtype)
    x[:, 5::64] *= 60
    assert_close(*product(isa, format_, x), "quantized_matmul", reductions=(2 * HIDDEN,))


@isas
@stored
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_tiny_and_huge_rows(isa: str, format_: Format, scale: float, product: Any, floats: Floats) -> None:
    """Rows of very different sizes side by side, within the range of the dtype."""
    for dtype in (mx.float32, mx.bfloat16):
        for tokens in (1, 20):
            x = floats(tokens, 2 * HIDDEN, dtype=dtype)
            x[::2] *= scale
            assert_close(*product(isa, format_, x), "quantized_matmul", reductions=(2 * HIDDEN,))


@isas
@dtypes
@stored
def test_denormals_and_zeros(
    isa: str, dtype: mx.Dtype, format_: Format, product: Any, floats: Floats
) -> None:
    """Among ordinary values they vanish; a group or a row of nothing else gives what little it has."""
    tiny = {mx.float32: 1e-41, mx.float16: 3e-7, mx.bfloat16: 1e-40}[dtype]
    for tokens in (1, 20):
        x = floats(tokens, 2 * HIDDEN, dtype=dtype)
        x[:, ::3] = tiny
        x[:, 64:128] = 0  # a group of zeros
        x[:, 128:192] = tiny
        assert_close(*product(isa, format_, x), "quantized_matmul", reductions=(2 * HIDDEN,))
        x[0] = 0
        y, want = product(isa, format_, x)
        assert not np.array(y.astype(mx.float32))[0].any()
        assert_close(y, want, "quantized_matmul", reductions=(2 * HIDDEN,))


@isas
@dtypes
@stored
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite_stays_in_its_row(
    value: float, isa: str, dtype: mx.Dtype, format_: Format, product: Any, floats: Floats
) -> None:
    for tokens in (1, 2, 20):
        x = floats(tokens, 2 * HIDDEN, dtype=dtype)
        dirty = mx.array(x)
        dirty[tokens // 2, 77] = value
        y, want = product(isa, format_, dirty)
        got = float64(y)
        assert not np.isfinite(got[tokens // 2][~np.isfinite(want[tokens // 2])]).any()
        others = [i for i in range(tokens) if i != tokens // 2]
        want = product(isa, format_, x)[1]
        if others:
            assert_close(y[mx.array(others)], want[others], "quantized_matmul", reductions=(2 * HIDDEN,))
