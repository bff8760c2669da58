"""``moefast.ops.logsumexp`` on every backend, against float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from conftest import Floats
from formats import DTYPES

import moefast
from moefast.ops import logsumexp
from moefast.testing import Float64, assert_close, float64

BACKENDS = tuple(name for name, reason in moefast.backends().items() if reason is None)
INF, NAN = float("inf"), float("nan")


def oracle(x: mx.array) -> Float64:
    """As the formula says, of values that have no infinity among them."""
    values = float64(x)
    largest = values.max(axis=-1, keepdims=True)
    y: Float64 = largest + np.log(np.exp(values - largest).sum(axis=-1, keepdims=True))
    return y


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", [1, 7, 4096, 50_001])
@pytest.mark.parametrize("rows", [(), (3,), (2, 5)], ids=str)
def test_is_the_formula(
    floats: Floats, backend: str, dtype: mx.Dtype, dims: int, rows: tuple[int, ...]
) -> None:
    for size in (1e-3, 3, 30):
        x = (size * floats(*rows, dims)).astype(dtype)
        y = logsumexp(x, backend=backend)
        assert (y.dtype, y.shape) == (dtype, (*rows, 1))
        assert_close(y, oracle(x), "logsumexp", reductions=(dims,))


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(floats: Floats, backend: str) -> None:
    for x in (floats(2, 3, 96)[..., 32:64], floats(32, 5).T, floats(6, 32)[::2], floats(5, 64)[:, ::2]):
        assert_close(logsumexp(x, backend=backend), oracle(x), "logsumexp", reductions=(32,))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("values", "want"),
    [
        ([1.0, INF, 2.0], INF),
        ([-INF, -INF, -INF], -INF),
        ([-INF, 0.0, -INF], 0.0),
        ([-INF, 3e38, 1.0], 3e38),
        ([1.0, NAN, 2.0], NAN),
        ([-INF, NAN, -INF], NAN),
    ],
)
def test_what_is_not_finite(backend: str, values: list[float], want: float) -> None:
    for x in (mx.array([values]), mx.array([[-INF] * 5000 + values])):
        assert np.array_equal(np.asarray(logsumexp(x, backend=backend)), [[np.float32(want)]], equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_mlx_own(floats: Floats, backend: str) -> None:
    x = floats(3, 16)

    def loss(x: mx.array, name: str) -> mx.array:
        return (logsumexp(x, backend=name) ** 2).sum()

    got, want = (mx.grad(loss)(x, name) for name in (backend, "reference"))
    assert_close(got, float64(want), "logsumexp", reductions=(16,), gradient=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_and_maps(floats: Floats, backend: str) -> None:
    x = floats(3, 5, 16)

    def run(x: mx.array) -> mx.array:
        return logsumexp(x, backend=backend)

    assert mx.array_equal(mx.compile(run)(x), run(x))
    assert_close(mx.vmap(run)(x), float64(run(x)), "logsumexp", reductions=(16,))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend: str) -> None:
    assert logsumexp(mx.ones((0, 8)), backend=backend).shape == (0, 1)


@pytest.mark.parametrize(
    ("x", "rule"),
    [
        (mx.ones((2, 8), mx.int32), r"x must be a float array \[\.\.\., dims\]"),
        (mx.ones((2, 0)), r"x must be a float array \[\.\.\., dims\]"),
        (mx.array(1.0), r"x must be a float array \[\.\.\., dims\]"),
        (np.ones((2, 8)), "x must be of type array"),
    ],
)
def test_refuses_what_does_not_fit(x: mx.array, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        logsumexp(x)
