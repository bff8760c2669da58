"""The CPU kernels on NumPy arrays: every instruction set of this machine against the float64 oracle. What
they refuse, extreme values and threads are in files of their own."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import oracle
import pytest
from factories import Floats, MakeExperts, MakeProjection, MakeShared
from formats import ACTIVATIONS, BY_NAME, DTYPES, FORMATS, Format
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_kernels import (
    ISAS,
    as_mlx,
    as_numpy,
    engine_of,
    held,
    held_experts,
    isas,
    kernels,
    on_each,
    run_experts,
)
from strategies import router_specs

from moefast import Activation, ExpertWeights, QuantSpec, RouterSpec
from moefast.testing import assert_close, assert_same_routing, float64
from moefast.weights import dtype_name

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)

HIDDEN, WIDTH = 128, 256  # groups of 128 need multiples of it
TOKENS = (0, 1, 2, 7, 33, 130)


# -- against the oracle ------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("format_", FORMATS, ids=lambda format_: format_.name)
def test_matmul(dtype: mx.Dtype, format_: Format, floats: Floats, projection: MakeProjection) -> None:
    weight = projection(96, 2 * HIDDEN, bias=True, **format_.of(dtype))
    stored = held(weight)
    for tokens in TOKENS:
        x = floats(tokens, 2 * HIDDEN, dtype=dtype)
        want = oracle.project(float64(x), weight)

        def check(engine: Any, x: mx.array = x, want: Any = want) -> None:
            y = as_mlx(engine.matmul(as_numpy(x), stored), dtype)
            assert (y.shape, y.dtype) == ((x.shape[0], 96), dtype)
            assert_close(y, want, "quantized_matmul", reductions=(2 * HIDDEN,))

        on_each(check)


def check_experts(x: mx.array, weights: ExpertWeights, rng: np.random.Generator, top_k: int = 3) -> None:
    num_experts, hidden, width, *_ = weights.layout
    indices = mx.array(rng.integers(0, num_experts, (x.shape[0], top_k)).astype(np.uint32))
    mix = mx.softmax(mx.random.normal((x.shape[0], top_k)), axis=-1)
    want = oracle.switch_glu(x, weights, indices)
    total = (want * float64(mix)[..., None]).sum(axis=-2)

    def check(engine: Any) -> None:
        apart, combined = run_experts(engine, x, weights, indices, mix)
        assert_close(apart, want, "switch_glu", reductions=(hidden, width))
        assert_close(combined, total, "experts", reductions=(hidden, width), top_k=top_k)

    on_each(check)


@dtypes
@pytest.mark.parametrize("format_", FORMATS, ids=lambda format_: format_.name)
def test_experts(
    dtype: mx.Dtype,
    format_: Format,
    floats: Floats,
    expert_weights: MakeExperts,
    rng: np.random.Generator,
) -> None:
    weights = expert_weights(6, HIDDEN, WIDTH, bias=True, **format_.of(dtype))
    for tokens in TOKENS:
        check_experts(floats(tokens, HIDDEN, dtype=dtype), weights, rng)


@dtypes
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_activations(
    dtype: mx.Dtype,
    activation: Activation,
    floats: Floats,
    expert_weights: MakeExperts,
    rng: np.random.Generator,
) -> None:
    # 90: no multiple of a vector, so that the kernels' remainders compute as well.
    for width, format_ in ((90, "plain"), (64, "affine4-g32")):
        weights = expert_weights(4, 64, width, activation=activation, **BY_NAME[format_].of(dtype))
        check_experts(3 * floats(9, 64, dtype=dtype), weights, rng)


@isas
@pytest.mark.parametrize("size", [1, 3, 17, 31, 33, 65, 100, 727])
@dtypes
def test_sizes_that_divide_nothing(
    isa: str,
    size: int,
    dtype: mx.Dtype,
    floats: Floats,
    projection: MakeProjection,
) -> None:
    for out, into in ((size, 64), (64, size), (size, size)):
        weight = projection(out, into, dtype=dtype)
        for tokens in (1, 5, 40):
            x = floats(tokens, into, dtype=dtype)
            y = as_mlx(engine_of(isa).matmul(as_numpy(x), held(weight)), dtype)
            want = oracle.project(float64(x), weight)
            if out == 1:  # a single value per row may have cancelled out: it is judged beside the others
                y, want = y.T, want.T
            assert_close(y, want, "quantized_matmul", reductions=(into,))


@isas
@dtypes
def test_moe(
    isa: str,
    dtype: mx.Dtype,
    floats: Floats,
    expert_weights: MakeExperts,
    shared_expert: MakeShared,
) -> None:
    spec = RouterSpec(num_experts=12, top_k=3, score="sigmoid", renormalize=True, identity_experts=4)
    format_ = {"quant": QuantSpec(group_size=32), "dtype": dtype}
    weights = expert_weights(8, 64, 96, **format_)
    shared = shared_expert(64, 128, output_gate=True, **format_)
    for tokens in TOKENS:
        x, logits = floats(tokens, 64, dtype=dtype), floats(tokens, 12)
        y = engine_of(isa).moe(
            as_numpy(x),
            as_numpy(logits),
            spec,
            held_experts(weights),
            shared=held_experts(shared),
            shared_gate=held(shared.output_gate),
        )
        want = oracle.moe(x, logits, spec, weights, shared=shared)
        assert_close(as_mlx(y, dtype), want, "moe", reductions=(64, 96), top_k=3)


@isas
@given(spec=router_specs(), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_any_router(isa: str, spec: RouterSpec, seed: int) -> None:
    """Portable code routes on every instruction set: the same choices and weights, bit for bit."""
    logits = np.random.default_rng(seed).standard_normal((7, spec.num_experts)).astype(np.float32)
    mine, portable = (kernels.Engine(2, name).route(logits, spec) for name in (isa, "portable"))
    for got, want in zip(mine, portable, strict=True):
        np.testing.assert_array_equal(got, want)
    if spec.score_dtype is spec.bias_dtype is spec.weight_dtype is None and spec.weights_from == "scores":
        want = oracle.route(mx.array(logits), spec)
        assert_same_routing(mine, want[:2], spec, mx.float32, margin=want.margin)


# -- strides and dtypes ------------------------------------------------------------------------------------


def test_rows_may_be_any_distance_apart(floats: Floats, projection: MakeProjection) -> None:
    engine, weight = kernels.Engine(2), held(projection(48, 64))
    wide = as_numpy(floats(30, 96))
    for x in (wide[::3, 16:80], wide[5:6, :64], np.broadcast_to(wide[:1, :64], (7, 64)), wide[0, :64]):
        np.testing.assert_array_equal(engine.matmul(x, weight), engine.matmul(x.copy(), weight))
    deep = wide[:, :64].reshape(2, 15, 64)[:, :, :]
    assert engine.matmul(deep, weight).shape == (2, 15, 48)


@dtypes
@pytest.mark.parametrize("causal", [False, True])
def test_attention(dtype: mx.Dtype, causal: bool, floats: Floats) -> None:
    for length, keys, dims in ((1, 1, 128), (1, 700, 64), (3, 70, 40), (65, 130, 128), (200, 200, 17)):
        q = floats(2, 4, length, dims, dtype=dtype)
        k, v = floats(2, 2, keys, dims, dtype=dtype), floats(2, 2, keys, dims + 8, dtype=dtype)
        heads, want = [as_numpy(a) for a in (q, k, v)], oracle.attention(q, k, v, dims**-0.5, causal)

        def check(engine: Any, heads: Any = heads, want: Any = want) -> None:
            y = as_mlx(engine.attention(*heads, scale=heads[0].shape[-1] ** -0.5, causal=causal), dtype)
            assert_close(y, want, "attention", reductions=(heads[0].shape[-1], heads[1].shape[2]))

        on_each(check)


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@dtypes
def test_output_dtype(
    dtype: mx.Dtype, out_dtype: mx.Dtype, floats: Floats, projection: MakeProjection
) -> None:
    weight, x = projection(48, 64, dtype=dtype), floats(5, 64, dtype=dtype)
    y = kernels.Engine(2).matmul(as_numpy(x), held(weight), out_dtype=dtype_name(out_dtype))
    got = as_mlx(y, out_dtype)
    assert got.dtype == out_dtype
    assert_close(got, oracle.project(float64(x), weight), "quantized_matmul", reductions=(64,))


def test_measurements_are_plausible() -> None:
    for isa in ISAS:
        engine = kernels.Engine(2, isa)
        assert engine.measure_flops(1) > 1e8
        assert engine.measure_read(2, 1 << 20) > 1e7
    assert kernels.usable_cores() >= 1
    assert ISAS[-1] == "portable"
