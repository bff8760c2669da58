"""The CPU kernels on every format a weight can have, in every mixture: dtypes of scales, lengths of rows, one
format per projection. Each instruction set against the float64 oracle and against portable code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import oracle
import pytest
from factories import Floats, MakeExperts, MakeProjection
from formats import DTYPES, FORMATS, Format
from numpy_kernels import as_mlx, as_numpy, engine_of, held, held_experts, kernels, on_each

from moefast import Activation, ExpertWeights, Projection
from moefast.testing import Float64, assert_close, float64
from moefast.weights import dtype_name

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
formats = pytest.mark.parametrize("format_", FORMATS, ids=lambda format_: format_.name)
coded = pytest.mark.parametrize(
    "format_", [f for f in FORMATS if f.quant is not None], ids=lambda format_: format_.name
)


def check_product(x: mx.array, weight: Projection, out_dtype: mx.Dtype | None = None) -> None:
    """``x @ weight.T`` on each instruction set: near the truth, and near what portable code makes of it."""
    dtype, rows, stored = out_dtype or x.dtype, as_numpy(x), held(weight)
    want = oracle.project(float64(x), weight)
    limits = {"dtype": dtype, "reductions": (weight.layout.in_dims,)}

    def product(engine: Any) -> mx.array:
        return as_mlx(engine.matmul(rows, stored, out_dtype=dtype_name(dtype)), dtype)

    portable = float64(product(engine_of("portable")))

    def check(engine: Any) -> None:
        y = product(engine)
        # A row of few values may have cancelled out: it is judged beside the others.
        for truth in (want, portable):
            assert_close(y.reshape(1, -1), truth.reshape(1, -1), "quantized_matmul", **limits)

    on_each(check)


# -- dtypes ------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("scales", DTYPES, ids=str)
@coded
def test_scales_of_any_dtype(
    format_: Format, scales: mx.Dtype, dtype: mx.Dtype, floats: Floats, projection: MakeProjection
) -> None:
    """The dtype of activations and that of scales are independent: nine kernels for each affine format."""
    weight = projection(48, 256, **{**format_.of(dtype), "dtype": scales})
    for tokens in (1, 3, 9):
        check_product(floats(tokens, 256, dtype=dtype), weight)
    # What MLX's promotion of two half precisions asks for.
    check_product(floats(9, 256, dtype=dtype), weight, mx.float32)


# -- sizes -------------------------------------------------------------------------------------------------


def lengths_of(format_: Format) -> tuple[int, ...]:
    """Of rows: from a single group (MLX packs no less than 32 values) over what leaves a part of a vector, of
    a block and of a tile, to more groups than have their scales loaded at once (2048 values)."""
    group = max(32, format_.quant.group_size if format_.quant else 32)
    return tuple(group * groups for groups in (1, 2, 3, 5, 7, 2048 // group + 1, 2048 // group + 3))


@dtypes
@formats
def test_rows_of_any_number_of_groups(
    format_: Format, dtype: mx.Dtype, floats: Floats, projection: MakeProjection
) -> None:
    for i, length in enumerate(lengths_of(format_)):
        # Rows of the weight: one more than a tile's, more than a piece's, fewer than are computed at once. Of
        # the few there are too few values for an error's size to mean anything, unless tokens are many.
        rows = (17, 33, 1, 50, 35, 3, 18)[i]
        weight = projection(rows, length, **format_.of(dtype))
        for tokens in (1, 2, 6, 19) if rows > 16 else (40,):
            check_product(floats(tokens, length, dtype=dtype), weight)


@dtypes
@formats
def test_experts_of_any_number_of_groups(
    format_: Format, dtype: mx.Dtype, floats: Floats, expert_weights: MakeExperts, rng: np.random.Generator
) -> None:
    """Hidden size and width are odd multiples of the group."""
    group = max(32, format_.quant.group_size if format_.quant else 32)
    for hidden, width in ((group, 3 * group), (5 * group, group)):
        weights = expert_weights(3, hidden, width, **format_.of(dtype))
        for tokens in (1, 12):
            x = floats(tokens, hidden, dtype=dtype)
            indices = rng.integers(0, 3, (tokens, 2))
            want = oracle.switch_glu(x, weights, mx.array(indices))

            def check(
                engine: Any, x: mx.array = x, indices: Any = indices, want: Any = want, w: Any = weights
            ) -> None:
                y = as_mlx(engine.switch_glu(as_numpy(x), held_experts(w), indices), x.dtype)
                assert_close(y, want, "switch_glu", reductions=w.layout[1:3])

            on_each(check)


@dtypes
def test_more_tokens_than_are_taken_at_once(
    dtype: mx.Dtype, floats: Floats, projection: MakeProjection
) -> None:
    """Chunks change nothing, and their memory does not grow with their number."""
    weight = projection(32, 64, **FORMATS[3].of(dtype))
    held_bytes = []
    for tokens in (2048, 2049, 10_000):
        x = floats(tokens, 64, dtype=dtype)
        engine = kernels.Engine(2)
        y = as_mlx(engine.matmul(as_numpy(x), held(weight)), dtype)
        assert_close(y, oracle.project(float64(x), weight), "quantized_matmul", reductions=(64,))
        held_bytes.append(engine.scratch)
    assert held_bytes[2] == held_bytes[0]


def test_scratch_is_given_back(floats: Floats, expert_weights: MakeExperts, rng: np.random.Generator) -> None:
    """Inner activations of 8000 routes are 131 MB: more than an engine keeps for the next call."""
    weights, x = held_experts(expert_weights(4, 64, 4096)), as_numpy(floats(4000, 64))
    indices, engine = rng.integers(0, 4, (4000, 2)), kernels.Engine(2)
    engine.switch_glu(x, weights, indices)
    assert engine.scratch < 4 * indices.size * 4096
    engine.switch_glu(x[:1], weights, indices[:1])
    assert 0 < engine.scratch < 4 * 4096 * 64


# -- one format per projection -----------------------------------------------------------------------------

HIDDEN, WIDTH, EXPERTS, TOP_K = 128, 128, 2, 2


class Stack(NamedTuple):
    """A stack of one format, as the kernels hold it, and what it stands for."""

    held: Any
    values: list[Float64]

    @classmethod
    def of(cls, p: Projection) -> Stack:
        return cls(held(p), [oracle.dequantize(p, e) for e in range(EXPERTS)])


@dtypes
def test_every_pair_of_formats(dtype: mx.Dtype, floats: Floats, projection: MakeProjection) -> None:
    """Projections share prepared activations where they can: each format is gate to each other's up, and down
    to a third. One row of an expert, a few, and enough for tiles."""
    up = [Stack.of(projection(EXPERTS, WIDTH, HIDDEN, **f.of(dtype))) for f in FORMATS]
    down = [Stack.of(projection(EXPERTS, HIDDEN, WIDTH, **f.of(dtype))) for f in FORMATS]
    for tokens in (1, 3, 8):
        x = floats(tokens, HIDDEN, dtype=dtype)
        indices = np.stack([np.arange(tokens) % EXPERTS, np.ones(tokens, int)], axis=-1)
        inner = [[float64(x) @ w.T for w in stack.values] for stack in up]
        for i, gate in enumerate(up):
            for k, other in enumerate(up):
                last = down[(i + k + tokens) % len(down)]
                ffn = kernels.Ffn(gate=gate.held, up=other.held, down=last.held, activation=Activation())
                outputs = [
                    oracle.activate(Activation(), inner[i][e], inner[k][e]) @ last.values[e].T
                    for e in range(EXPERTS)
                ]
                want = np.stack([[outputs[e][t] for e in row] for t, row in enumerate(indices)])
                on_each(_check_switch_glu(x, ffn, indices, want))


def _check_switch_glu(x: mx.array, ffn: Any, indices: Any, want: Float64) -> Callable[[Any], None]:
    def check(engine: Any) -> None:
        y = as_mlx(engine.switch_glu(as_numpy(x), ffn, indices), x.dtype)
        assert_close(y, want, "switch_glu", reductions=(HIDDEN, WIDTH))

    return check


@dtypes
@pytest.mark.parametrize("bias", DTYPES, ids=str)
def test_biases_of_any_dtype(
    bias: mx.Dtype, dtype: mx.Dtype, floats: Floats, projection: MakeProjection, rng: np.random.Generator
) -> None:
    """Of every projection, in a dtype of its own."""

    def biased(*shape: int) -> Projection:
        p = projection(*shape, **FORMATS[7].of(dtype))
        offset = floats(*shape[:-1], dtype=bias)
        return Projection(p.weight, p.scales, p.biases, bias=offset, quant=p.quant)

    weights = ExpertWeights(
        gate=biased(3, WIDTH, HIDDEN), up=biased(3, WIDTH, HIDDEN), down=biased(3, HIDDEN, WIDTH)
    )
    for tokens in (1, 20):
        x, indices = floats(tokens, HIDDEN, dtype=dtype), rng.integers(0, 3, (tokens, TOP_K))
        want = oracle.switch_glu(x, weights, mx.array(indices))
        on_each(_check_switch_glu(x, held_experts(weights), indices, want))
