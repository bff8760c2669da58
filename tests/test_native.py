"""The native backend on what it was not made for: odd indices, strides, no tokens; what it refuses."""

from __future__ import annotations

import contextlib
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from factories import Floats, MakeExperts, MakeProjection, MakeShared
from formats import BY_NAME, DTYPES
from marks import needs_native

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
from moefast.backends import registry
from moefast.registry import Problem
from moefast.weights import ExpertLayout, Layout, dtype_name

pytestmark = needs_native

x_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# -- values it was not made for ----------------------------------------------------------------------------


@pytest.fixture
def weights(expert_weights: MakeExperts) -> ExpertWeights:
    return expert_weights(4, 32, 64)


@pytest.mark.parametrize(
    "kind", [mx.int8, mx.uint8, mx.int16, mx.uint16, mx.int32, mx.uint32, mx.int64, mx.uint64], ids=str
)
def test_indices_of_any_dtype(kind: mx.Dtype, weights: ExpertWeights, floats: Floats) -> None:
    x, indices = floats(5, 32), mx.array([[0, 1], [3, 3], [2, 0], [1, 2], [3, 0]])
    got = switch_glu(x, weights, indices.astype(kind), backend="native")
    assert mx.array_equal(got, switch_glu(x, weights, indices, backend="native"))


@pytest.mark.parametrize(
    ("kind", "index"),
    [
        (mx.int32, 4),
        (mx.int32, -1),
        (mx.int8, -128),
        (mx.uint32, 2**32 - 1),
        (mx.int64, 2**32 + 1),  # 1, if only its lower half were looked at
        (mx.int64, -(2**32) + 1),
        (mx.uint64, 2**64 - 1),
    ],
    ids=str,
)
def test_an_index_out_of_range_is_a_value_error_when_evaluated(
    kind: mx.Dtype, index: int, weights: ExpertWeights, floats: Floats
) -> None:
    """The stream, and whatever comes later, is not affected; and it is one every time."""
    x, good = floats(3, 32), mx.array([[0, 1], [2, 3], [1, 1]])
    bad = mx.array(np.where(np.arange(6).reshape(3, 2) == 3, index, 0).astype(dtype_name(kind)))
    want = switch_glu(x, weights, good, backend="native")
    mix = mx.ones((3, 2))
    for _ in range(3):
        for op, run in (
            ("switch_glu", lambda: switch_glu(x, weights, bad, backend="native")),
            ("experts", lambda: experts(x, weights, Routing(bad, mix), backend="native")),
        ):
            y = run()  # nothing is evaluated yet
            with pytest.raises(ValueError, match=rf"^\[{op}\] indices must be in 0\.\.3, got {index}\.$"):
                mx.eval(y + 1)
        assert mx.array_equal(switch_glu(x, weights, good, backend="native"), want)


def test_what_failed_holds_no_plausible_numbers(weights: ExpertWeights, floats: Floats) -> None:
    """MLX may take it for evaluated all the same, depending on when the exception reached it. NumPy, for one,
    asks a second time, and then gets the memory as it is."""
    for dtype in DTYPES:
        stacks = ExpertWeights(
            **{n: Projection(getattr(weights, n).weight.astype(dtype)) for n in ("gate", "up", "down")}
        )
        y = switch_glu(floats(1, 32, dtype=dtype), stacks, mx.array([[0, 9]]), backend="native")
        with pytest.raises(ValueError, match="indices must be"):
            mx.eval(y)
        with contextlib.suppress(ValueError):  # as before
            assert mx.isnan(y).all()


def test_no_tokens(weights: ExpertWeights, shared_expert: MakeShared) -> None:
    spec = RouterSpec(num_experts=4, top_k=2)
    for lead in ((0,), (2, 0), (0, 3)):
        x, logits, indices = mx.zeros((*lead, 32)), mx.zeros((*lead, 4)), mx.zeros((*lead, 2), mx.uint32)
        assert switch_glu(x, weights, indices, backend="native").tolist() == x[..., None, :].tolist()
        for y in (
            experts(x, weights, Routing(indices, mx.zeros((*lead, 2))), backend="native"),
            moe(x, logits, spec, weights, shared=shared_expert(32, 64), backend="native"),
            quantized_matmul(x, Projection(mx.zeros((32, 32))), backend="native"),
        ):
            assert (y.shape, y.size) == ((*lead, 32), 0)
            mx.eval(y)


@x_dtypes
def test_any_strides(dtype: mx.Dtype, floats: Floats, projection: MakeProjection) -> None:
    """Rows a constant distance apart are read where they lie; anything else is copied first."""
    weight, wide = projection(48, 32, dtype=dtype), floats(6, 4, 80, dtype=dtype)
    for x in (
        wide[..., :32],
        wide[::2, :, 16:48],
        wide[:, ::2, 3:35],
        wide[:, :, ::2][..., :32],
        wide.transpose(1, 0, 2)[..., 40:72],
        mx.broadcast_to(wide[0, 0, :32], (7, 32)),
        mx.broadcast_to(wide[:1, :, :32], (3, 4, 32)),
        wide[::-1, :, :32],
        wide[:, :, 31::-1],
        wide[0, 0, :32],
    ):
        copied = mx.array(np.array(x.astype(mx.float32))).astype(dtype)
        got, want = (quantized_matmul(a, weight, backend="native") for a in (x, copied))
        assert mx.array_equal(got, want)


def test_weights_of_any_strides(floats: Floats, expert_weights: MakeExperts) -> None:
    plain = expert_weights(4, 32, 64, **BY_NAME["affine4-g32"].of(mx.float32), bias=True)
    x, indices = floats(5, 32), mx.array([[0, 1], [3, 3], [2, 0], [1, 2], [3, 0]])

    def strided(p: Projection) -> Projection:
        def spread(array: mx.array) -> mx.array:
            return mx.stack([array, array])[:, ::1].swapaxes(0, 1)[:, 1]

        weight, scales, biases, bias, _ = (None if a is None else spread(a) for a in p.arrays)
        return Projection(weight, scales, biases, bias=bias, quant=p.quant)

    apart = ExpertWeights(gate=strided(plain.gate), up=strided(plain.up), down=strided(plain.down))
    got, want = (switch_glu(x, w, indices, backend="native") for w in (apart, plain))
    assert mx.array_equal(got, want)


def test_arrays_changed_in_place_are_seen(floats: Floats) -> None:
    """The handle that is kept for the next call holds Python's arrays, not what they once stood for."""
    weight, x = floats(16, 32), floats(3, 32)
    p = Projection(weight)
    before = quantized_matmul(x, p, backend="native")
    weight[:] = 2 * weight
    assert mx.array_equal(quantized_matmul(x, p, backend="native"), 2 * before)


# -- refusals ----------------------------------------------------------------------------------------------

LAYOUT = Layout(4, 64, 64, mx.float32, None, None, False)
DENSE = LAYOUT._replace(num_experts=0)
STACKS = ExpertLayout(4, 64, 64, LAYOUT, LAYOUT, LAYOUT, Activation())
HUGE = Activation(name="swiglu_clipped", limit=1e39)


@pytest.mark.parametrize(
    ("op", "details", "reason"),
    [
        ("quantized_matmul", (DENSE,), None),
        ("quantized_matmul", (DENSE._replace(out_dims=0),), "a weight of 0 x 64 values"),
        ("switch_glu", (STACKS, 2, None, None), None),
        ("switch_glu", (STACKS, 0, None, None), "top_k=0"),
        ("switch_glu", (STACKS._replace(down=LAYOUT._replace(in_dims=0)), 2, None, None), "64 x 0 values"),
        ("experts", (STACKS._replace(activation=HUGE), 2, "float32", None), "limit=1e.39 is too large"),
        ("route", (RouterSpec(num_experts=4, top_k=2, scale=1e39), None, None), "scale=1e.39 is too large"),
        ("route", (RouterSpec(num_experts=4, top_k=2, temperature=1e-50), None, None), "is too small"),
    ],
)
def test_refusals(op: str, details: tuple[Any, ...], reason: str | None) -> None:
    found = registry.ask(Problem(op, "cpu", mx.float32, "decode", details), "native")
    if reason is None:
        assert found[0] is not None, found
    else:
        assert found[0] is None
        assert found[1]["native"] is not None
        assert any(word in found[1]["native"] for word in (reason, reason.replace("e.39", "e+39")))


def test_a_gpu_is_refused_with_its_reason() -> None:
    _, refused = registry.ask(Problem("quantized_matmul", "gpu", mx.float32, "decode", (DENSE,)), "native")
    assert "GPU" in refused["native"]
