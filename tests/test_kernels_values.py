"""The CPU kernels on values at the edges: outliers, denormals, zeros, huge and tiny, infinite, NaN. Every
format on every instruction set, against the float64 oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import oracle
import pytest
from factories import Floats, MakeProjection
from formats import BY_NAME, DTYPES, FORMATS, Format
from numpy_kernels import as_mlx, as_numpy, held, on_each

from moefast import Projection, QuantSpec
from moefast.testing import Float64, assert_close, float64, unit_roundoff

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
formats = pytest.mark.parametrize("format_", FORMATS, ids=lambda format_: format_.name)

IN, OUT = 256, 80
# One row of activations, a few, and enough for tiles.
COUNTS = (1, 3, 20)


def check(x: mx.array, weight: Projection) -> None:
    """``x @ weight.T`` on each instruction set is near the truth."""
    want = oracle.project(float64(x), weight)

    def check_on(engine: Any) -> None:
        y = as_mlx(engine.matmul(as_numpy(x), held(weight)), x.dtype)
        assert_close(y, want, "quantized_matmul", reductions=(weight.layout.in_dims,))

    on_each(check_on)


# -- activations -------------------------------------------------------------------------------------------


@dtypes
@formats
def test_outliers(dtype: mx.Dtype, format_: Format, floats: Floats, projection: MakeProjection) -> None:
    """Single values of 60 times the others' size: what coarse quantization of activations cannot hold."""
    weight = projection(OUT, IN, **format_.of(dtype))
    for tokens in COUNTS:
        x = floats(tokens, IN, dtype=dtype)
        x[:, 5::64] *= 60
        check(x, weight)


@formats
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_tiny_and_huge_rows(
    format_: Format, scale: float, floats: Floats, projection: MakeProjection
) -> None:
    """Rows of very different sizes side by side, within the range of the dtype."""
    for dtype in (mx.float32, mx.bfloat16):
        weight = projection(OUT, IN, **format_.of(dtype))
        for tokens in COUNTS:
            x = floats(tokens, IN, dtype=dtype)
            x[::2] *= scale
            check(x, weight)


@dtypes
@formats
def test_denormals_and_zeros(
    dtype: mx.Dtype, format_: Format, floats: Floats, projection: MakeProjection
) -> None:
    """Among ordinary values they vanish; a group or a row of nothing else gives what little it has."""
    weight = projection(OUT, IN, **format_.of(dtype))
    tiny = {mx.float32: 1e-41, mx.float16: 3e-7, mx.bfloat16: 1e-40}[dtype]
    for tokens in COUNTS:
        x = floats(tokens, IN, dtype=dtype)
        x[:, ::3] = tiny
        x[:, 64:128] = 0  # a group of zeros
        x[:, 128:192] = tiny
        check(x, weight)
        x[0] = 0
        check(x, weight)  # of a row of zeros nothing but zeros is right


# -- weights -----------------------------------------------------------------------------------------------


@dtypes
@formats
@pytest.mark.parametrize("up", [True, False], ids=["huge weights", "tiny weights"])
def test_tiny_times_huge(
    up: bool, dtype: mx.Dtype, format_: Format, floats: Floats, projection: MakeProjection
) -> None:
    """Denormal activations or scales (float16's) that give ordinary results with the other operand."""
    powers = [(-16, 14)] if dtype == mx.float16 else [(-16, 14), (-95, 90)]
    for low, high in powers:
        of_weight, of_x = (high, low) if up else (low, min(high, 12))
        if format_.quant is not None and format_.quant.mode == "nvfp4":
            of_weight = max(min(of_weight, 8), -6)  # what its scales can say
        plain = projection(OUT, IN, dtype=mx.float32).weight * 2.0**of_weight
        form = format_.of(dtype)
        quant: Any = form["quant"]
        stored = plain.astype(form["dtype"])
        if quant is None:
            weight = Projection(stored)
        else:
            weight = Projection(*mx.quantize(stored, **quant.mlx_arguments()), quant=quant)
        for tokens in COUNTS:
            check((floats(tokens, IN) * 2.0**of_x).astype(dtype), weight)


@dtypes
@formats
def test_groups_of_zeros(
    dtype: mx.Dtype, format_: Format, floats: Floats, projection: MakeProjection
) -> None:
    form = format_.of(dtype)
    quant: Any = form["quant"]
    plain = projection(OUT, IN, dtype=form["dtype"]).weight
    plain[::3] = 0
    plain[:, 64:192] = 0
    weight = Projection(plain)
    if quant is not None:
        weight = Projection(*mx.quantize(plain, **quant.mlx_arguments()), quant=quant)
    assert not oracle.dequantize(weight)[::3].any()
    for tokens in COUNTS:
        check(floats(tokens, IN, dtype=dtype), weight)


@dtypes
@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_every_code_and_every_scale(
    mode: str, dtype: mx.Dtype, floats: Floats, rng: np.random.Generator
) -> None:
    """Codes that no quantization makes included: negative zeros, e4m3's 0x7f. Exponents stay within what
    float32, and the result's dtype, can hold."""
    bits, group = (8, 32) if mode == "mxfp8" else (4, 16 if mode == "nvfp4" else 32)
    quant = QuantSpec(mode=mode, bits=bits, group_size=group)
    codes = rng.integers(0, 256, (OUT, IN * bits // 8), np.uint8)
    ranges = [(0, 256)] if mode == "nvfp4" else [(110, 136)] if dtype == mx.float16 else [(0, 60), (60, 220)]
    for low, high in ranges:
        shape = (OUT, IN // group)
        scales = rng.integers(low, high, shape, np.uint8)
        if mode != "nvfp4":  # one size for each row of the weight, or the largest would hide the others
            scales = np.broadcast_to(scales[:1, :1], shape) + rng.integers(0, 3, shape, np.uint8)
        weight = Projection(mx.array(codes.view(np.uint32)), mx.array(scales), quant=quant)
        for tokens in COUNTS:
            check(floats(tokens, IN, dtype=dtype, scale=2.0**-10 if mode == "nvfp4" else 1.0), weight)


@pytest.mark.parametrize("global_scale", [1e-30, 1e-3, 1.0, 1e30])
def test_global_scales_of_any_size(global_scale: float, floats: Floats, projection: MakeProjection) -> None:
    p = projection(OUT, IN, **BY_NAME["nvfp4"].of(mx.float32))
    weight = Projection(p.weight, p.scales, global_scale=mx.array(global_scale), quant=p.quant)
    for dtype in (mx.float32, mx.bfloat16):
        for tokens in COUNTS:
            check(floats(tokens, IN, dtype=dtype), weight)


# -- infinity and NaN --------------------------------------------------------------------------------------

INF, NAN = float("inf"), float("nan")
DIRT = {
    "inf": {77: INF},
    "-inf": {77: -INF},
    "nan": {77: NAN},
    "both": {3: INF, 200: -INF},  # NaN wherever the weights have one sign
    "inf and nan": {5: INF, 100: NAN},
    "in the last group": {IN - 1: -INF},
    "at the start": {0: INF},
}


@dtypes
@formats
@pytest.mark.parametrize("dirt", DIRT.values(), ids=DIRT)
def test_what_is_not_finite_stays_in_its_row_and_propagates(
    dirt: dict[int, float], dtype: mx.Dtype, format_: Format, floats: Floats, projection: MakeProjection
) -> None:
    weight = projection(OUT, IN, **format_.of(dtype))
    values = oracle.dequantize(weight)
    # A weight of 0 makes NaN of infinity; one that is nearly 0 may be dequantised as either.
    sure = (np.abs(values[:, list(dirt)]) > unit_roundoff("bfloat16") * np.abs(values).max()).all(axis=-1)
    assert sure.sum() > OUT // 8
    for tokens in COUNTS:
        x = floats(tokens, IN, dtype=dtype)
        for at, value in dirt.items():
            x[tokens // 2, at] = value
        with np.errstate(invalid="ignore"):
            want = oracle.project(float64(x), weight)
        on_each(_check_dirty(x, weight, want, tokens // 2, sure))


def _check_dirty(
    x: mx.array, weight: Projection, want: Float64, dirty: int, sure: Any
) -> Callable[[Any], None]:
    clean = [i for i in range(x.shape[0]) if i != dirty]

    def check_on(engine: Any) -> None:
        y = as_mlx(engine.matmul(as_numpy(x), held(weight)), x.dtype)
        np.testing.assert_array_equal(kinds_of(float64(y)[dirty])[sure], kinds_of(want[dirty])[sure])
        if clean:
            assert_close(y[mx.array(clean)], want[clean], "quantized_matmul", reductions=(IN,))

    return check_on


def kinds_of(values: Float64) -> Any:
    """0 where finite, the sign of infinity, 2 for NaN."""
    return np.where(np.isnan(values), 2, np.where(np.isinf(values), np.sign(values), 0))
