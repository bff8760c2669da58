"""The band's kernels against MLX's own launches, route by route: equal in every bit."""

from __future__ import annotations

import mlx.core as mx
import mlx_chain as chain
import numpy as np
import pytest
from factories import Floats, MakeExperts, MakeProjection
from formats import BY_NAME, DTYPES, Format
from metal import emulated, needs_emulator
from mlx_kernels import bits

from moefast import ExpertWeights, QuantSpec
from moefast.backends.metal import band, decode
from moefast.backends.metal.combine import combine

pytestmark = needs_emulator

# Hidden, width, top_k and whether weights of routes are float32. Of the rows of a matrix, which do not depend
# on each other, only 64 are computed.
MODELS = {
    "granite": (1536, 512, 8, True),
    "glm4": (4096, 1408, 8, True),
    "qwen2": (2048, 1408, 4, False),
    "bailing": (2048, 1408, 6, False),
    "dbrx": (6144, 10752, 4, False),
}
ROWS = 64

FORMATS = [format_ for format_ in BY_NAME.values() if format_.dtype is None]


def gate_up_of_mlx(x: mx.array, weights: ExpertWeights, indices: mx.array) -> np.ndarray:
    kind, chosen = chain.KINDS[x.dtype], np.array(indices).flatten()
    rows = np.repeat(np.arange(x.shape[0]), indices.shape[1])
    assert weights.gate is not None
    gate, up = (
        chain.gather_qmv(projection, bits(x), rows, chosen, kind) for projection in (weights.gate, weights.up)
    )
    return chain.activate(kind, weights.activation, gate, up)


def down_of_mlx(inner: mx.array, weights: ExpertWeights, indices: mx.array) -> np.ndarray:
    kind, chosen = chain.KINDS[inner.dtype], np.array(indices).flatten()
    rows = bits(inner.reshape(len(chosen), -1))
    return chain.gather_qmv(weights.down, rows, np.arange(len(chosen)), chosen, kind)


def assert_equal(got: mx.array, want: np.ndarray) -> None:
    differing = np.count_nonzero(bits(got).reshape(want.shape) != want)
    assert differing == 0, f"{differing} of {want.size}"


def routes_of(rng: np.random.Generator, tokens: int, top_k: int, experts: int) -> mx.array:
    """Distinct experts of each token, and expert 1 among all: it has as many routes as there are tokens."""
    rows = [
        np.append(1, rng.permutation(np.delete(np.arange(experts), 1))[: top_k - 1]) for _ in range(tokens)
    ]
    return mx.array(rng.permuted(np.array(rows), axis=1), mx.uint32)


def name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def daily(model: str, dtype: mx.Dtype, bits_: int) -> bool:
    """Both kinds of MLX's kernel, both types and widths."""
    return (model, dtype, bits_) in (
        ("granite", mx.bfloat16, 4),
        ("granite", mx.float16, 8),
        ("qwen2", mx.bfloat16, 4),
    )


@pytest.mark.parametrize(
    ("model", "dtype", "bits_"),
    [
        pytest.param(
            model,
            dtype,
            bits_,
            id=f"{model}-{name(dtype)}-{bits_}",
            marks=() if daily(model, dtype, bits_) else pytest.mark.slow,
        )
        for model in MODELS
        for dtype in (mx.bfloat16, mx.float16)
        for bits_ in (4, 8)
    ],
)
def test_the_models(
    model: str,
    dtype: mx.Dtype,
    bits_: int,
    expert_weights: MakeExperts,
    floats: Floats,
    rng: np.random.Generator,
) -> None:
    """Nine tokens, and all of one expert: a full tile and one that is not."""
    hidden, width, top_k, float32_weights = MODELS[model]
    experts, quant = top_k + 4, QuantSpec(bits=bits_)
    x, indices = floats(9, hidden, dtype=dtype), routes_of(rng, 9, top_k, experts)
    wide = expert_weights(experts, hidden, ROWS, quant=quant, dtype=dtype)
    tall = expert_weights(experts, ROWS, width, quant=quant, dtype=dtype)
    inner = floats(9, top_k, width, dtype=dtype)
    mix = mx.softmax(floats(9, top_k)).astype(mx.float32 if float32_weights else dtype)
    with emulated(check=False):
        activated = band.gate_up(x, wide, indices)
        each = band.down(inner, tall, indices)
        combined = combine(each, mix)
    assert_equal(activated, gate_up_of_mlx(x, wide, indices))
    want = down_of_mlx(inner, tall, indices)
    assert_equal(each, want)
    assert_equal(combined, chain.combine(want.reshape(9, top_k, ROWS), dtype, bits(mix), mix.dtype))


# 2, 4 and 8 routes of a tile and parts of it; both ways of finding an expert's threadgroup; both of MLX's
# kernels. In float32, where a sum in another order shows.
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "hidden"), [(2, 3, 8, 512), (3, 3, 4, 128), (33, 2, 96, 128)]
)
def test_numbers_of_tokens(
    tokens: int,
    top_k: int,
    experts: int,
    hidden: int,
    expert_weights: MakeExperts,
    floats: Floats,
    rng: np.random.Generator,
) -> None:
    weights = expert_weights(experts, hidden, 64, quant=QuantSpec())
    x, indices = floats(tokens, hidden), routes_of(rng, tokens, top_k, experts)
    with emulated(check=False):
        inner = band.gate_up(x, weights, indices)
        y = band.down(inner, weights, indices)
    assert_equal(inner, gate_up_of_mlx(x, weights, indices))
    assert_equal(y, down_of_mlx(inner, weights, indices))


def test_a_token_does_not_depend_on_the_others(
    expert_weights: MakeExperts, floats: Floats, rng: np.random.Generator
) -> None:
    weights = expert_weights(3, 128, 64, quant=QuantSpec(), dtype=mx.bfloat16)
    x, indices = floats(16, 128, dtype=mx.bfloat16), routes_of(rng, 16, 2, 3)
    with emulated(check=False):
        want = bits(band.switch_glu(x, weights, indices))
        for chosen in (rng.permutation(16), [3, 11], [9, 2, 14], [5] * 16):
            some = mx.array(chosen)
            assert_equal(band.switch_glu(x[some], weights, indices[some]), want[np.array(chosen)])


# Three formats at a time, each projection its own.
@pytest.mark.parametrize(
    ("formats", "dtype"),
    [
        pytest.param(
            FORMATS[i : i + 3],
            dtype,
            id="-".join((*(f.name for f in FORMATS[i : i + 3]), name(dtype))),
            marks=() if (i, dtype) in ((3, mx.float32), (18, mx.float32)) else pytest.mark.slow,
        )
        for i in range(0, len(FORMATS), 3)
        for dtype in DTYPES
    ],
)
def test_every_format_as_in_decode(
    formats: tuple[Format, ...],
    dtype: mx.Dtype,
    projection: MakeProjection,
    floats: Floats,
    rng: np.random.Generator,
) -> None:
    gate, up, down = (format_.of(dtype) for format_ in (*formats, *formats)[:3])
    weights = ExpertWeights(
        gate=projection(3, 128, 256, **gate),
        up=projection(3, 128, 256, **up),
        down=projection(3, 256, 128, **down),
    )
    x, indices = floats(2, 256, dtype=dtype), routes_of(rng, 2, 2, 3)
    with emulated(check=False):
        got = band.switch_glu(x, weights, indices)
        want = decode.down(decode.gate_up(x, weights, indices), weights, indices)
    assert_equal(got, bits(want))
