"""The decode kernels against MLX's own launches, one after another: equal in every bit."""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

import mlx.core as mx
import mlx_chain as chain
import numpy as np
import pytest
from factories import Floats, MakeExperts
from metal import emulated
from mlx_kernels import bits

from moefast import ExpertWeights, QuantSpec
from moefast.backends.metal import decode
from moefast.env import settings

pytestmark = pytest.mark.skipif(
    find_spec("ziglang") is None and not settings.clang, reason="needs the compiler of moefast[emulator]"
)


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


@pytest.mark.parametrize("bits_", [4, 8])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("model", MODELS)
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


@pytest.mark.parametrize("bits_", [4, 8])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("model", MODELS)
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
