"""``moefast.ops.add_rms_norm`` and ``add_layer_norm`` on every backend: the bits of the sum and the norm one
by one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import Floats
from formats import DTYPES

import moefast
from moefast.nn import LayerNorm, RMSNorm
from moefast.ops import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from moefast.testing import assert_close, float64

BACKENDS = tuple(name for name, reason in moefast.backends().items() if reason is None)
EPS = 1e-5
MULTIPLIERS = [1.0, 0.22]  # Granite's

backends = pytest.mark.parametrize("backend", BACKENDS)
multipliers = pytest.mark.parametrize("multiplier", MULTIPLIERS)

Both = tuple[mx.array, mx.array]


def one_by_one(
    x: mx.array, branch: mx.array, multiplier: float, norm: Callable[[mx.array], mx.array]
) -> Both:
    h = x + branch if multiplier == 1.0 else x + branch * multiplier
    return h, norm(h)


def assert_same(got: Both, want: Both) -> None:
    for mine, theirs in zip(got, want, strict=True):
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        assert mx.array_equal(mine, theirs, equal_nan=True)


@backends
@multipliers
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", [1, 7, 64, 2048, 3001])
@pytest.mark.parametrize("rows", [(), (3,), (2, 300)], ids=str)
def test_bits_are_those_of_sum_and_norm(
    floats: Floats, backend: str, multiplier: float, dtype: mx.Dtype, dims: int, rows: tuple[int, ...]
) -> None:
    x, branch = 3 * floats(*rows, dims, dtype=dtype), floats(*rows, dims, dtype=dtype)
    weight, bias = floats(dims, dtype=dtype), floats(dims, dtype=dtype)
    how: dict[str, Any] = {"multiplier": multiplier, "backend": backend}
    for w in (weight, None):
        got = add_rms_norm(x, branch, w, EPS, **how)
        assert_same(got, one_by_one(x, branch, multiplier, lambda h: rms_norm(h, w, EPS, backend=backend)))  # noqa: B023
        for b in (bias, None):
            got = add_layer_norm(x, branch, w, b, EPS, **how)
            want = one_by_one(
                x,
                branch,
                multiplier,
                lambda h: layer_norm(h, w, b, EPS, backend=backend),  # noqa: B023
            )
            assert_same(got, want)


@backends
@multipliers
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("of_branch", DTYPES, ids=str)
def test_dtypes_promote(
    floats: Floats, backend: str, multiplier: float, dtype: mx.Dtype, of_branch: mx.Dtype
) -> None:
    x, branch = floats(4, 64, dtype=dtype), floats(4, 64, dtype=of_branch)
    for weight in (floats(64, dtype=dtype), floats(64)):
        got = add_rms_norm(x, branch, weight, EPS, multiplier=multiplier, backend=backend)
        want = one_by_one(x, branch, multiplier, lambda h: rms_norm(h, weight, EPS, backend=backend))  # noqa: B023
        assert_same(got, want)


@backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_at_the_ends_of_a_dtype(backend: str, dtype: mx.Dtype) -> None:
    """Sums that overflow, round to even or stay subnormal; infinity and NaN."""
    large, small = mx.finfo(dtype).max, {mx.float16: 2.0**-24}.get(dtype, 1e-39)
    x = mx.array([large, large, 1.0, 256.0, small, float("inf"), float("nan"), -large], dtype)
    branch = mx.array([large, -large, 2.0**-9, 1.0, 3 * small, float("-inf"), 1.0, -large], dtype)
    rows = mx.stack([x, x[::-1], mx.ones(8, dtype)]), mx.stack([branch, branch[::-1], branch])
    for each in range(8):  # alone, so that one that is not finite hides no other
        some = tuple(mx.where(mx.arange(8) == each, of, mx.array(0.5, dtype)) for of in rows)
        got = add_rms_norm(*some, None, EPS, multiplier=0.22, backend=backend)
        want = one_by_one(*some, 0.22, lambda h: rms_norm(h, None, EPS, backend=backend))
        assert_same(got, want)


@backends
def test_any_strides(floats: Floats, backend: str) -> None:
    weight = floats(64)[::2]
    views = (floats(2, 3, 96)[..., 32:64], floats(32, 5).T, floats(6, 32)[::2], floats(5, 64)[:, ::2])
    for x in views:
        for branch in (mx.contiguous(x) * 0.3, mx.broadcast_to(x[..., :1], x.shape)):
            for one, other in ((x, branch), (branch, x)):
                got = add_rms_norm(one, other, weight, EPS, multiplier=0.22, backend=backend)
                want = one_by_one(one, other, 0.22, lambda h: rms_norm(h, weight, EPS, backend=backend))
                assert_same(got, want)


@backends
@multipliers
def test_gradients_are_mlx_own(floats: Floats, backend: str, multiplier: float) -> None:
    """Through the sum, through its norm, and through both."""
    arrays = [floats(3, 16), floats(3, 16), floats(16), floats(16)]

    def loss(function: Any, name: str, parts: tuple[float, float]) -> Callable[..., mx.array]:
        def of(*arrays: mx.array) -> mx.array:
            h, y = function(*arrays, EPS, multiplier=multiplier, backend=name)
            return (parts[0] * h**2).sum() + (parts[1] * y**3).sum()

        return of

    for function, count in ((add_rms_norm, 3), (add_layer_norm, 4)):
        for parts in ((1.0, 0.0), (0.0, 1.0), (0.7, -0.4)):
            for argnums in (*range(count), list(range(count))):
                got, want = (
                    mx.grad(loss(function, name, parts), argnums)(*arrays[:count])
                    for name in (backend, "reference")
                )
                pairs = zip(got, want, strict=True) if isinstance(got, list | tuple) else [(got, want)]
                for mine, theirs in pairs:
                    assert_close(mine, float64(theirs), "norm", reductions=(16,), gradient=True)


@backends
def test_one_of_the_two_may_be_all_that_is_evaluated(floats: Floats, backend: str) -> None:
    x, branch = floats(3, 32), floats(3, 32)
    for i in range(2):
        got = add_rms_norm(x, branch, None, EPS, backend=backend)[i]
        assert mx.array_equal(got, one_by_one(x, branch, 1.0, lambda h: rms_norm(h, None, EPS))[i]) or i == 1
        assert got.shape == (3, 32)


@backends
def test_compiles_maps_and_checkpoints(floats: Floats, backend: str) -> None:
    x, branch, weight = floats(3, 5, 16), floats(3, 5, 16), floats(16)

    def run(x: mx.array, branch: mx.array) -> Both:
        return add_rms_norm(x, branch, weight, EPS, multiplier=0.22, backend=backend)

    assert_same(mx.compile(run)(x, branch), run(x, branch))
    assert_same(mx.checkpoint(run)(x, branch), run(x, branch))
    for mine, theirs in zip(mx.vmap(run)(x, branch), run(x, branch), strict=True):
        assert_close(mine, float64(theirs), "norm", reductions=(16,))
    # Two of one kind become one, two of different multipliers do not.
    twice = mx.compile(lambda x: (run(x, x)[0], add_rms_norm(x, x, weight, EPS, backend=backend)[0]))
    assert_same(twice(x), (run(x, x)[0], x + x))


@backends
def test_no_rows(backend: str) -> None:
    none = mx.ones((0, 8))
    assert [y.shape for y in add_rms_norm(none, none, mx.ones(8), EPS, backend=backend)] == [(0, 8)] * 2


@multipliers
def test_layers_take_a_branch(floats: Floats, multiplier: float) -> None:
    """In training, too, where the reference runs."""
    x, branch = floats(2, 3, 24), floats(2, 3, 24)
    for layer in (RMSNorm(24), LayerNorm(24), LayerNorm(24, bias=False)):
        for mode in (True, False):
            layer.train(mode)
            assert_same(layer(x, branch, multiplier), one_by_one(x, branch, multiplier, layer))


GOOD = mx.ones((2, 8))


@pytest.mark.parametrize("operation", ["add_rms_norm", "add_layer_norm"])
@pytest.mark.parametrize(
    ("x", "branch", "weight", "rule"),
    [
        (GOOD, mx.ones((1, 8)), None, r"branch must be a float array \(2, 8\), got \(\(1, 8\)"),
        (GOOD, mx.ones(8), None, r"branch must be a float array \(2, 8\)"),
        (GOOD, mx.ones((2, 8), mx.int32), None, r"branch must be a float array \(2, 8\)"),
        (GOOD, np.ones((2, 8)), None, "branch must be of type array"),
        (GOOD, None, None, "branch must be of type array"),
        (np.ones((2, 8)), GOOD, None, "x must be of type array"),
        (mx.array(1.0), mx.array(1.0), None, r"x must be a float array \[\.\.\., dims\]"),
        (GOOD, GOOD, mx.ones(7), r"weight must be a float array \(8,\)"),
    ],
)
def test_refuses_what_does_not_fit(operation: str, x: Any, branch: Any, weight: Any, rule: str) -> None:
    run = partial(
        add_rms_norm if operation == "add_rms_norm" else partial(add_layer_norm, bias=None), eps=EPS
    )
    with pytest.raises(ValueError, match=rf"\[{operation}\] {rule}"):
        run(x, branch, weight=weight, eps=EPS)
