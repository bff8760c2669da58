"""The decode kernels against MLX's own launches, one after another: equal in every bit.

MLX's are its headers, and the kernels that Apple's compiler made of them where ``make oracle`` has fetched
those.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx_chain as chain
import numpy as np
import pytest
from factories import Floats, MakeExperts, MakeProjection
from formats import ACTIVATIONS, FORMATS, Format
from metal import emulated, needs_emulator
from mlx_kernels import bits

from moefast import Activation, ExpertWeights, QuantSpec, SharedExpert
from moefast.backends.metal import decode
from moefast.emulator.metallib import Metallib

pytestmark = needs_emulator


PLACES = (
    Path(__file__).resolve().parents[1] / "build" / "oracle" / "mlx" / "lib" / "mlx.metallib",
    Path(mx.__file__).resolve().parent / "lib" / "mlx.metallib",  # on a Mac
)


@pytest.fixture(scope="module")
def metallib() -> Metallib:
    for place in PLACES:
        if place.exists():
            return Metallib(place)
    pytest.skip("needs Apple-compiled kernels: make oracle")


class Shape(NamedTuple):
    """Of a model's experts; ``width_rows`` and ``hidden_rows`` are how many output rows are computed: rows do
    not depend on each other."""

    hidden: int
    width: int
    top_k: int
    float32_weights: bool
    width_rows: int = 128
    hidden_rows: int = 128


MODELS = {
    "granite": Shape(1536, 512, 8, True),
    "glm4": Shape(4096, 1408, 8, True),
    "qwen2": Shape(2048, 1408, 4, False),
    "bailing": Shape(2048, 1408, 6, False),
    "dbrx": Shape(6144, 10752, 4, False, 64, 64),
}


def gate_up_of_mlx(x: mx.array, weights: ExpertWeights, indices: mx.array) -> np.ndarray:
    kind = chain.KINDS[x.dtype]
    experts = np.array(indices).flatten()
    rows = np.repeat(np.arange(x.shape[0]), indices.shape[1])
    up = chain.gather_qmv(weights.up, bits(x), rows, experts, kind)
    gate = up if weights.gate is None else chain.gather_qmv(weights.gate, bits(x), rows, experts, kind)
    return chain.activate(kind, weights.activation, gate, up)


def down_of_mlx(inner: mx.array, weights: ExpertWeights, indices: mx.array) -> np.ndarray:
    routes = indices.size
    return chain.gather_qmv(
        weights.down,
        bits(inner.reshape(routes, -1)),
        np.arange(routes),
        np.array(indices).flatten(),
        chain.KINDS[inner.dtype],
    )


def assert_equal(got: mx.array, want: np.ndarray) -> None:
    mine = bits(got)
    differing = np.count_nonzero(mine.reshape(want.shape) != want)
    assert differing == 0, f"{differing} of {want.size}"


def routes_of(rng: np.random.Generator, tokens: int, top_k: int) -> mx.array:
    rows = [rng.permutation(top_k + 2)[:top_k] for _ in range(tokens)]
    return mx.array(np.array(rows), mx.uint32)


HALVES = (mx.bfloat16, mx.float16)


def daily(model: str, dtype: mx.Dtype, bits_: int) -> bool:
    """Every model once in bfloat16. And two in float32, where a sum in another order shows in most outputs:
    to a half type nearly all of them round alike."""
    if dtype == mx.float32:
        return (model, bits_) in (("granite", 8), ("glm4", 4))
    return bits_ == 4 and (dtype == mx.bfloat16 or model == "granite")


CASES = [
    pytest.param(
        model,
        dtype,
        bits_,
        id=f"{model}-{str(dtype).removeprefix('mlx.core.')}-{bits_}",
        marks=() if daily(model, dtype, bits_) else pytest.mark.slow,
    )
    for model in MODELS
    for dtype in (mx.bfloat16, mx.float16, mx.float32)
    for bits_ in (4, 8)
]


@pytest.mark.parametrize(("model", "dtype", "bits_"), CASES)
def test_gate_up_of_the_models(
    model: str,
    dtype: mx.Dtype,
    bits_: int,
    expert_weights: MakeExperts,
    floats: Floats,
    rng: np.random.Generator,
) -> None:
    shape = MODELS[model]
    weights = expert_weights(
        shape.top_k + 2, shape.hidden, shape.width_rows, quant=QuantSpec(bits=bits_), dtype=dtype
    )
    x, indices = floats(1, shape.hidden, dtype=dtype), routes_of(rng, 1, shape.top_k)
    with emulated(check=False):
        got = decode.gate_up(x, weights, indices)
    assert_equal(got, gate_up_of_mlx(x, weights, indices))


@pytest.mark.parametrize(("model", "dtype", "bits_"), CASES)
def test_down_of_the_models(
    model: str,
    dtype: mx.Dtype,
    bits_: int,
    expert_weights: MakeExperts,
    floats: Floats,
    rng: np.random.Generator,
) -> None:
    shape = MODELS[model]
    weights = expert_weights(
        shape.top_k + 2, shape.hidden_rows, shape.width, quant=QuantSpec(bits=bits_), dtype=dtype
    )
    inner, indices = floats(1, shape.top_k, shape.width, dtype=dtype), routes_of(rng, 1, shape.top_k)
    route_weights = mx.softmax(floats(1, shape.top_k)).astype(mx.float32 if shape.float32_weights else dtype)
    with emulated(check=False):
        each = decode.down(inner, weights, indices)
        combined = decode.down_combine(inner, weights, indices, route_weights)
    want = down_of_mlx(inner, weights, indices)
    assert_equal(each, want)
    rows = want.reshape(1, shape.top_k, -1)
    assert_equal(combined, chain.combine(rows, dtype, bits(route_weights), route_weights.dtype))


@pytest.mark.parametrize("bits_", [4, 8])
@pytest.mark.parametrize("dtype", [mx.float32, *(pytest.param(d, marks=pytest.mark.slow) for d in HALVES)])
@pytest.mark.parametrize("width", [512, 1408], ids=["fast", "plain"])
def test_apples_own_kernels(
    dtype: mx.Dtype,
    bits_: int,
    width: int,
    metallib: Metallib,
    expert_weights: MakeExperts,
    floats: Floats,
    rng: np.random.Generator,
) -> None:
    """gather_qmv, its product with the weights and the sum, as Apple's compiler made them. (The activation is
    compiled on the user's machine.)"""
    quant, top_k = QuantSpec(bits=bits_), 4
    first = expert_weights(6, 2048, 64, quant=quant, dtype=dtype)
    second = expert_weights(6, 64, width, quant=quant, dtype=dtype)
    x, inner = floats(1, 2048, dtype=dtype), floats(1, top_k, width, dtype=dtype)
    indices = routes_of(rng, 1, top_k)
    route_weights = mx.softmax(floats(1, top_k)).astype(dtype)
    with emulated(check=False):
        got = decode.gate_up(x, first, indices)
        combined = decode.down_combine(inner, second, indices, route_weights)
    with chain.compiled_by_apple(metallib):
        assert_equal(got, gate_up_of_mlx(x, first, indices))
        rows = down_of_mlx(inner, second, indices).reshape(1, top_k, -1)
        assert_equal(combined, chain.combine(rows, dtype, bits(route_weights), dtype))


FORMATS_HERE = [
    pytest.param(
        format_,
        dtype,
        id=f"{format_.name}-{str(dtype).removeprefix('mlx.core.')}",
        marks=()
        if dtype == mx.float32 and not format_.name.endswith(("g32", "g128", "nvfp4", "4-g64", "8-g64"))
        else pytest.mark.slow,
    )
    for format_ in FORMATS
    if format_.quant is not None and format_.dtype is None
    for dtype in (mx.bfloat16, mx.float16, mx.float32)
]


# Up has what the longer chunks need, K a multiple of 512; down, with 384 or 192, only that of 6 and 8 bits.
@pytest.mark.parametrize(("format_", "dtype"), FORMATS_HERE)
def test_every_packed_format(
    format_: Format, dtype: mx.Dtype, expert_weights: MakeExperts, floats: Floats
) -> None:
    assert format_.quant is not None
    width = 384 if format_.quant.group_size == 128 else 192
    weights = expert_weights(3, 512, width, **format_.of(dtype))
    x, indices = floats(2, 512, dtype=dtype), mx.array([[2, 0], [1, 2]], mx.uint32)
    with emulated(check=False):
        inner = decode.gate_up(x, weights, indices)
        y = decode.down(inner, weights, indices)
    assert_equal(inner, gate_up_of_mlx(x, weights, indices))
    assert_equal(y, down_of_mlx(inner, weights, indices))


@pytest.mark.parametrize(
    "activation", [a for a in ACTIVATIONS if a.name in ("swiglu_oai", "relu2")], ids=repr
)
def test_activations(activation: Activation, expert_weights: MakeExperts, floats: Floats) -> None:
    weights = expert_weights(3, 512, 64, activation=activation, quant=QuantSpec(), dtype=mx.bfloat16)
    x, indices = floats(1, 512, dtype=mx.bfloat16), mx.array([[2, 0]], mx.uint32)
    with emulated(check=False):
        inner = decode.gate_up(x, weights, indices)
    assert_equal(inner, gate_up_of_mlx(x, weights, indices))


# A copy, in order, eight partial sums.
@pytest.mark.parametrize("top_k", [1, 2, 8, 9, 20, 31])
@pytest.mark.parametrize(
    ("dtype", "weights_dtype"),
    [
        (mx.float32, mx.float32),
        pytest.param(mx.float16, mx.float16, marks=pytest.mark.slow),
        pytest.param(mx.bfloat16, mx.bfloat16, marks=pytest.mark.slow),
        pytest.param(mx.bfloat16, mx.float32, marks=pytest.mark.slow),
        pytest.param(mx.float16, mx.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_combine(
    top_k: int,
    dtype: mx.Dtype,
    weights_dtype: mx.Dtype,
    expert_weights: MakeExperts,
    floats: Floats,
    rng: np.random.Generator,
) -> None:
    weights = expert_weights(top_k + 2, 64, 64, quant=QuantSpec(), dtype=dtype)
    inner, indices = floats(3, top_k, 64, dtype=dtype), routes_of(rng, 3, top_k)
    route_weights = floats(3, top_k).astype(weights_dtype)
    with emulated(check=False):
        each = decode.down(inner, weights, indices)
        y = decode.down_combine(inner, weights, indices, route_weights)
    assert_equal(y, chain.combine(bits(each), dtype, bits(route_weights), weights_dtype))


# Widths of Qwen1.5-MoE and GLM-4.5-Air: either kernel in down.
@pytest.mark.parametrize(
    ("merged", "width", "gate_bits"), [(False, 5632, 8), (True, 1408, 0)], ids=["qwen2", "glm4"]
)
@pytest.mark.parametrize("dtype", [mx.float32, *(pytest.param(d, marks=pytest.mark.slow) for d in HALVES)])
def test_shared_expert(
    dtype: mx.Dtype,
    width: int,
    gate_bits: int,
    merged: bool,
    expert_weights: MakeExperts,
    projection: MakeProjection,
    floats: Floats,
    rng: np.random.Generator,
) -> None:
    """MLX's quantized_matmul for one token, the output gate's sigmoid, product and sum."""
    kind, packed = chain.KINDS[dtype], {"quant": QuantSpec(), "dtype": dtype}
    output_gate = None
    if gate_bits:
        output_gate = projection(1, 2048, quant=QuantSpec(bits=gate_bits), dtype=dtype)
    first = SharedExpert(
        gate=projection(128, 2048, **packed),
        up=projection(128, 2048, **packed),
        down=projection(2048, 128, **packed),
        output_gate=output_gate,
    )
    x, indices = floats(1, 2048, dtype=dtype), routes_of(rng, 1, 4)
    experts = expert_weights(6, 2048, 64, **packed)
    with emulated(check=False):
        if merged:
            routed, shared = decode.gate_up_with_shared(x, experts, indices, first)
            assert_equal(routed, gate_up_of_mlx(x, experts, indices))
        else:
            shared = decode.shared_gate_up(x, first)
    assert first.gate is not None
    gate, up = (chain.qmv(p, bits(x), kind) for p in (first.gate, first.up))
    assert_equal(shared.inner, chain.activate(kind, first.activation, gate, up))
    if output_gate is not None:
        assert shared.logits is not None
        assert_equal(shared.logits, chain.qmv(output_gate, bits(x), kind).reshape(1))

    second = SharedExpert(
        gate=projection(width, 64, **packed),
        up=projection(width, 64, **packed),
        down=projection(64, width, **packed),
        output_gate=projection(1, 64, **packed) if gate_bits else None,
    )
    weights = expert_weights(6, 64, 192, **packed)
    inner, route_weights = floats(1, 4, 192, dtype=dtype), mx.softmax(floats(1, 4)).astype(dtype)
    kept = decode.SharedInner(second, floats(1, width, dtype=dtype), shared.logits)
    with emulated(check=False):
        each = decode.down(inner, weights, indices)
        y = decode.down_combine(inner, weights, indices, route_weights, shared=kept)
    of_shared = chain.qmv(second.down, bits(kept.inner), kind)
    if shared.logits is not None:
        gates = np.broadcast_to(chain.unary(kind, "Sigmoid", bits(shared.logits))[:, None], of_shared.shape)
        of_shared = chain.binary(kind, "Multiply", np.ascontiguousarray(gates), of_shared)
    combined = chain.combine(bits(each), dtype, bits(route_weights), dtype)
    assert_equal(y, chain.binary(kind, "Add", combined, of_shared))
