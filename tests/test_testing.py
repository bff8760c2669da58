"""The tolerances themselves: what they admit and what they must not."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import oracle
import pytest
from factories import Floats, MakeExperts, MakeProjection

from moefast import QuantSpec, RouterSpec, switch_glu
from moefast.testing import (
    Bound,
    Error,
    assert_close,
    assert_logits_close,
    assert_same_routing,
    bound,
    bound_of_two,
    error,
    float64,
    logits_bound,
    score_bound,
    unit_roundoff,
    within,
)

DTYPES = (mx.float32, mx.float16, mx.bfloat16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@dtypes
def test_unit_roundoff_is_half_a_step(dtype: mx.Dtype) -> None:
    u = unit_roundoff(dtype)
    one = mx.array(1.0, dtype)
    assert (one + mx.array(2 * u, dtype)).item() > 1
    assert (one + mx.array(u / 2, dtype)).item() == 1
    assert unit_roundoff(str(dtype).removeprefix("mlx.core.")) == u


def test_error_is_relative_to_each_row() -> None:
    want = np.array([[4.0, 3.0], [400.0, 300.0]])
    got = want + np.array([[1.0, 0.0], [0.0, 100.0]])
    assert error(mx.array(got), want) == Error(max=0.25, rms=float(np.sqrt((1 / 25 + 100**2 / 500**2) / 2)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_infinitely_wrong(bad: float) -> None:
    assert error(np.array([1.0, bad]), np.array([1.0, 2.0])).max == np.inf
    assert error(np.array([1.0, 2.0]), np.array([1.0, bad])).max == np.inf
    assert error(np.array([1.0, np.inf]), np.array([1.0, np.inf])) == (0, 0)
    assert not within(np.array([1.0, bad]), np.array([1.0, 2.0]), Bound(1e9, 1e9))[0]


def test_rows_of_zeros_must_be_zeros() -> None:
    assert error(np.zeros((2, 3)), np.zeros((2, 3))) == (0, 0)
    assert error(np.full((2, 3), 1e-30), np.zeros((2, 3))).max == np.inf


def test_shapes_must_be_equal() -> None:
    with pytest.raises(AssertionError, match=r"got \(2, 3\) and \(3,\)"):
        error(np.zeros((2, 3)), np.zeros(3))
    assert error(np.zeros((0, 3)), np.zeros((0, 3))) == (0, 0)


@dtypes
def test_a_correct_implementation_uses_a_good_part_of_the_bound(
    dtype: mx.Dtype, floats: Floats, expert_weights: MakeExperts
) -> None:
    """float32 arithmetic, rounded to the dtype after gate, up, activation and down: neither refused, nor
    so far inside that a quarter of it would do for float16 and bfloat16."""
    weights, x = expert_weights(4, 256, 512, dtype=dtype), floats(50, 256, dtype=dtype)

    def rounded(y: mx.array) -> mx.array:
        return y.astype(dtype).astype(mx.float32)

    def correct(expert: int) -> mx.array:
        gate, up, down = (p.weight[expert].astype(mx.float32) for p in weights.projections)
        rows = x.astype(mx.float32)
        gate, up = rounded(rows @ gate.T), rounded(rows @ up.T)
        return (rounded(rounded(gate * rounded(mx.sigmoid(gate))) * up) @ down.T).astype(dtype)

    got = mx.stack([correct(expert) for expert in range(4)], axis=1)
    indices = mx.broadcast_to(mx.arange(4), (50, 4))
    limit = bound(dtype, "switch_glu", reductions=(256, 512))
    passed, figures = within(got, oracle.switch_glu(x, weights, indices), limit)
    assert passed, (figures, limit)
    if dtype != mx.float32:
        assert not Bound(limit.max / 4, limit.rms / 4).admits(figures), (figures, limit)


@pytest.mark.usefixtures("cpu")
def test_accumulating_in_bfloat16_is_refused(projection: MakeProjection, floats: Floats) -> None:
    """What MLX's own quantized product does on a CPU."""
    p = projection(64, 1024, quant=QuantSpec(), dtype=mx.bfloat16)
    x = floats(9, 1024, dtype=mx.bfloat16)
    want = oracle.project(float64(x), p)
    stock = mx.quantized_matmul(x, p.weight, p.scales, p.biases, **p.quant.mlx_arguments())
    with pytest.raises(AssertionError, match="exceeds"):
        assert_close(stock, want, "quantized_matmul", reductions=(1024,))
    assert_close(mx.array(want.astype(np.float32)), want, "quantized_matmul", dtype=mx.bfloat16)


@pytest.mark.parametrize(
    "damage",
    [
        lambda y: y * 1.01,  # a scale that is off
        lambda y: y[::-1],  # tokens swapped
        lambda y: mx.concatenate([y[:, :-1], mx.zeros_like(y[:, -1:])], axis=1),  # an output left out
        lambda y: y + 0.02 * (mx.arange(y.size) == 7).reshape(y.shape),  # one wrong element
    ],
)
def test_small_damage_is_refused(damage, floats: Floats, expert_weights: MakeExperts) -> None:
    weights, x = expert_weights(4, 64, 64), floats(9, 64)
    indices = mx.arange(9).reshape(9, 1) % 4
    y = switch_glu(x, weights, indices)
    want = oracle.switch_glu(x, weights, indices)
    assert_close(y, want, "switch_glu", reductions=(64, 64))
    with pytest.raises(AssertionError, match="exceeds"):
        assert_close(damage(y[:, 0])[:, None], want, "switch_glu", reductions=(64, 64))


def test_bounds_grow_as_the_model_says() -> None:
    base = bound("float32", "switch_glu", reductions=(512, 512))
    assert bound("float32", "switch_glu", reductions=(512, 4096)).rms > base.rms
    assert bound("float32", "experts", reductions=(512, 512), top_k=8).rms > base.rms
    assert bound("float32", "switch_glu", reductions=(512, 512), gradient=True).rms > base.rms
    # In bfloat16 the roundings are all that matters.
    coarse = (bound("bfloat16", "switch_glu", reductions=(k, k)).rms for k in (64, 4096))
    assert len({f"{rms:.3g}" for rms in coarse}) == 1
    assert score_bound("float32") < score_bound("float16") < score_bound("bfloat16")
    assert score_bound("bfloat16") < score_bound("bfloat16", precise=False)


def test_a_router_s_logits_count_by_their_size() -> None:
    """A weight is as wrong, relatively, as its logit is absolutely."""
    without = bound("bfloat16", "moe", reductions=(64, 64))
    small, large = (bound("bfloat16", "moe", reductions=(64, 64), logits=size) for size in (0.1, 100.0))
    assert without.rms < small.rms < 1.01 * without.rms
    assert large.rms == pytest.approx(2 * 100 * 2**-8 / 3**0.5, rel=0.01)
    both = bound_of_two(small, large)
    assert both == Bound(max=small.max + large.max, rms=small.rms + large.rms)


def test_one_rounding_always_passes() -> None:
    for dtype in DTYPES:
        assert bound(dtype, "quantized_matmul").rms >= unit_roundoff(dtype)


# -- routing -----------------------------------------------------------------------------------------------

SPEC = RouterSpec(num_experts=8, top_k=2)
WANT = (np.array([[1, 5], [2, 3]]), np.array([[0.7, 0.2], [0.5, 0.4]]))


def test_routing_is_compared_by_expert_whatever_the_order() -> None:
    swapped = (WANT[0][:, ::-1], WANT[1][:, ::-1])
    assert assert_same_routing(swapped, WANT, SPEC, "float32") == 1.0


def test_weights_of_the_wrong_experts_are_refused() -> None:
    with pytest.raises(AssertionError, match="weights differ"):
        assert_same_routing((WANT[0], WANT[1][:, ::-1]), WANT, SPEC, "float32")


def test_other_experts_are_refused_outside_the_margin() -> None:
    other = (np.array([[1, 6], [2, 3]]), WANT[1])
    with pytest.raises(AssertionError, match="1 of 2 tokens have other experts"):
        assert_same_routing(other, WANT, SPEC, "float32")
    with pytest.raises(AssertionError, match="1 of 2 tokens have other experts"):
        assert_same_routing(other, WANT, SPEC, "float32", margin=np.array([0.1, 0.1]))
    assert assert_same_routing(other, WANT, SPEC, "float32", margin=np.array([0.0, 0.1])) == 0.5


# -- whole models ------------------------------------------------------------------------------------------


def test_logits_of_two_models(floats: Floats) -> None:
    want = floats(3, 500)
    near = want * (1 + mx.random.uniform(-1, 1, want.shape) * logits_bound(layers=2, hidden=64).rms)
    assert_logits_close(near, want, layers=2, hidden=64)
    with pytest.raises(AssertionError, match="exceeds"):
        assert_logits_close(want * 1.001, want, layers=2, hidden=64)
    assert logits_bound(layers=40, hidden=4096).rms > logits_bound(layers=2, hidden=64).rms
