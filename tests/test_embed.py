"""``moefast.ops.embed`` on every backend, against float64, and the layer that calls it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import mlx.core as mx
import mlx.nn
import numpy as np
import oracle
import pytest
from factories import MakeProjection
from formats import BY_NAME, DTYPES, FORMATS, Format

import moefast
from moefast import Projection, nn, use_backend
from moefast.backends import native
from moefast.ops import embed
from moefast.testing import assert_close, float64

BACKENDS = tuple(name for name, reason in moefast.backends().items() if reason is None)
QUANTIZED = tuple(format_ for format_ in FORMATS if format_.quant is not None)
INTEGERS = (mx.uint8, mx.int8, mx.uint16, mx.int16, mx.uint32, mx.int32, mx.uint64, mx.int64)
ROWS = 40

on_native = pytest.mark.skipif(not native.bindings().native, reason=native.bindings().reason)


def some(*shape: int, dtype: mx.Dtype = mx.int32, low: int = 0) -> mx.array:
    return mx.random.randint(low, ROWS, shape).astype(dtype)


def dtype_of(weight: Projection) -> mx.Dtype:
    return mx.bfloat16 if weight.layout.dtype == mx.uint8 else weight.layout.dtype


@pytest.fixture
def weight(projection: MakeProjection) -> Projection:
    return projection(ROWS, 128, **BY_NAME["affine4-g64"].of(mx.float32))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format_", QUANTIZED, ids=lambda format_: format_.name)
def test_formats(projection: MakeProjection, backend: str, dtype: mx.Dtype, format_: Format) -> None:
    """More values than are unpacked at a time, more scales than are, and rows that end in the middle."""
    for dims in (128, 2048 + 384):
        weight = projection(ROWS, dims, **format_.of(dtype))
        truth = oracle.dequantize(weight)
        for shape in ((), (3,), (2, 5), (1,), (60,)):
            indices = some(*shape)
            y = embed(indices, weight, backend=backend)
            assert (y.shape, y.dtype) == ((*shape, dims), dtype_of(weight))
            assert_close(y, truth[np.array(indices)], "dequantize")


@on_native
@pytest.mark.parametrize("format_", QUANTIZED, ids=lambda format_: format_.name)
def test_native_rounds_once(projection: MakeProjection, format_: Format) -> None:
    """Half precision is as good as one rounding of a float32 can be."""
    for dtype in (mx.float16, mx.bfloat16):
        weight = projection(ROWS, 256, **format_.of(dtype))
        y = embed(mx.arange(ROWS), weight, backend="native")
        want = oracle.dequantize(weight)
        assert_close(y, want, "quantized_matmul")
        if weight.biases is None and weight.global_scale is None:  # products that float32 holds exactly
            assert mx.array_equal(y, mx.array(want.astype(np.float32)).astype(y.dtype))


@on_native
def test_narrow_groups(projection: MakeProjection) -> None:
    """Rows shorter than what is unpacked at a time."""
    for name, dims in (("affine3-g32", 32), ("mxfp8", 32), ("mxfp4", 96), ("nvfp4-scaled", 48)):
        weight = projection(ROWS, dims, **BY_NAME[name].of(mx.float16))
        indices = some(7)
        want = oracle.dequantize(weight)[np.array(indices)]
        assert_close(embed(indices, weight, backend="native"), want, "dequantize")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_index_dtypes(weight: Projection, backend: str, dtype: mx.Dtype) -> None:
    indices = some(6, dtype=dtype)
    want = oracle.dequantize(weight)[np.array(indices)]
    assert_close(embed(indices, weight, backend=backend), want, "dequantize")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [dtype for dtype in INTEGERS if mx.issubdtype(dtype, mx.signedinteger)])
def test_negative_indices_count_from_the_end(weight: Projection, backend: str, dtype: mx.Dtype) -> None:
    indices = mx.array([-1, -ROWS, 0, ROWS - 1, -3], dtype)
    want = oracle.dequantize(weight)[np.array(indices)]
    assert_close(embed(indices, weight, backend=backend), want, "dequantize")


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(projection: MakeProjection, backend: str) -> None:
    """Of indices, and of every array of the weight."""
    weight = projection(2 * ROWS, 128, **BY_NAME["affine4-g64"].of(mx.bfloat16))
    halved = Projection(weight.weight[::2], weight.scales[::2], weight.biases[::2], quant=weight.quant)
    truth = oracle.dequantize(weight)[::2]
    for indices in (some(4, 6).T, some(12)[::3], mx.broadcast_to(some(1), (5,)), some(3, 4)[:, 1:3]):
        want = truth[np.array(indices)]
        assert_close(embed(indices, halved, backend=backend), want, "dequantize")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)], ids=str)
def test_no_indices(projection: MakeProjection, backend: str, shape: tuple[int, ...]) -> None:
    for name in ("affine4-g64", "mxfp4"):
        weight = projection(ROWS, 128, **BY_NAME[name].of(mx.float16))
        y = embed(mx.zeros(shape, mx.int32), weight, backend=backend)
        mx.eval(y)
        assert (y.shape, y.dtype) == ((*shape, 128), dtype_of(weight))


@on_native
@pytest.mark.parametrize(
    ("index", "dtype"),
    [
        (ROWS, mx.int32),
        (-ROWS - 1, mx.int32),
        (2**32, mx.int64),
        (-(2**63), mx.int64),
        (2**64 - 1, mx.uint64),
        (2**31, mx.uint32),
        (200, mx.uint8),
        (-100, mx.int8),
    ],
    ids=str,
)
def test_out_of_range_is_an_error_when_evaluated(weight: Projection, index: int, dtype: mx.Dtype) -> None:
    bad = mx.array(np.array([1, index], dtype=str(dtype).removeprefix("mlx.core.")))
    y = embed(bad, weight, backend="native")  # nothing is evaluated yet
    with pytest.raises(ValueError, match=rf"^\[embed\] indices must be in -40\.\.39, got {index}\.$"):
        mx.eval(y + 1)
    with contextlib.suppress(ValueError):  # MLX may take it for evaluated
        assert mx.isnan(y).all()
    good = embed(mx.array([1]), weight, backend="native")
    assert_close(good, oracle.dequantize(weight)[[1]], "dequantize")


def of_parts(weight: Projection, indices: mx.array, backend: str) -> Callable[..., mx.array]:
    """A loss of a weight's float arrays."""
    quant = weight.quant

    def loss(scales: mx.array, biases: mx.array) -> mx.array:
        again = Projection(weight.weight, scales, biases, quant=quant)
        return (embed(indices, again, backend=backend) ** 2).sum()

    return loss


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_the_references(weight: Projection, backend: str) -> None:
    for indices in (some(), some(2, 5), mx.array([3, -1, 3])):
        for argnum in (0, 1):
            got = mx.grad(of_parts(weight, indices, backend), argnum)(weight.scales, weight.biases)
            want = mx.grad(of_parts(weight, indices, "reference"), argnum)(weight.scales, weight.biases)
            assert mx.abs(want).max() > 0
            assert_close(got, float64(want), "dequantize", reductions=(64,), gradient=True)


@on_native
def test_tangents_are_mlxs(weight: Projection) -> None:
    indices = mx.array([3, -1, 3])
    parts, tangents = [weight.scales, weight.biases], [weight.biases, weight.scales]
    got, want = (
        mx.jvp(of_parts(weight, indices, name), parts, tangents)[1][0] for name in ("native", "reference")
    )
    assert_close(got.reshape(1), float64(want).reshape(1), "dequantize", reductions=(384,), gradient=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["affine4-g64", "mxfp8", "nvfp4-scaled"])
def test_compiles_and_maps(projection: MakeProjection, backend: str, name: str) -> None:
    weight = projection(ROWS, 128, **BY_NAME[name].of(mx.bfloat16))
    indices = some(3, 5)

    def run(indices: mx.array) -> mx.array:
        return embed(indices, weight, backend=backend)

    compiled = mx.compile(run)
    for shape in ((3, 5), (7,), (3, 5)):
        again = some(*shape)
        assert_close(compiled(again), float64(run(again)), "dequantize")
    if backend == "native" or name == "affine4-g64":  # MLX's fp8 has no vmap
        for axis in (0, 1):
            assert_close(
                mx.vmap(run, axis)(indices), float64(run(mx.moveaxis(indices, axis, 0))), "dequantize"
            )


@pytest.mark.parametrize("backend", BACKENDS)
def test_refuses_what_does_not_fit(weight: Projection, projection: MakeProjection, backend: str) -> None:
    quant = weight.quant
    indices = some(3)
    for bad, of, rule in (
        (mx.ones(3), weight, "indices must be integers, got mlx.core.float32"),
        (mx.ones(3, mx.bool_), weight, "indices must be integers, got mlx.core.bool"),
        (np.arange(3), weight, "indices must be of type array, got ndarray"),
        (indices, weight.weight, "weight must be of type Projection, got array"),
        (indices, projection(ROWS, 128), "weight must be quantized, dense"),
        (indices, projection(2, ROWS, 128, quant=quant), "weight must be quantized, dense"),
        (indices, projection(ROWS, 128, quant=quant, bias=True), "weight must be quantized, dense"),
    ):
        with pytest.raises(ValueError, match=rf"^\[embed\] {rule}"):
            embed(bad, of, backend=backend)


@on_native
def test_the_primitive_reads_nothing_beyond_its_arrays(weight: Projection) -> None:
    """Its own checks: layers call it without those of the operation."""
    call = native.bindings().native.embed
    w, s, b, one = weight.weight, weight.scales, weight.biases, mx.array(1.0)
    indices, codes = some(3), mx.zeros((ROWS, 2), mx.uint8)
    for arrays, packing, rule in (
        ((mx.ones(3), w, s, b, None), (64, 4, "affine"), "indices must be integers"),
        ((indices, w[0], s, b, None), (64, 4, "affine"), "weight must be packed"),
        ((indices, w[:5], s, b, None), (64, 4, "affine"), "weight must be packed"),
        ((indices, w.astype(mx.int32), s, b, None), (64, 4, "affine"), "weight must be packed"),
        ((indices, w, s, b, None), (64, 8, "affine"), "weight must be packed"),
        ((indices, w, s, b, None), (2**30, 4, "affine"), "weight must be packed"),
        ((indices, w, s, None, None), (64, 4, "affine"), "scales and biases must be"),
        ((indices, w, s, b[:5], None), (64, 4, "affine"), "scales and biases must be"),
        ((indices, w, s, b.astype(mx.float16), None), (64, 4, "affine"), "scales and biases must be"),
        ((indices, w, codes, b, None), (64, 4, "mxfp4"), "scales and biases must be"),
        ((indices, w, s, None, None), (64, 4, "mxfp4"), "scales and biases must be"),
        ((indices, w, codes, None, one), (64, 4, "mxfp4"), "global_scale must be"),
        ((indices, w, s, b, one), (64, 4, "affine"), "global_scale must be"),
        ((indices, w, codes, None, mx.ones(1)), (64, 4, "nvfp4"), "global_scale must be"),
    ):
        with pytest.raises(ValueError, match=rf"^\[embed\] {rule}"):
            call(*arrays, *packing)
    for mode, size, rule in (("nvfp4", 64, "weight must have a known format"), ("fp4", 64, "the name must")):
        with pytest.raises(ValueError, match=rule):
            mx.eval(call(indices, w, codes, None, None, size, 4, mode))


# -- the layer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "mxfp8", "nvfp4"])
def test_the_layer_is_mlxs(mode: str) -> None:
    """Same parameters, same values, at the first call and the ones that remember it; in training the
    reference."""
    theirs = mlx.nn.QuantizedEmbedding(ROWS, 128, mode=mode)
    ours = nn.QuantizedEmbedding(ROWS, 128, mode=mode)
    ours.update(theirs.parameters())
    assert ours.parameters().keys() == theirs.parameters().keys()
    ours.eval()
    for shape in ((3,), (3,), (1, 1), (1, 1), (2, 5), (1, 200), (2, 5)):
        indices = some(*shape)
        y, want = ours(indices), theirs(indices)
        assert y.dtype == want.dtype
        assert_close(y, float64(want), "dequantize")
    ours.train()
    assert mx.array_equal(ours(indices), want)


def test_a_tied_layer_remembers_both_uses() -> None:
    layer = nn.Embedding(ROWS, 128).to_quantized(64, 4).eval()
    x, indices = mx.random.normal((1, 128)), some(1)
    for _ in range(3):
        got = layer(indices), layer.as_linear(x)
        with use_backend("reference"):
            want = layer(indices), layer.as_linear(x)
        assert_close(got[0], float64(want[0]), "dequantize")
        assert_close(got[1], float64(want[1]), "quantized_matmul", reductions=(128,))


def test_a_layer_that_changes_is_not_stale() -> None:
    layer = nn.QuantizedEmbedding(ROWS, 128, 64, 4).eval()
    indices = some(2)

    def check() -> None:
        want = mlx.nn.QuantizedEmbedding.__call__(layer, indices)
        for _ in range(2):
            y = layer(indices)
            assert (y.shape, y.dtype) == (want.shape, want.dtype)
            assert_close(y, float64(want), "dequantize")

    check()
    layer.update({"scales": 2 * layer.scales, "biases": 2 * layer.biases})
    check()
    layer.scales[:] = 0.5 * layer.scales
    check()
    layer.set_dtype(mx.float16)
    check()
    layer.bits, layer.group_size = 8, 32
    layer.weight, layer.scales, layer.biases = mx.quantize(mx.random.normal((ROWS, 128)), 32, 8)
    check()
    layer.mode, layer.bits, layer.biases = "mxfp4", 4, None
    layer.weight, layer.scales = mx.quantize(mx.random.normal((ROWS, 128)), mode="mxfp4")
    check()
