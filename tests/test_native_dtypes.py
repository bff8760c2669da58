"""The native backend answers in the dtypes of the reference."""

from __future__ import annotations

import itertools
from typing import Any

import mlx.core as mx
import oracle
import pytest
from factories import Floats, MakeExperts
from formats import ACTIVATIONS, BY_NAME, DTYPES
from marks import needs_native

from moefast import (
    Activation,
    ExpertWeights,
    Projection,
    RouterSpec,
    Routing,
    SharedExpert,
    experts,
    moe,
    quantized_matmul,
    route,
    switch_glu,
)
from moefast.backends import dtypes
from moefast.testing import assert_close
from moefast.weights import dtype_name

pytestmark = needs_native

NAMES = ("plain", "plain-float32", "plain-bfloat16", "affine4-g64", "affine4-bfloat16", "mxfp4")
stored = pytest.mark.parametrize("name", NAMES)
x_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def make(name: str, dtype: mx.Dtype, *shape: int, bias: mx.Dtype | None = None) -> Projection:
    """A weight of zeros: nothing but its dtypes matters."""
    format_ = BY_NAME[name].of(dtype)
    weight = mx.zeros(shape, format_["dtype"])
    offset = None if bias is None else mx.zeros(shape[:-1], bias)
    if format_["quant"] is None:
        return Projection(weight, bias=offset)
    quant: Any = format_["quant"]
    return Projection(*mx.quantize(weight, **quant.mlx_arguments()), bias=offset, quant=quant)


def same_dtype(run: Any) -> None:
    """Both backends answer in one dtype, and what was promised is what is computed."""
    found = {}
    for backend in ("native", "reference"):
        y = run(backend)
        mx.eval(y)
        found[backend] = y.dtype
    assert found["native"] == found["reference"]


@x_dtypes
@stored
@pytest.mark.parametrize("bias", [None, *DTYPES], ids=str)
def test_dtype_of_a_product(dtype: mx.Dtype, name: str, bias: mx.Dtype | None) -> None:
    weight, x = make(name, dtype, 32, 64, bias=bias), mx.zeros((2, 64), dtype)
    same_dtype(lambda backend: quantized_matmul(x, weight, backend=backend))


@x_dtypes
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_dtype_of_experts(dtype: mx.Dtype, activation: Activation) -> None:
    """Gate, up and down of every mixture of formats, biases on top."""
    x, indices = mx.zeros((2, 64), dtype), mx.zeros((2, 2), mx.uint32)
    few = ("plain", "plain-float32", "affine4-bfloat16", "mxfp4")
    for gate, up, down, bias in itertools.product(few, few, few, (None, mx.float32)):
        weights = ExpertWeights(
            gate=make(gate, dtype, 4, 64, 64) if activation.gated else None,
            up=make(up, dtype, 4, 64, 64, bias=bias),
            down=make(down, dtype, 4, 64, 64),
            activation=activation,
        )
        got = dtypes.feed_forward(dtype_name(dtype), weights.layout)
        want = switch_glu(x, weights, indices, backend="reference").dtype
        assert got == dtype_name(want), weights
        assert switch_glu(x, weights, indices, backend="native").dtype == want


@x_dtypes
@pytest.mark.parametrize("mix", DTYPES, ids=str)
@pytest.mark.parametrize("combine", [None, *DTYPES], ids=str)
def test_dtype_and_value_of_a_combine(
    dtype: mx.Dtype, mix: mx.Dtype, combine: mx.Dtype | None, floats: Floats, expert_weights: MakeExperts
) -> None:
    weights, x = expert_weights(4, 32, 64, dtype=dtype), floats(3, 32, dtype=dtype)
    routing = Routing(mx.array([[0, 1], [2, 3], [3, 3]]), mx.softmax(floats(3, 2), axis=-1).astype(mix))
    run = {b: experts(x, weights, routing, combine_dtype=combine, backend=b) for b in ("native", "reference")}
    assert run["native"].dtype == run["reference"].dtype == dtype
    rounded = routing.weights if combine is None else routing.weights.astype(combine)
    want = oracle.experts(x, weights, routing.indices, rounded)
    assert_close(run["native"], want, "experts", reductions=(32, 64), top_k=2)


@x_dtypes
@pytest.mark.parametrize("logits", DTYPES, ids=str)
@pytest.mark.parametrize("shared", [None, "plain", "plain-float32", "mxfp4"])
def test_dtype_of_a_block(dtype: mx.Dtype, logits: mx.Dtype, shared: str | None) -> None:
    spec, scores = RouterSpec(num_experts=4, top_k=2), mx.zeros((2, 4), logits)
    stack, x = make("affine4-g64", dtype, 4, 64, 64), mx.zeros((2, 64), dtype)
    weights = ExpertWeights(gate=stack, up=stack, down=stack)
    for gate in (None, "plain-float32", "mxfp4"):
        expert = None
        if shared is not None:
            dense = make(shared, dtype, 64, 64)
            output_gate = None if gate is None else make(gate, dtype, 1, 64)
            expert = SharedExpert(gate=dense, up=dense, down=dense, output_gate=output_gate)
        same_dtype(
            lambda backend, expert=expert: moe(x, scores, spec, weights, shared=expert, backend=backend)
        )


@pytest.mark.parametrize("score_dtype", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("bias_dtype", [None, "scores", "float32", "float16"])
@pytest.mark.parametrize("weight_dtype", [None, "logits", "float16"])
@pytest.mark.parametrize("masked", [False, True])
@x_dtypes
def test_dtype_of_routing_weights(
    dtype: mx.Dtype, score_dtype: Any, bias_dtype: Any, weight_dtype: Any, masked: bool
) -> None:
    groups = {"num_groups": 2, "weights_from": "masked"} if masked else {}
    spec = RouterSpec(
        num_experts=8,
        top_k=2,
        score_dtype=score_dtype,
        bias_dtype=bias_dtype,
        weight_dtype=weight_dtype,
        **groups,
    )
    logits = mx.zeros((2, 8), dtype)
    for bias, scale in itertools.product((None, mx.float32, mx.bfloat16), (None, mx.float32, mx.bfloat16)):
        vectors = {
            "selection_bias": None if bias is None else mx.zeros(8, bias),
            "expert_scale": None if scale is None else mx.ones(8, scale),
        }
        same_dtype(lambda backend, vectors=vectors: route(logits, spec, **vectors, backend=backend).weights)


def test_promotion_is_mlxs() -> None:
    for a, b in itertools.product(DTYPES, DTYPES):
        want = mx.result_type(mx.zeros(1, a), mx.zeros(1, b))
        assert dtypes.promoted(dtype_name(a), dtype_name(b)) == dtype_name(want)
