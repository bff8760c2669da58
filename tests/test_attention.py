"""``moefast.ops.attention`` on every backend, against float64."""

from __future__ import annotations

import mlx.core as mx
import oracle
import pytest
from factories import Floats
from formats import DTYPES

import moefast
from moefast.ops import attention
from moefast.testing import assert_close, float64

BACKENDS = tuple(name for name, reason in moefast.backends().items() if reason is None)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("length", "keys", "causal"),
    [
        (1, 1, False),  # the first token
        (1, 300, False),  # a decoded token
        (3, 70, True),  # a few, speculated
        (65, 65, True),  # a prompt, one past a block
        (40, 170, True),  # a prompt's second part
        (17, 33, False),
    ],
)
@pytest.mark.parametrize(("heads", "kv_heads", "dims"), [(4, 1, 64), (6, 6, 40), (8, 2, 128)])
def test_equals_the_oracle(
    floats: Floats,
    backend: str,
    dtype: mx.Dtype,
    length: int,
    keys: int,
    causal: bool,
    heads: int,
    kv_heads: int,
    dims: int,
) -> None:
    q = floats(2, heads, length, dims, dtype=dtype)
    k, v = (floats(2, kv_heads, keys, dims, dtype=dtype) for _ in range(2))
    scale = dims**-0.5
    y = attention(q, k, v, scale=scale, causal=causal, backend=backend)
    assert_close(y, oracle.attention(q, k, v, scale, causal), "attention", reductions=(dims, keys))


@pytest.mark.parametrize("backend", BACKENDS)
def test_reads_views_where_they_lie(floats: Floats, backend: str) -> None:
    """Queries are a transposed product, keys and values a part of the cache; or worse."""
    q = floats(1, 5, 4, 32).transpose(0, 2, 1, 3)
    cache = floats(1, 2, 64, 32)
    k, v = cache[:, :, 3:20], cache[:, :, ::-1][:, :, 3:20].transpose(0, 1, 3, 2).swapaxes(2, 3)
    y = attention(q, k, v, scale=0.2, causal=True, backend=backend)
    assert_close(y, oracle.attention(q, k, v, 0.2, True), "attention", reductions=(32, 17))
    across = floats(1, 2, 32, 17).swapaxes(2, 3)  # values of a head are not neighbours
    y = attention(q, across, across, scale=0.2, causal=True, backend=backend)
    assert_close(y, oracle.attention(q, across, across, 0.2, True), "attention", reductions=(32, 17))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_mlx_own(floats: Floats, backend: str) -> None:
    q, k, v = floats(1, 4, 5, 16), floats(1, 2, 9, 16), floats(1, 2, 9, 16)

    def loss(q: mx.array, k: mx.array, v: mx.array, name: str) -> mx.array:
        return (attention(q, k, v, scale=0.25, causal=True, backend=name) ** 2).sum()

    for argnum in range(3):
        got = mx.grad(loss, argnum)(q, k, v, backend)
        want = mx.grad(loss, argnum)(q, k, v, "reference")
        assert_close(got, float64(want), "attention", reductions=(16, 9), gradient=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles(floats: Floats, backend: str) -> None:
    def run(q: mx.array, k: mx.array) -> mx.array:
        return attention(q, k, k, scale=0.25, causal=True, backend=backend)

    compiled = mx.compile(run)
    for length in (1, 6):
        q, k = floats(1, 4, length, 16), floats(1, 2, 9, 16)
        assert mx.array_equal(compiled(q, k), run(q, k))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_queries_give_nothing(backend: str) -> None:
    k = mx.ones((1, 2, 3, 8))
    assert attention(mx.ones((1, 4, 0, 8)), k, k, scale=1.0, causal=True, backend=backend).shape == (1, 0, 32)


@pytest.mark.parametrize(
    ("shapes", "rule"),
    [
        (((4, 8), (1, 2, 3, 8), (1, 2, 3, 8)), "must be \\[batch, heads, length, dims\\]"),
        (((1, 4, 5, 8), (1, 3, 5, 8), (1, 3, 5, 8)), "keys must be"),
        (((1, 4, 5, 8), (1, 2, 5, 9), (1, 2, 5, 9)), "keys must be"),
        (((1, 4, 5, 8), (1, 2, 0, 8), (1, 2, 0, 8)), "keys must be"),
        (((1, 4, 5, 8), (1, 2, 5, 8), (1, 2, 6, 8)), "values must be"),
        (((1, 4, 5, 8), (1, 2, 4, 8), (1, 2, 4, 8)), "causal attention needs at least length=5 keys, got 4"),
    ],
)
def test_refuses_what_does_not_fit(shapes: tuple[tuple[int, ...], ...], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        attention(*(mx.ones(shape) for shape in shapes), scale=1.0, causal=True)


def test_refuses_mixed_dtypes() -> None:
    k = mx.ones((1, 2, 3, 8), mx.float16)
    with pytest.raises(ValueError, match="one dtype"):
        attention(mx.ones((1, 4, 3, 8)), k, k, scale=1.0, causal=False)
