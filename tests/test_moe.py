"""``moe``: routing, experts, combine and shared expert in one call, against the float64 oracle."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import oracle
import pytest
from factories import Floats, MakeExperts, MakeShared
from families import FAMILIES, Family
from formats import DTYPES

from moefast import Activation, QuantSpec, RouterSpec, experts, moe, route
from moefast.testing import assert_close, routing_bound

every_backend = pytest.mark.usefixtures("backend")

EXPERTS, TOP_K, HIDDEN, WIDTH, TOKENS = 16, 4, 32, 64, 9


def check(
    x: mx.array, logits: mx.array, spec: RouterSpec, weights: Any, combine_dtype: Any = None, **options: Any
) -> mx.array:
    routed = oracle.route(logits, spec, options.get("selection_bias"), options.get("expert_scale"))
    assert (routed.margin > routing_bound(spec, logits.dtype).gap).all(), "the seed gives a near-tie"
    y = moe(x, logits, spec, weights, combine_dtype=combine_dtype, **options)
    assert y.shape == x.shape
    want = oracle.moe(x, logits, spec, weights, **options)
    assert_close(y, want, "moe", dtype=x.dtype, reductions=(HIDDEN, WIDTH), top_k=spec.top_k)
    return y


@every_backend
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_families(family: Family, floats: Floats, expert_weights: MakeExperts) -> None:
    groups = {"num_groups": 4, "top_groups": 2} if family.groups else {}
    spec = family.router(num_experts=EXPERTS, top_k=TOP_K, scale=2.5, **groups)
    check(
        floats(TOKENS, HIDDEN),
        floats(TOKENS, EXPERTS),
        spec,
        expert_weights(EXPERTS, HIDDEN, WIDTH),
        combine_dtype=mx.float32 if family.combine else None,
        selection_bias=floats(EXPERTS, scale=0.1) if family.bias else None,
        expert_scale=1 + mx.abs(floats(EXPERTS)) if family.expert_scale else None,
    )


SPEC = RouterSpec(num_experts=EXPERTS, top_k=TOP_K, score_dtype="float32", renormalize=True)


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("output_gate", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("quant", [None, QuantSpec(group_size=32)], ids=str)
def test_shared_expert(
    quant: QuantSpec | None,
    output_gate: bool,
    dtype: mx.Dtype,
    floats: Floats,
    expert_weights: MakeExperts,
    shared_expert: MakeShared,
) -> None:
    weights = expert_weights(EXPERTS, HIDDEN, WIDTH, quant=quant, dtype=dtype, bias=True)
    shared = shared_expert(HIDDEN, 2 * WIDTH, output_gate=output_gate, quant=quant, dtype=dtype)
    check(floats(TOKENS, HIDDEN, dtype=dtype), floats(TOKENS, EXPERTS), SPEC, weights, shared=shared)


@every_backend
def test_scale_of_the_output_leaves_the_shared_expert(
    floats: Floats, expert_weights: MakeExperts, shared_expert: MakeShared
) -> None:
    """Laguna: the routed output is scaled, the weights are not, nor is the shared expert."""
    spec = RouterSpec(num_experts=EXPERTS, top_k=TOP_K, score="sigmoid", scale=2.5, scale_place="output")
    x, logits = floats(TOKENS, HIDDEN), floats(TOKENS, EXPERTS)
    check(x, logits, spec, expert_weights(EXPERTS, HIDDEN, WIDTH), shared=shared_expert(HIDDEN, WIDTH))


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_identity_experts(dtype: mx.Dtype, floats: Floats, expert_weights: MakeExperts) -> None:
    """LongCat: the last 6 of 16 experts have no weights; some tokens choose several, some none."""
    spec = RouterSpec(num_experts=EXPERTS, top_k=3, identity_experts=6, score_dtype="float32", scale=3.0)
    logits = floats(TOKENS, EXPERTS)
    logits[0, 10:] = 5 + mx.arange(6)  # identity experts only
    logits[1, 10:] = -5  # none
    y = check(
        floats(TOKENS, HIDDEN, dtype=dtype), logits, spec, expert_weights(10, HIDDEN, WIDTH, dtype=dtype)
    )
    assert y.dtype == dtype


@every_backend
def test_experts_without_a_gate(floats: Floats, expert_weights: MakeExperts) -> None:
    weights = expert_weights(EXPERTS, HIDDEN, WIDTH, activation=Activation(name="relu2"), bias=True)
    check(floats(TOKENS, HIDDEN), floats(TOKENS, EXPERTS), SPEC, weights)


@pytest.mark.parametrize("lead", [(), (0,), (1,), (2, 3), (2, 0), (40,)], ids=str)
def test_leading_dimensions(lead: tuple[int, ...], floats: Floats, expert_weights: MakeExperts) -> None:
    """The parts, one after another, give the same bits."""
    x, logits, weights = floats(*lead, HIDDEN), floats(*lead, EXPERTS), expert_weights(EXPERTS, HIDDEN, WIDTH)
    y = moe(x, logits, SPEC, weights, backend="reference")
    assert y.shape == x.shape
    parts = experts(x, weights, route(logits, SPEC, backend="reference"), backend="reference")
    np.testing.assert_array_equal(np.array(y), np.array(parts))


@every_backend
def test_dense_and_sparse_extremes(floats: Floats, expert_weights: MakeExperts) -> None:
    """top_k = num_experts, and a single expert, whose renormalised weight is 1."""
    for num_experts in (4, 1):
        spec = RouterSpec(num_experts=num_experts, top_k=num_experts, renormalize=True)
        weights = expert_weights(num_experts, HIDDEN, WIDTH)
        check(floats(TOKENS, HIDDEN), floats(TOKENS, num_experts), spec, weights)


@every_backend
def test_gradients_reach_logits_and_input(
    floats: Floats, expert_weights: MakeExperts, shared_expert: MakeShared
) -> None:
    spec = RouterSpec(
        num_experts=8, top_k=2, score="sigmoid", num_groups=4, top_groups=2, renormalize=True, scale=2.5
    )
    weights, shared = expert_weights(8, 4, 5), shared_expert(4, 6, output_gate=True)
    x, logits, slopes = floats(3, 4), floats(3, 8), floats(3, 4)

    def cost(x: mx.array, logits: mx.array) -> mx.array:
        return (moe(x, logits, spec, weights, shared=shared) * slopes).sum()

    def true_cost(x: Any, logits: Any) -> float:
        return float((oracle.moe(x, logits, spec, weights, shared=shared) * np.array(slopes)).sum())

    of_x, of_logits = mx.grad(cost, argnums=(0, 1))(x, logits)
    for got, want in (
        (of_x, oracle.gradient(lambda x: true_cost(x, logits), x)),
        (of_logits, oracle.gradient(lambda logits: true_cost(x, logits), logits)),
    ):
        assert_close(got, want, "moe", reductions=(4, 5), top_k=2, gradient=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": mx.zeros((3, 31))}, r"\[moe\] x.shape\[-1\] must equal hidden=32, got \(3, 31\)"),
        (
            {"logits": mx.zeros((3, 15))},
            r"\[moe\] logits.shape\[-1\] must equal num_experts=16, got \(3, 15\)",
        ),
        (
            {"logits": mx.zeros((2, 16))},
            r"\[moe\] logits must be \(3, 16\) for x of shape \(3, 32\), got \(2, 16\)",
        ),
        ({"logits": mx.zeros((3, 16), mx.int32)}, r"\[moe\] logits must be float32, .*got mlx.core.int32"),
        ({"selection_bias": mx.zeros(15)}, r"\[moe\] selection_bias must be a float array \(16,\)"),
        ({"expert_scale": mx.zeros((1, 16))}, r"\[moe\] expert_scale must be a float array \(16,\)"),
        ({"combine_dtype": mx.uint8}, r"\[moe\] combine_dtype must be float32, .*got mlx.core.uint8"),
        # 12 real experts and 4 identities make 16; the stack holds 16.
        (
            {"spec": RouterSpec(num_experts=16, top_k=4, identity_experts=4)},
            r"\[moe\] weights must hold 12 experts for RouterSpec\(num_experts=16, .*got 16",
        ),
    ],
)
def test_refuses(change: dict[str, Any], message: str, expert_weights: MakeExperts) -> None:
    arguments = {"x": mx.zeros((3, 32)), "logits": mx.zeros((3, 16)), "spec": SPEC} | change
    with pytest.raises(ValueError, match=message):
        moe(weights=expert_weights(EXPERTS, HIDDEN, WIDTH), **arguments)


def test_refuses_a_shared_expert_of_another_size(
    expert_weights: MakeExperts, shared_expert: MakeShared
) -> None:
    with pytest.raises(ValueError, match=r"\[moe\] the shared expert must have hidden=32, got 16"):
        moe(
            mx.zeros((3, 32)),
            mx.zeros((3, 16)),
            SPEC,
            expert_weights(EXPERTS, HIDDEN, WIDTH),
            shared=shared_expert(16, 64),
        )
