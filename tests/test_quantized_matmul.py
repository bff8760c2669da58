"""``quantized_matmul`` against the float64 oracle."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import oracle
import pytest
from factories import Floats, MakeProjection
from formats import DTYPES, FORMATS, Format

from moefast import Projection, quantized_matmul
from moefast.ops import quantized_matmuls
from moefast.testing import assert_close, float64

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_backend = pytest.mark.usefixtures("backend")


def check(x: mx.array, weight: Projection) -> mx.array:
    y = quantized_matmul(x, weight)
    assert_close(
        y, oracle.project(float64(x), weight), "quantized_matmul", dtype=x.dtype, reductions=(x.shape[-1],)
    )
    return y


@every_backend
@dtypes
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("format_", FORMATS, ids=lambda format_: format_.name)
def test_formats(
    format_: Format, bias: bool, dtype: mx.Dtype, floats: Floats, projection: MakeProjection
) -> None:
    y = check(floats(5, 128, dtype=dtype), projection(96, 128, bias=bias, **format_.of(dtype)))
    if format_.dtype is None:
        assert y.dtype == dtype


@every_backend
@pytest.mark.parametrize("format_", FORMATS[:4], ids=lambda format_: format_.name)
@pytest.mark.parametrize("lead", [(), (0,), (1,), (7,), (130,), (2, 3), (2, 0)], ids=str)
def test_leading_dimensions(
    format_: Format, lead: tuple[int, ...], floats: Floats, projection: MakeProjection
) -> None:
    y = check(floats(*lead, 64), projection(48, 64, bias=True, **format_.of(mx.float32)))
    assert y.shape == (*lead, 48)


@every_backend
@dtypes
def test_strided_input(dtype: mx.Dtype, floats: Floats, projection: MakeProjection) -> None:
    weight = projection(48, 64, quant=FORMATS[4].quant, dtype=dtype)
    check(floats(64, 10, dtype=dtype).T[::2], weight)
    check(floats(5, 128, dtype=dtype)[:, ::2], weight)


@every_backend
@pytest.mark.parametrize("format_", [FORMATS[0], FORMATS[9]], ids=lambda format_: format_.name)
def test_gradient_of_the_input(format_: Format, floats: Floats, projection: MakeProjection) -> None:
    weight, x, slopes = (
        projection(32, 128, bias=True, **format_.of(mx.float32)),
        floats(2, 128),
        floats(2, 32),
    )
    got = mx.grad(lambda x: (quantized_matmul(x, weight) * slopes).sum())(x)
    want = float64(slopes) @ oracle.dequantize(weight)
    assert_close(got, want, "quantized_matmul", reductions=(32,), gradient=True)


@every_backend
def test_compiled_for_two_shapes(floats: Floats, projection: MakeProjection) -> None:
    weight = projection(48, 64, quant=FORMATS[4].quant, bias=True)
    compiled = mx.compile(lambda x: quantized_matmul(x, weight))
    for tokens in (1, 5):
        x = floats(tokens, 64)
        np.testing.assert_array_equal(np.array(compiled(x)), np.array(quantized_matmul(x, weight)))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (mx.zeros((3, 63)), r"\[quantized_matmul\] x.shape\[-1\] must equal in=64, got \(3, 63\)\."),
        (mx.zeros(()), r"\[quantized_matmul\] x.shape\[-1\] must equal in=64, got \(\)\."),
        (mx.zeros((3, 64), mx.uint32), r"\[quantized_matmul\] x must be float32, .*got mlx.core.uint32"),
    ],
)
def test_refuses(x: mx.array, message: str, projection: MakeProjection) -> None:
    with pytest.raises(ValueError, match=message):
        quantized_matmul(x, projection(48, 64))


def test_refuses_a_stack(projection: MakeProjection) -> None:
    with pytest.raises(
        ValueError, match=r"\[quantized_matmul\] weight must be dense \[out, in\], got Layout"
    ):
        quantized_matmul(mx.zeros((3, 64)), projection(4, 48, 64))


# -- several at once ---------------------------------------------------------------------------------------


@every_backend
@dtypes
@pytest.mark.parametrize("tokens", [0, 1, 3, 40, 200])
def test_several_are_as_one_by_one(
    tokens: int, dtype: mx.Dtype, floats: Floats, projection: MakeProjection
) -> None:
    x = floats(tokens, 128, dtype=dtype)
    weights = [
        projection(96, 128, quant=FORMATS[4].quant, dtype=dtype),
        projection(40, 128, quant=FORMATS[4].quant, bias=True, dtype=dtype),
        projection(8, 128, dtype=dtype),
        projection(200, 128, quant=FORMATS[5].quant, dtype=dtype),
    ]
    for y, weight in zip(quantized_matmuls(x, *weights), weights, strict=True):
        alone = quantized_matmul(x, weight)
        assert y.dtype == alone.dtype
        np.testing.assert_array_equal(float64(y), float64(alone))


@every_backend
def test_gradients_of_several(floats: Floats, projection: MakeProjection) -> None:
    """Of all outputs, by x and by the weights that have a derivative."""
    plain, packed = projection(16, 64), projection(24, 64, quant=FORMATS[4].quant)

    def loss(x: mx.array, w: mx.array) -> mx.array:
        a, b = quantized_matmuls(x, Projection(w), packed)
        return (a * a).sum() + (b * b).sum()

    def one_by_one(x: mx.array, w: mx.array) -> mx.array:
        a, b = quantized_matmul(x, Projection(w)), quantized_matmul(x, packed)
        return (a * a).sum() + (b * b).sum()

    x = floats(3, 64)
    got, want = (mx.grad(f, argnums=(0, 1))(x, plain.weight) for f in (loss, one_by_one))
    for mine, theirs in zip(got, want, strict=True):
        assert_close(mine, float64(theirs), "quantized_matmul", reductions=(64, 64), gradient=True)


def test_several_refuse(floats: Floats, projection: MakeProjection) -> None:
    x, weight = floats(1, 64), projection(16, 64)
    with pytest.raises(ValueError, match=r"\[quantized_matmuls\] there must be at least one weight, got"):
        quantized_matmuls(x)
    with pytest.raises(
        ValueError, match=r"\[quantized_matmuls\] weight must be of type Projection, got array"
    ):
        quantized_matmuls(x, weight, weight.weight)
    with pytest.raises(ValueError, match=r"\[quantized_matmuls\] x.shape\[-1\] must equal in=32"):
        quantized_matmuls(x, weight, projection(16, 32))
    with pytest.raises(ValueError, match=r"9 weights, not 1\.\.8"):
        quantized_matmuls(x, *[weight] * 9, backend="native")
    half = floats(1, 64, dtype=mx.bfloat16)
    of_half = projection(16, 64, quant=FORMATS[4].quant, dtype=mx.bfloat16)
    with pytest.raises(ValueError, match="products of dtypes bfloat16, float32"):
        quantized_matmuls(half, of_half, projection(16, 64, dtype=mx.float16), backend="native")
