"""``moefast.ops.rms_norm`` and ``layer_norm`` on every backend, against float64."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn
import numpy as np
import pytest
from conftest import Floats
from formats import DTYPES

import moefast
from moefast.nn import LayerNorm, RMSNorm
from moefast.ops import layer_norm, rms_norm
from moefast.testing import Float64, assert_close, float64

BACKENDS = tuple(name for name, reason in moefast.backends().items() if reason is None)
EPS = 1e-5


def oracle(x: mx.array, weight: mx.array | None, bias: mx.array | None, centered: bool) -> Float64:
    """As the formula says."""
    y = float64(x)
    if centered:
        y = y - y.mean(axis=-1, keepdims=True)
    y = y / np.sqrt((y**2).mean(axis=-1, keepdims=True) + EPS)
    if weight is not None:
        y = y * float64(weight)
    return y if bias is None else y + float64(bias)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", [1, 7, 64, 2048, 3001])
@pytest.mark.parametrize("rows", [(), (3,), (2, 300)], ids=str)
def test_rms_norm(floats: Floats, backend: str, dtype: mx.Dtype, dims: int, rows: tuple[int, ...]) -> None:
    x, weight = 3 * floats(*rows, dims, dtype=dtype), floats(dims, dtype=dtype)
    for w in (weight, None):
        y = rms_norm(x, w, EPS, backend=backend)
        assert (y.dtype, y.shape) == (dtype, x.shape)
        assert_close(y, oracle(x, w, None, False), "norm", reductions=(dims,))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", [2, 7, 64, 2048])
def test_layer_norm(floats: Floats, backend: str, dtype: mx.Dtype, dims: int) -> None:
    x, weight, bias = (floats(*shape, dtype=dtype) for shape in ((5, dims), (dims,), (dims,)))
    for w in (weight, None):
        for b in (bias, None):
            y = layer_norm(x, w, b, EPS, backend=backend)
            assert_close(y, oracle(x, w, b, True), "norm", reductions=(dims, dims))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes_promote(floats: Floats, backend: str) -> None:
    x, weight = floats(4, 64, dtype=mx.bfloat16), floats(64, dtype=mx.float32)
    y = rms_norm(x, weight, EPS, backend=backend)
    assert y.dtype == mx.float32
    assert_close(y, oracle(x, weight, None, False), "norm", dtype=mx.bfloat16, reductions=(64,))


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(floats: Floats, backend: str) -> None:
    """Heads of a fused product, a transposed array, every other row; a weight that is a view."""
    weight = floats(64)[::2]
    for x in (floats(2, 3, 96)[..., 32:64], floats(32, 5).T, floats(6, 32)[::2], floats(5, 64)[:, ::2]):
        y = rms_norm(x, weight, EPS, backend=backend)
        assert_close(y, oracle(x, weight, None, False), "norm", reductions=(32,))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_are_not_finite(backend: str) -> None:
    x = mx.array([[1.0, float("inf"), 2.0, 3.0], [1.0, float("nan"), 2.0, 3.0], [1.0, 2.0, 3.0, 4.0]])
    want = mx.fast.rms_norm(x, None, EPS)
    assert mx.allclose(rms_norm(x, None, EPS, backend=backend), want, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_mlx_own(floats: Floats, backend: str) -> None:
    x, weight, bias = floats(3, 16), floats(16), floats(16)

    def rms(x: mx.array, weight: mx.array, name: str) -> mx.array:
        return (rms_norm(x, weight, EPS, backend=name) ** 2).sum()

    def layer(x: mx.array, weight: mx.array, bias: mx.array, name: str) -> mx.array:
        return (layer_norm(x, weight, bias, EPS, backend=name) ** 2).sum()

    for function, arrays in ((rms, (x, weight)), (layer, (x, weight, bias))):
        for argnum in range(len(arrays)):
            got = mx.grad(function, argnum)(*arrays, backend)
            want = mx.grad(function, argnum)(*arrays, "reference")
            assert_close(got, float64(want), "norm", reductions=(16,), gradient=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_and_maps(floats: Floats, backend: str) -> None:
    x, weight = floats(3, 5, 16), floats(16)

    def run(x: mx.array) -> mx.array:
        return rms_norm(x, weight, EPS, backend=backend)

    assert mx.array_equal(mx.compile(run)(x), run(x))
    assert_close(mx.vmap(run)(x), float64(run(x)), "norm", reductions=(16,))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend: str) -> None:
    assert rms_norm(mx.ones((0, 8)), mx.ones(8), EPS, backend=backend).shape == (0, 8)


def test_layers_are_mlxs(floats: Floats) -> None:
    """Same parameters, same values; in training the reference."""
    x = floats(2, 3, 24)
    for ours, theirs in ((RMSNorm, mlx.nn.RMSNorm), (LayerNorm, mlx.nn.LayerNorm)):
        layer, plain = ours(24).eval(), theirs(24)
        assert layer.parameters().keys() == plain.parameters().keys()
        assert_close(layer(x), float64(plain(x)), "norm", reductions=(24, 24))
        layer.train()
        assert mx.array_equal(layer(x), plain(x))
    assert "weight" not in LayerNorm(8, affine=False)


@pytest.mark.parametrize(
    ("x", "weight", "rule"),
    [
        (mx.ones((2, 8)), mx.ones(7), r"weight must be a float array \(8,\)"),
        (mx.ones((2, 8)), mx.ones(8, mx.int32), r"weight must be a float array \(8,\)"),
        (mx.ones((2, 8), mx.int32), None, r"x must be a float array \[\.\.\., dims\]"),
        (mx.array(1.0), None, r"x must be a float array \[\.\.\., dims\]"),
        (np.ones((2, 8)), None, "x must be of type array"),
    ],
)
def test_refuses_what_does_not_fit(x: mx.array, weight: mx.array | None, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        rms_norm(x, weight, EPS)
