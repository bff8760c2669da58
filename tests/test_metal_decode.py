"""The decode kernels against float64, in every format, dtype and activation; checked, in a random order of
threads."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import oracle
import pytest
from factories import Floats, MakeExperts, MakeProjection, MakeShared
from formats import ACTIVATIONS, BY_NAME, DTYPES, FORMATS, Format
from metal import emulated, needs_emulator

from moefast import Activation, ExpertWeights, Projection, QuantSpec
from moefast.backends.metal import decode
from moefast.testing import assert_close, float64

pytestmark = needs_emulator

AFFINE4 = QuantSpec()


def some_indices(rng: np.random.Generator, tokens: int, top_k: int, experts: int) -> mx.array:
    rows = [rng.permutation(experts)[:top_k] for _ in range(tokens)]
    return mx.array(np.array(rows).reshape(tokens, top_k), mx.uint32)


def assert_switch_glu(x: mx.array, weights: ExpertWeights, indices: mx.array) -> None:
    """Both launches, checked, against the oracle."""
    assert decode.why_not(x.dtype, weights.layout) is None
    with emulated() as launches:
        y = decode.down(decode.gate_up(x, weights, indices), weights, indices)
    assert [made.name for made in launches] == ["gate_up", "down"]
    assert y.dtype == x.dtype
    layout = weights.layout
    want = oracle.switch_glu(x, weights, indices)
    assert_close(y, want, "switch_glu", reductions=(layout.hidden, layout.width))


DAILY = {"plain": 192, "plain-bfloat16": 512, "affine3-g64": 192, "mxfp8": 512, "nvfp4-scaled": 192}


def every_format() -> list[Any]:
    """A few are for every day: of the others the bits are compared, in test_metal_decode_bits.py.

    Dims: 512 are blocks without a rest, in the longer chunks; 192 and 128 leave a part of a block.
    """
    cases = []
    for format_ in FORMATS:
        group = format_.quant.group_size if format_.quant else 1
        for hidden, width in ((512, 128), (384 if group == 128 else 192, 256)):
            for dtype in DTYPES:
                if format_.dtype is not None and format_.dtype != dtype:
                    continue
                name = str(dtype).removeprefix("mlx.core.")
                daily = dtype == mx.bfloat16 and DAILY.get(format_.name) == hidden
                marks = () if daily else pytest.mark.slow
                case = (format_, dtype, hidden, width)
                cases.append(pytest.param(*case, id=f"{format_.name}-{name}-{hidden}", marks=marks))
    return cases


@pytest.mark.parametrize(("format_", "dtype", "hidden", "width"), every_format())
def test_formats(
    format_: Format,
    dtype: mx.Dtype,
    hidden: int,
    width: int,
    expert_weights: MakeExperts,
    floats: Floats,
) -> None:
    weights = expert_weights(3, hidden, width, **format_.of(dtype))
    assert_switch_glu(floats(2, hidden, dtype=dtype), weights, mx.array([[2, 0], [1, 2]], mx.uint32))


@pytest.mark.parametrize("name", ["plain", "affine4-g64", "nvfp4-scaled"])
def test_expert_biases(name: str, expert_weights: MakeExperts, floats: Floats) -> None:
    weights = expert_weights(3, 192, 128, bias=True, **BY_NAME[name].of(mx.float16))
    assert_switch_glu(floats(1, 192, dtype=mx.float16), weights, mx.array([[2, 0]], mx.uint32))


@pytest.mark.parametrize(
    "activation",
    [
        pytest.param(
            a, id=repr(a), marks=() if a.name in ("swiglu_clamped", "gelu_tanh") else pytest.mark.slow
        )
        for a in ACTIVATIONS
    ],
)
def test_activations(activation: Activation, expert_weights: MakeExperts, floats: Floats) -> None:
    weights = expert_weights(3, 128, 64, activation=activation, quant=AFFINE4, dtype=mx.bfloat16)
    assert_switch_glu(floats(1, 128, dtype=mx.bfloat16), weights, mx.array([[1, 2]], mx.uint32))


# Formats whose chunks are alike share what they read of x; of others each reads its own.
@pytest.mark.parametrize(
    "names", [("affine4-g64", "affine8-g32"), ("mxfp4", "plain"), ("affine3-g64", "affine3-g32")]
)
def test_each_projection_has_its_own_format(
    names: tuple[str, str], projection: MakeProjection, floats: Floats
) -> None:
    one, other = (BY_NAME[name].of(mx.float16) for name in names)
    weights = ExpertWeights(
        gate=projection(3, 64, 512, **one),
        up=projection(3, 64, 512, **other),
        down=projection(3, 512, 64, **one),
    )
    assert_switch_glu(floats(1, 512, dtype=mx.float16), weights, mx.array([[1, 2]], mx.uint32))


# Rows that are not a multiple of a simdgroup's or a threadgroup's; dims of plain weights may be any.
@pytest.mark.parametrize(("hidden", "width"), [(64 * 3, 32), (33, 7), (1, 1), (97, 50)])
def test_odd_dims_of_plain_weights(
    hidden: int, width: int, expert_weights: MakeExperts, floats: Floats
) -> None:
    weights = expert_weights(2, hidden, width)
    assert_switch_glu(floats(3, hidden), weights, mx.array([[1], [0], [1]], mx.uint32))


@pytest.mark.parametrize("rows", [1, 3, pytest.param(7, marks=pytest.mark.slow), 13])
def test_odd_rows_of_packed_gate_and_up(rows: int, projection: MakeProjection, floats: Floats) -> None:
    format_ = BY_NAME["affine4-g64"].of(mx.float16)
    weights = ExpertWeights(
        gate=projection(2, rows, 128, **format_),
        up=projection(2, rows, 128, **format_),
        down=projection(2, 128, rows, dtype=mx.float16),
    )
    assert_switch_glu(floats(2, 128, dtype=mx.float16), weights, mx.array([[1, 0], [0, 1]], mx.uint32))


# Of one row the bound knows nothing: it is relative to the largest of some.
@pytest.mark.parametrize("rows", [7, pytest.param(13, marks=pytest.mark.slow)])
def test_odd_rows_of_packed_down(rows: int, projection: MakeProjection, floats: Floats) -> None:
    weights = ExpertWeights(
        up=projection(2, 128, rows, dtype=mx.float16),
        down=projection(2, rows, 128, **BY_NAME["affine4-g64"].of(mx.float16)),
        activation=Activation(name="relu2"),
    )
    assert_switch_glu(floats(2, rows, dtype=mx.float16), weights, mx.array([[1, 0], [0, 1]], mx.uint32))


# Buffers of fewer than 8 elements are constant: indices, and of one expert with one row nearly everything.
@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (1, 7), (1, 8), (3, 3), (33, 2)])
def test_tokens_and_routes(
    tokens: int, top_k: int, expert_weights: MakeExperts, floats: Floats, rng: Any
) -> None:
    weights = expert_weights(top_k, 64, 64, quant=AFFINE4, dtype=mx.float16)  # k = E
    assert_switch_glu(floats(tokens, 64, dtype=mx.float16), weights, some_indices(rng, tokens, top_k, top_k))


def test_smallest_buffers(projection: MakeProjection, floats: Floats) -> None:
    format_ = Format("affine2-g32", QuantSpec(bits=2, group_size=32)).of(mx.float32)
    weights = ExpertWeights(
        gate=projection(1, 1, 32, bias=True, **format_),
        up=projection(1, 1, 32, bias=True, **format_),
        down=projection(1, 32, 1, bias=True),
    )
    assert_switch_glu(floats(1, 32), weights, mx.array([[0]], mx.uint32))


def test_one_hot_expert_and_empty_ones(expert_weights: MakeExperts, floats: Floats) -> None:
    weights = expert_weights(9, 64, 64, quant=AFFINE4, dtype=mx.float16)
    indices = mx.array([[5, 1]] * 7, mx.uint32)
    assert_switch_glu(floats(7, 64, dtype=mx.float16), weights, indices)


def test_no_tokens(expert_weights: MakeExperts, shared_expert: MakeShared, floats: Floats) -> None:
    weights, shared = expert_weights(3, 64, 32), shared_expert(64, 96, output_gate=True)
    x, indices = mx.zeros((0, 64)), mx.zeros((0, 2), mx.uint32)
    with emulated() as launches:
        inner, kept = decode.gate_up_with_shared(x, weights, indices, shared)
        assert inner.shape == (0, 2, 32)
        assert kept.inner.shape == (0, 96)
        assert decode.down(inner, weights, indices).shape == (0, 2, 64)
        y = decode.down_combine(inner, weights, indices, mx.zeros((0, 2)), shared=kept)
        assert y.shape == (0, 64)
    assert launches == []


@pytest.mark.parametrize("dtype", [mx.uint32, mx.int32, mx.int64, mx.uint64, mx.int8, mx.int16, mx.uint16])
def test_experts_that_do_not_exist_contribute_nothing(
    dtype: mx.Dtype, expert_weights: MakeExperts, floats: Floats
) -> None:
    weights = expert_weights(3, 64, 64, bias=True, quant=AFFINE4, dtype=mx.float16)
    signed = dtype in (mx.int32, mx.int64, mx.int8, mx.int16)
    values = [[0, 3, 1], [-1 if signed else 255, 2, 0x100000000 if dtype.size == 8 else 100]]
    indices = mx.array(np.array(values), dtype)
    x, route_weights = floats(2, 64, dtype=mx.float16), mx.abs(floats(2, 3))
    with emulated():
        inner = decode.gate_up(x, weights, indices)
        y = decode.down(inner, weights, indices)
        combined = decode.down_combine(inner, weights, indices, route_weights)
    exist = (float64(indices) >= 0) & (float64(indices) < 3)
    want = oracle.switch_glu(x, weights, mx.array(np.where(exist, np.array(indices), 0)))
    want = np.where(exist[..., None], want, 0)
    assert_close(y, want, "switch_glu", reductions=(64, 64))
    assert not np.array(inner)[~exist].any()
    total = (want * float64(route_weights)[..., None]).sum(-2)
    assert_close(combined, total, "experts", reductions=(64, 64), top_k=3)


# -- combined ----------------------------------------------------------------------------------------------


# 1 is a copy, up to 8 are summed in order, 33 are more routes than simdgroups.
@pytest.mark.parametrize(
    ("top_k", "weights_dtype"),
    [
        *((2, dtype) for dtype in DTYPES),
        *((top_k, mx.float32) for top_k in (1, 9, 33)),
        *(pytest.param(k, d, marks=pytest.mark.slow) for k in (1, 8, 9, 20, 33) for d in DTYPES[1:]),
    ],
)
def test_combine(
    top_k: int, weights_dtype: mx.Dtype, expert_weights: MakeExperts, floats: Floats, rng: Any
) -> None:
    weights = expert_weights(top_k + 1, 64, 64, quant=AFFINE4, dtype=mx.float16)
    x, indices = floats(2, 64, dtype=mx.float16), some_indices(rng, 2, top_k, top_k + 1)
    route_weights = mx.softmax(floats(2, top_k), axis=-1).astype(weights_dtype)
    with emulated() as launches:
        y = decode.down_combine(decode.gate_up(x, weights, indices), weights, indices, route_weights)
    assert [made.name for made in launches] == ["gate_up", "down_combine"]
    want = oracle.experts(x, weights, indices, route_weights)
    assert_close(y, want, "experts", reductions=(64, 64), top_k=top_k)


@pytest.mark.parametrize("combine_dtype", [mx.float16, mx.bfloat16])
def test_combine_dtype(combine_dtype: mx.Dtype, expert_weights: MakeExperts, floats: Floats) -> None:
    weights = expert_weights(3, 64, 64, quant=AFFINE4, dtype=mx.float16)
    x, indices = floats(1, 64, dtype=mx.float16), mx.array([[2, 0, 1]], mx.uint32)
    route_weights = mx.abs(floats(1, 3))
    with emulated():
        inner = decode.gate_up(x, weights, indices)
        y = decode.down_combine(inner, weights, indices, route_weights, combine_dtype)
    want = oracle.experts(x, weights, indices, route_weights.astype(combine_dtype))
    assert_close(y, want, "experts", reductions=(64, 64), top_k=3)


@pytest.mark.parametrize(
    ("name", "output_gate", "merged"),
    [
        ("plain", True, False),
        ("affine4-g64", False, False),
        ("affine4-g64", True, True),
        ("mxfp8", False, True),
        pytest.param("mxfp8", True, False, marks=pytest.mark.slow),
        pytest.param("plain", False, True, marks=pytest.mark.slow),
    ],
)
def test_shared_expert(
    name: str,
    output_gate: bool,
    merged: bool,
    expert_weights: MakeExperts,
    shared_expert: MakeShared,
    floats: Floats,
) -> None:
    """Beside the routed launches, or in them; of a width and a format of its own."""
    weights = expert_weights(4, 128, 64, quant=AFFINE4, dtype=mx.bfloat16)
    shared = shared_expert(128, 192, output_gate=output_gate, **BY_NAME[name].of(mx.bfloat16))
    x, indices = floats(3, 128, dtype=mx.bfloat16), mx.array([[2, 0], [1, 3], [3, 0]], mx.uint32)
    route_weights = mx.abs(floats(3, 2))
    assert decode.why_not(x.dtype, weights.layout, shared.layout) is None
    with emulated() as launches:
        if merged:
            inner, kept = decode.gate_up_with_shared(x, weights, indices, shared)
        else:
            inner, kept = decode.gate_up(x, weights, indices), decode.shared_gate_up(x, shared)
        y = decode.down_combine(inner, weights, indices, route_weights, shared=kept)
    assert len(launches) == 2 + (not merged)
    want = oracle.experts(x, weights, indices, route_weights) + oracle.shared_expert(x, shared)
    assert_close(y, want, "moe", reductions=(128, 192), top_k=2)


def test_identity_experts_and_a_scale_on_the_output(
    expert_weights: MakeExperts, shared_expert: MakeShared, floats: Floats
) -> None:
    weights = expert_weights(3, 64, 64, quant=AFFINE4, dtype=mx.float16)
    shared = shared_expert(64, 64, quant=AFFINE4, dtype=mx.float16)
    x, indices = floats(2, 64, dtype=mx.float16), mx.array([[3, 0, 4], [1, 2, 0]], mx.uint32)
    route_weights = mx.abs(floats(2, 3)).astype(mx.float16)
    with emulated():
        inner, kept = decode.gate_up_with_shared(x, weights, indices, shared)
        y = decode.down_combine(inner, weights, indices, route_weights, shared=kept, identity=x, scale=2.5)
    exist = np.array(indices) < 3
    each = oracle.switch_glu(x, weights, mx.where(indices < 3, indices, 0))
    each = np.where(exist[..., None], each, float64(x)[:, None])
    want = 2.5 * (each * float64(route_weights)[..., None]).sum(-2) + oracle.shared_expert(x, shared)
    assert_close(y, want, "moe", reductions=(64, 64), top_k=3)


# -- refusals ----------------------------------------------------------------------------------------------


def test_mixtures_of_dtypes_are_refused(
    expert_weights: MakeExperts, shared_expert: MakeShared, projection: MakeProjection
) -> None:
    layout = expert_weights(2, 64, 64, quant=AFFINE4, dtype=mx.bfloat16).layout
    assert decode.why_not(mx.bfloat16, layout) is None
    assert decode.why_not(mx.float16, layout) == "gate: scales are bfloat16, x is float16"
    plain = expert_weights(2, 64, 64, dtype=mx.float32).layout
    assert decode.why_not(mx.float16, plain) == "gate: weights are float32, x is float16"
    mxfp4 = BY_NAME["mxfp4"].quant
    biased = ExpertWeights(
        up=projection(2, 64, 64, quant=mxfp4),
        down=Projection(
            *mx.quantize(mx.zeros((2, 64, 64)), mode="mxfp4", group_size=32, bits=4),
            quant=mxfp4,
            bias=mx.zeros((2, 64)),
        ),
        activation=Activation(name="relu2"),
    )
    assert decode.why_not(mx.float32, biased.layout) is None
    assert decode.why_not(mx.float16, biased.layout) == "down: its bias is float32, x is float16"
    shared = shared_expert(64, 64, output_gate=True, dtype=mx.float32)
    reason = "shared gate: weights are float32, x is bfloat16"
    assert decode.why_not(mx.bfloat16, layout, shared.layout) == reason
