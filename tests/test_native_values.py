"""The infinite, NaN, huge and misaligned: the native backend makes of them what the reference does."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import oracle
import pytest
from factories import Floats, MakeExperts, MakeShared
from formats import ACTIVATIONS, BY_NAME, DTYPES
from marks import needs_native

import moefast
from moefast import (
    Activation,
    ExpertWeights,
    Projection,
    RouterSpec,
    Routing,
    experts,
    moe,
    quantized_matmul,
    switch_glu,
)
from moefast.testing import Float64, assert_close, float64

pytestmark = [
    needs_native,
    pytest.mark.usefixtures("cpu"),
]

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
INF, NAN = float("inf"), float("nan")


def kinds(values: mx.array) -> Any:
    """0 where finite, the sign of infinity, 2 for NaN."""
    plain = float64(values)
    return np.where(np.isnan(plain), 2, np.where(np.isinf(plain), np.sign(plain), 0))


# -- activations -------------------------------------------------------------------------------------------

SPECIAL = (0.0, -0.0, 1e-40, -1e-40, 0.5, -3.0, 20.0, -20.0, 85.0, -85.0, 1e4, -1e4, 1e20, -1e20)
SPECIAL += (INF, -INF, NAN)


@pytest.mark.parametrize("limit", [None, 7.0], ids=["limit as it is", "limit 7"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_activations_of_every_pair_of_special_values(activation: Activation, limit: float | None) -> None:
    """An expert for each pair of a gate and an up, which are its biases; its output is the activation itself.
    Where that is finite the truth is the oracle's: the reference's GELU cancels to 0."""
    activation = activation if limit is None else replace(activation, limit=limit)
    pairs = np.array(list(itertools.product(SPECIAL, SPECIAL)), np.float32)

    def constant(values: Any) -> Projection:
        return Projection(mx.zeros((len(pairs), 1, 1)), bias=mx.array(values[:, None]))

    weights = ExpertWeights(
        gate=constant(pairs[:, 0]) if activation.gated else None,
        up=constant(pairs[:, 1]),
        down=Projection(mx.ones((len(pairs), 1, 1))),
        activation=activation,
    )
    indices = mx.arange(len(pairs))[:, None]
    got, want = (
        switch_glu(mx.ones((len(pairs), 1)), weights, indices, backend=b) for b in ("native", "reference")
    )
    np.testing.assert_array_equal(kinds(got), kinds(want))
    finite = np.isfinite(float64(want)).flatten()
    with np.errstate(over="ignore", invalid="ignore"):
        truth = oracle.activate(activation, float64(pairs[:, :1]), float64(pairs[:, 1:]))
    mine, theirs = normal(float64(got)[finite, 0]), normal(truth[finite])
    assert_close(mine, theirs, "switch_glu", dtype=mx.float32)


def normal(values: Float64) -> Float64:
    """With 0 for what float32 holds as a denormal only, if at all."""
    return np.where(np.abs(values) < np.finfo(np.float32).tiny, 0.0, values)


# -- a whole block -----------------------------------------------------------------------------------------

SPEC = RouterSpec(num_experts=4, top_k=2, renormalize=True)


@dtypes
@pytest.mark.parametrize("name", ["plain", "affine4-g32", "affine5-g64", "mxfp4", "mxfp8"])
@pytest.mark.parametrize("value", [INF, -INF, NAN], ids=str)
def test_a_dirty_token_is_as_dirty_as_in_the_reference(
    value: float, name: str, dtype: mx.Dtype, expert_weights: MakeExperts, shared_expert: MakeShared
) -> None:
    """One dirty value in, none, or some dirty values out; the other tokens do not know."""
    form = BY_NAME[name].of(dtype)
    weights, shared = expert_weights(4, 64, 64, **form), shared_expert(64, 64, output_gate=True, **form)
    for tokens in (1, 3, 40):
        clean, logits = mx.random.normal((tokens, 64)).astype(dtype), mx.random.normal((tokens, 4))
        x = mx.array(clean)
        x[tokens // 2, 7] = value
        others = mx.array([i for i in range(tokens) if i != tokens // 2], mx.uint32)
        indices, mix = moefast.route(logits, SPEC, backend="reference")
        for run in (
            lambda x, b: moe(x, logits, SPEC, weights, shared=shared, backend=b),  # noqa: B023
            lambda x, b: experts(x, weights, Routing(indices, mix), backend=b),  # noqa: B023
            lambda x, b: switch_glu(x, weights, indices, backend=b),  # noqa: B023
        ):
            got, want, before = run(x, "native"), run(x, "reference"), run(clean, "native")
            assert (kinds(got) != 0).any()
            np.testing.assert_array_equal(kinds(got) != 0, kinds(want) != 0)
            if tokens > 1:
                limits = {"reductions": (64, 64), "top_k": 2}
                assert_close(got[others], float64(before[others]), "moe", **limits)


@dtypes
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_dirty_logits_make_their_token_dirty(
    score: Any, dtype: mx.Dtype, floats: Floats, expert_weights: MakeExperts
) -> None:
    spec = RouterSpec(num_experts=8, top_k=2, score=score, renormalize=True)
    weights, x = expert_weights(8, 32, 32, dtype=dtype), floats(6, 32, dtype=dtype)
    clean = floats(6, 8)
    logits = mx.array(clean)
    logits[1] = NAN
    logits[3, 2] = INF
    logits[4] = -INF
    got, want, before = (
        moe(x, scores, spec, weights, backend=b)
        for scores, b in ((logits, "native"), (logits, "reference"), (clean, "native"))
    )
    np.testing.assert_array_equal(kinds(got), kinds(want))
    assert (kinds(got)[1] == 2).all()
    for token in (0, 2, 5):
        np.testing.assert_array_equal(float64(got)[token], float64(before)[token])


@dtypes
@pytest.mark.parametrize("name", ["plain", "affine4-g32", "affine8-g32", "mxfp4"])
def test_overflow_is_infinite_as_in_the_reference(
    name: str, dtype: mx.Dtype, floats: Floats, expert_weights: MakeExperts
) -> None:
    """Values that the dtype holds, and whose product it does not: float16 ends at 65504, the others
    are beyond what 15-bit activations can say."""
    largest = {mx.float16: 6e4, mx.float32: 3e38, mx.bfloat16: 3e38}[dtype]
    weights = expert_weights(4, 32, 32, **BY_NAME[name].of(dtype))
    x = mx.sign(floats(12, 32)).astype(dtype) * mx.array(largest, dtype)
    indices = mx.arange(12)[:, None] % 4
    got, want = (switch_glu(x, weights, indices, backend=b) for b in ("native", "reference"))
    assert (kinds(want) != 0).any()
    np.testing.assert_array_equal(kinds(got) != 0, kinds(want) != 0)


# -- memory ------------------------------------------------------------------------------------------------


def shifted(array: mx.array) -> mx.array:
    """The same values one byte off any alignment: a view into bytes, as of a file."""
    raw = array.view(mx.uint8).flatten()
    moved = mx.concatenate([mx.zeros(1, mx.uint8), raw])
    view = moved[1:].view(array.dtype).reshape(array.shape)
    mx.eval(view)
    assert np.asarray(view.view(mx.uint16) if array.dtype == mx.bfloat16 else view).ctypes.data % 2
    return view


@dtypes
def test_misaligned_activations_are_refused_and_weights_read(dtype: mx.Dtype, floats: Floats) -> None:
    x, weight = floats(3, 64, dtype=dtype), floats(8, 64, dtype=dtype)
    want = quantized_matmul(x, Projection(weight), backend="native")
    y = quantized_matmul(shifted(x), Projection(weight), backend="native")
    with pytest.raises(ValueError, match=r"^\[quantized_matmul\] x must be aligned to its dtype, got 0x"):
        mx.eval(y)
    assert mx.array_equal(quantized_matmul(x, Projection(shifted(weight)), backend="native"), want)


def test_misaligned_parts_of_quantized_weights_are_read(floats: Floats) -> None:
    for name in ("affine4-g32", "affine3-g64", "mxfp8", "nvfp4"):
        quant: Any = BY_NAME[name].quant
        parts = mx.quantize(floats(16, 128), **quant.mlx_arguments())
        x, bias = floats(5, 128), floats(16)
        want = quantized_matmul(x, Projection(*parts, bias=bias, quant=quant), backend="native")
        moved = [a if a.dtype == mx.uint8 else shifted(a) for a in parts]
        got = quantized_matmul(x, Projection(*moved, bias=shifted(bias), quant=quant), backend="native")
        assert mx.array_equal(got, want)
