"""``route`` against the float64 oracle, its derivatives, and its behaviour at the edges."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import oracle
import pytest
from conftest import BACKENDS
from factories import Floats
from families import FAMILIES, Family
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import router_specs

from moefast import RouterSpec, route
from moefast.testing import assert_close, assert_same_routing

DTYPES = (mx.float32, mx.float16, mx.bfloat16)

families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_backend = pytest.mark.usefixtures("backend")


def of_family(family: Family, dtype: mx.Dtype, experts: int = 64, top_k: int = 8) -> RouterSpec:
    groups = {"num_groups": 8, "top_groups": 4} if family.groups else {}
    name = str(dtype).removeprefix("mlx.core.")
    return family.router(num_experts=experts, top_k=top_k, scale=2.5, dtype=name, **groups)


# -- values ------------------------------------------------------------------------------------------------


@every_backend
@dtypes
@families
def test_routes_like_the_oracle(family: Family, dtype: mx.Dtype, floats: Floats) -> None:
    spec = of_family(family, dtype)
    logits = floats(150, 64, dtype=mx.float32 if family.float32_logits else dtype)
    bias = floats(64, scale=0.1) if family.bias else None
    scale = 1 + mx.abs(floats(64, dtype=dtype)) if family.expert_scale else None
    got = route(logits, spec, selection_bias=bias, expert_scale=scale)
    want = oracle.route(logits, spec, bias, scale)
    assert assert_same_routing(got, want[:2], spec, logits.dtype, margin=want.margin) > 0


@every_backend
@dtypes
@families
def test_equal_keys_are_settled_by_index(family: Family, dtype: mx.Dtype, rng: np.random.Generator) -> None:
    """Logits of 0 have exact scores (a half, or one 64th) and so exact keys: no margin for the choice. Only
    sqrtsoftplus(0) is irrational, but it is the same for all experts."""
    spec = of_family(family, dtype)
    logits = mx.zeros((40, 64), mx.float32 if family.float32_logits else dtype)
    for _ in range(10):
        # From -5/4 to 1/4, so that kept keys go below the 0 of dropped groups.
        bias = mx.array(rng.integers(-7, 0, 64).astype(np.float32) / 4) if family.bias else None
        got = route(logits, spec, selection_bias=bias)
        assert_same_routing(got, oracle.route(logits, spec, bias)[:2], spec, logits.dtype)


@every_backend
@pytest.mark.parametrize("ties", ["lowest", "highest"])
def test_selected_logits_need_no_margin(ties: str, floats: Floats) -> None:
    """A router whose keys are the logits themselves computes nothing before it chooses."""
    spec = RouterSpec(num_experts=64, top_k=8, score_over="selected", ties=ties)
    logits = floats(200, 64, dtype=mx.bfloat16)  # 8 bits of mantissa: a twentieth of the tokens tie
    got = route(logits, spec)
    assert_same_routing(got, oracle.route(logits, spec)[:2], spec, mx.bfloat16)


@pytest.mark.parametrize("name", BACKENDS)
@given(spec=router_specs(), seed=st.integers(0, 2**32 - 1), few=st.booleans(), biased=st.booleans())
@settings(max_examples=150, deadline=None)
def test_any_spec_routes_like_the_oracle(
    name: str, spec: RouterSpec, seed: int, few: bool, biased: bool
) -> None:
    rng = np.random.default_rng(seed)
    shape = (6, spec.num_experts)
    logits = mx.array((rng.integers(-2, 3, shape) if few else rng.standard_normal(shape)).astype(np.float32))
    bias = mx.array(rng.standard_normal(spec.num_experts).astype(np.float32) / 4) if biased else None
    got = route(logits, spec, selection_bias=bias, backend=name)
    indices = np.sort(np.array(got.indices), axis=-1)
    assert (indices < spec.num_experts).all()
    assert (np.diff(indices.astype(int), axis=-1) > 0).all(), "an expert was chosen twice"
    # What follows is exact only in float32; a weight taken from a filled key has no fixed meaning.
    half = {spec.score_dtype, spec.bias_dtype, spec.weight_dtype} & {"float16", "bfloat16"}
    if not half and spec.weights_from == "scores":
        want = oracle.route(logits, spec, bias)
        assert_same_routing(got, want[:2], spec, mx.float32, margin=want.margin)


@every_backend
@pytest.mark.parametrize("eps_form", ["add", "max"])
@pytest.mark.parametrize("eps", [0.5, 4.0], ids=["below the sum", "above the sum"])
def test_renormalization_is_guarded(eps_form: str, eps: float, floats: Floats) -> None:
    """An eps of 1e-12 cannot be seen; this large, its two forms differ."""
    spec = RouterSpec(
        num_experts=16, top_k=4, score="sigmoid", renormalize=True, renormalize_eps=eps, eps_form=eps_form
    )
    logits = floats(9, 16)
    want = oracle.route(logits, spec)
    got = route(logits, spec)
    assert_same_routing(got, want[:2], spec, mx.float32, margin=want.margin)


# -- derivatives -------------------------------------------------------------------------------------------


@every_backend
@families
def test_weights_have_the_oracles_gradient(family: Family, floats: Floats) -> None:
    spec = of_family(family, mx.float32, experts=16, top_k=4)
    logits = floats(2, 16)
    bias = floats(16, scale=0.1) if family.bias else None
    scale = 1 + mx.abs(floats(16)) if family.expert_scale else None
    by_expert = floats(16)  # a cost per expert makes the sum independent of the order of the choice

    def cost(logits: mx.array) -> mx.array:
        routing = route(logits, spec, selection_bias=bias, expert_scale=scale)
        return (routing.weights * by_expert[routing.indices]).sum()

    def true_cost(logits: oracle.Float64) -> float:
        routed = oracle.route(logits, spec, bias, scale)
        return float((routed.weights * np.array(by_expert)[routed.indices]).sum())

    assert_close(mx.grad(cost)(logits), oracle.gradient(true_cost, logits), "route", gradient=True)


@every_backend
def test_choice_has_no_gradient(floats: Floats) -> None:
    """The selection bias selects, it does not weigh; and indices are constants to a derivative."""
    spec = RouterSpec(
        num_experts=16, top_k=4, score="sigmoid", num_groups=4, top_groups=2, renormalize=True, scale=2.5
    )
    logits, values = floats(5, 16), floats(16)

    def cost(bias: mx.array) -> mx.array:
        routing = route(logits, spec, selection_bias=bias)
        return (routing.weights * values[routing.indices]).sum()

    assert not np.array(mx.grad(cost)(floats(16))).any()


# -- compiled ----------------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("family", ["glm4_moe", "qwen2_moe", "granitemoe", "dbrx"])
def test_inside_compile(family: str, floats: Floats) -> None:
    spec = of_family({f.name: f for f in FAMILIES}[family], mx.float32)
    bias = floats(64, scale=0.1)

    def plain(logits: mx.array) -> tuple[mx.array, mx.array]:
        return route(logits, spec, selection_bias=bias)

    compiled = mx.compile(plain)
    for tokens in (3, 5):  # the second shape traces again
        logits = floats(tokens, 64)
        got, want = compiled(logits), plain(logits)
        margin = oracle.route(logits, spec, bias).margin
        assert_same_routing(tuple(got), tuple(want), spec, mx.float32, margin=margin)


# -- edges -------------------------------------------------------------------------------------------------

SPEC = RouterSpec(num_experts=16, top_k=4, score="sigmoid", num_groups=4, top_groups=2, renormalize=True)


@every_backend
@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16), (0, 5, 16)])
def test_no_tokens(shape: tuple[int, ...]) -> None:
    routing = route(mx.zeros(shape), SPEC)
    mx.eval(routing)
    assert routing.indices.shape == routing.weights.shape == (*shape[:-1], 4)
    assert routing.indices.dtype == mx.uint32


@every_backend
@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 3, 16), (2, 1, 3, 16)])
def test_leading_dimensions_are_tokens(shape: tuple[int, ...], floats: Floats) -> None:
    logits = floats(*shape)
    shaped, flat = route(logits, SPEC), route(logits.reshape(-1, 16), SPEC)
    for mine, theirs in zip(shaped, flat, strict=True):
        assert mine.shape == (*shape[:-1], 4)
        np.testing.assert_array_equal(np.array(mine).reshape(-1, 4), np.array(theirs))


@every_backend
def test_strided_logits(floats: Floats) -> None:
    wide = floats(16, 12)
    sliced, copied = wide.T[::2], mx.array(np.ascontiguousarray(np.array(wide).T[::2]))
    for mine, theirs in zip(route(sliced, SPEC), route(copied, SPEC), strict=True):
        np.testing.assert_array_equal(np.array(mine), np.array(theirs))


@every_backend
@families
def test_nan_rows_choose_real_experts(family: Family, floats: Floats) -> None:
    """All NaN, or one: indices stay in range and distinct, and the other tokens are not touched."""
    spec = of_family(family, mx.float32)
    clean = floats(4, 64)
    bias = mx.zeros(64) if family.bias else None
    dirty = mx.array(clean)
    dirty[1] = mx.nan
    dirty[2, 5] = mx.nan
    got, want = (route(logits, spec, selection_bias=bias) for logits in (dirty, clean))
    indices = np.sort(np.array(got.indices), axis=-1)
    assert (indices < 64).all()
    assert (np.diff(indices.astype(int), axis=-1) > 0).all()
    for mine, theirs in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.array(mine)[::3], np.array(theirs)[::3])


@pytest.mark.parametrize(
    ("logits", "options", "message"),
    [
        ((2, 60), {}, r"\[route\] logits.shape\[-1\] must equal num_experts=16, got \(2, 60\)\."),
        ((), {}, r"\[route\] logits.shape\[-1\] must equal num_experts=16, got \(\)\."),
        (mx.int32, {}, r"\[route\] logits must be float32, float16 or bfloat16, got mlx.core.int32\."),
        (
            (2, 16),
            {"selection_bias": mx.zeros(15)},
            r"\[route\] selection_bias must be a float array \(16,\)",
        ),
        ((2, 16), {"selection_bias": mx.zeros(16, mx.int32)}, r"\[route\] selection_bias .*int32"),
        ((2, 16), {"selection_bias": mx.zeros((1, 16))}, r"\[route\] selection_bias .*\(1, 16\)"),
        ((2, 16), {"expert_scale": mx.zeros(17)}, r"\[route\] expert_scale must be a float array \(16,\)"),
        ((2, 16), {"backend": "cuda"}, r"\[backend\] backend must be one of \('auto', .*got 'cuda'\."),
    ],
)
def test_refuses(logits: tuple[int, ...] | mx.Dtype, options: dict[str, object], message: str) -> None:
    array = mx.zeros(logits) if isinstance(logits, tuple) else mx.zeros((2, 16), logits)
    with pytest.raises(ValueError, match=message):
        route(array, SPEC, **options)
