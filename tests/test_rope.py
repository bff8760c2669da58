"""``moefast.ops.rope`` on every backend, against float64."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import Floats
from formats import DTYPES

import moefast
from moefast.nn import Rope
from moefast.ops import rope
from moefast.testing import Float64, assert_close, float64

BACKENDS = tuple(name for name, reason in moefast.backends().items() if reason is None)


def oracle(x: mx.array, dims: int, offsets: list[int], freqs: Any, traditional: bool) -> Float64:
    """Pairs as complex numbers, turned."""
    y = float64(x).copy()
    steps = np.arange(x.shape[2])
    positions = np.array([offset + steps for offset in offsets], dtype=np.float64)  # [batch, length]
    turns = np.exp(1j * positions[:, None, :, None] / np.asarray(freqs, dtype=np.float64))
    first, second = (
        (slice(0, dims, 2), slice(1, dims, 2))
        if traditional
        else (slice(0, dims // 2), slice(dims // 2, dims))
    )
    pairs = (y[..., first] + 1j * y[..., second]) * turns
    y[..., first], y[..., second] = pairs.real, pairs.imag
    return y


def wavelengths(base: float, dims: int) -> Float64:
    return base ** (np.arange(0, dims, 2) / dims)


def rounded_angles(backend: str, position: int) -> tuple[int, ...]:
    """What the error of float32 angles counts for: MLX has it, the native kernel makes them in float64."""
    return () if backend == "native" else (position**2,)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize(
    ("length", "offset"), [(1, 0), (1, 500), (5, 3), (300, 100)], ids=lambda value: str(value)
)
@pytest.mark.parametrize(("heads", "size", "dims"), [(1, 8, 8), (3, 40, 20), (4, 128, 128), (2, 6, 2)])
def test_equals_the_oracle(
    floats: Floats,
    backend: str,
    dtype: mx.Dtype,
    traditional: bool,
    length: int,
    offset: int,
    heads: int,
    size: int,
    dims: int,
) -> None:
    x = floats(2, heads, length, size, dtype=dtype)
    y = rope(x, dims, offset=offset, base=1e4, traditional=traditional, backend=backend)
    assert (y.dtype, y.shape) == (dtype, x.shape)
    want = oracle(x, dims, [offset, offset], wavelengths(1e4, dims), traditional)
    assert_close(y, want, "rope", reductions=rounded_angles(backend, offset + length))
    assert mx.array_equal(y[..., dims:], x[..., dims:])


def test_far_positions_keep_their_precision(floats: Floats) -> None:
    """At 10^6 a float32 angle is a tenth of a radian off; the native kernel's is not."""
    if "native" not in BACKENDS:
        pytest.skip("the native backend does not run here")
    x = floats(1, 2, 3, 64)
    y = rope(x, 64, offset=1_000_000, base=1e4, backend="native")
    assert_close(y, oracle(x, 64, [1_000_000], wavelengths(1e4, 64), False), "rope")


@pytest.mark.parametrize("backend", BACKENDS)
def test_freqs_offsets_and_scale(floats: Floats, backend: str) -> None:
    x = floats(2, 3, 4, 16)
    freqs = mx.array(np.linspace(1, 900, 8), dtype=mx.float32)
    y = rope(x, 16, offset=mx.array([7, 30]), freqs=freqs, scale=0.25, backend=backend)
    want = oracle(x, 16, [7, 30], float64(freqs) / 0.25, False)
    # The oracle's positions are whole; a scale on them is one on the wavelengths.
    assert_close(y, want, "rope", reductions=rounded_angles(backend, 40))
    for offset in (mx.array(9), mx.array([9], mx.uint32), mx.array([9, 9], mx.int64)):
        y = rope(x, 16, offset=offset, freqs=freqs, backend=backend)
        assert_close(
            y, oracle(x, 16, [9, 9], float64(freqs), False), "rope", reductions=rounded_angles(backend, 16)
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_wavelengths_stand_still(floats: Floats, backend: str) -> None:
    x = floats(1, 1, 3, 4)
    y = rope(x, 4, offset=2, freqs=mx.array([1.0, float("inf")]), backend=backend)
    assert mx.array_equal(y[..., 1::2], x[..., 1::2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(floats: Floats, backend: str) -> None:
    """Heads out of a fused product, reversed, and with values that are not neighbours."""
    fused = floats(2, 5, 3, 48).transpose(0, 2, 1, 3)[..., 16:32]
    for x in (fused, floats(2, 3, 5, 16)[:, :, ::-1], floats(2, 3, 16, 5).swapaxes(2, 3)):
        y = rope(x, 16, offset=11, base=1e4, backend=backend)
        assert_close(
            y,
            oracle(x, 16, [11, 11], wavelengths(1e4, 16), False),
            "rope",
            reductions=rounded_angles(backend, 16),
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_compile_vmap(floats: Floats, backend: str) -> None:
    x = floats(1, 2, 3, 8)

    def run(x: mx.array, name: str = backend) -> mx.array:
        return rope(x, 8, offset=5, base=1e4, backend=name)

    def loss(x: mx.array, name: str) -> mx.array:
        return (run(x, name) ** 3).sum()

    want = mx.grad(loss)(x, "reference")
    assert_close(mx.grad(loss)(x, backend), float64(want), "rope", reductions=(8,), gradient=True)
    assert mx.array_equal(mx.compile(run)(x), run(x))
    both = mx.stack([x, 2 * x])
    assert_close(mx.vmap(run)(both)[1], float64(run(2 * x)), "rope", reductions=(8,))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend: str) -> None:
    assert rope(mx.ones((1, 2, 0, 8)), 8, offset=0, base=1e4, backend=backend).shape == (1, 2, 0, 8)


def test_layer(floats: Floats) -> None:
    x = floats(1, 2, 3, 16)
    layer = Rope(8, base=1e4, scale=0.5, factor=2.0).eval()
    turned = mx.concatenate([2.0 * x[..., :8], x[..., 8:]], axis=-1)
    assert mx.array_equal(layer(x, offset=4), rope(turned, 8, offset=4, base=1e4, scale=0.5))
    assert not layer.parameters()


@pytest.mark.parametrize(
    ("x", "dims", "settings", "rule"),
    [
        (mx.ones((2, 8)), 8, {"base": 1e4}, "x must be a float array"),
        (mx.ones((1, 1, 2, 8), mx.int32), 8, {"base": 1e4}, "x must be a float array"),
        (mx.ones((1, 1, 2, 8)), 7, {"base": 1e4}, r"dims must be even and in 2\.\.8, got 7"),
        (mx.ones((1, 1, 2, 8)), 10, {"base": 1e4}, r"dims must be even and in 2\.\.8, got 10"),
        (mx.ones((1, 1, 2, 8)), 8, {}, "either base or freqs"),
        (mx.ones((1, 1, 2, 8)), 8, {"base": 1e4, "freqs": mx.ones(4)}, "either base or freqs"),
        (mx.ones((1, 1, 2, 8)), 8, {"freqs": mx.ones(5)}, r"freqs must be a float array \(4,\)"),
        (mx.ones((1, 1, 2, 8)), 8, {"base": 1e4, "offset": mx.ones(2, mx.int32)}, "offset must be"),
        (mx.ones((1, 1, 2, 8)), 8, {"base": 1e4, "offset": mx.array([0.5])}, "offset must be"),
    ],
)
def test_refuses_what_does_not_fit(x: mx.array, dims: int, settings: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        rope(x, dims, **{"offset": 0, **settings})
