"""``route`` on the native backend: the oracle's experts, the reference's roundings, the order of a sort."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import oracle
import pytest
from factories import Floats
from families import BY_NAME, FAMILIES, Family
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import router_specs

import moefast
from moefast import RouterSpec
from moefast.routing import Routing
from moefast.testing import assert_same_routing, float64

DTYPES = (mx.float32, mx.float16, mx.bfloat16)
Route = Callable[..., Routing]

families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def route(cpu: None) -> Route:
    """``moefast.route`` on the native backend."""
    reason = moefast.backends().get("native", "there is no such backend")
    if reason is not None:
        pytest.skip(f"native: {reason}")

    def call(logits: mx.array, spec: RouterSpec, **options: mx.array | None) -> Routing:
        return moefast.route(logits, spec, backend="native", **options)

    return call


def reference(logits: mx.array, spec: RouterSpec, **options: mx.array | None) -> Routing:
    return moefast.route(logits, spec, backend="reference", **options)


def few_values(rng: np.random.Generator, *shape: int) -> mx.array:
    """Five different logits: every token ties."""
    return mx.array(rng.integers(-2, 3, shape).astype(np.float32))


def check_distinct(routing: Routing, num_experts: int) -> None:
    indices = np.sort(np.array(routing.indices).astype(np.int64), axis=-1)
    assert ((indices >= 0) & (indices < num_experts)).all()
    assert (np.diff(indices, axis=-1) > 0).all(), "an expert was chosen twice"


# -- values ------------------------------------------------------------------------------------------------

SHAPES = (
    (64, 8, 8, 4),  # half of the groups stay
    (60, 4, 1, 1),  # no power of two
    (16, 16, 8, 4),  # all experts, from kept and dropped groups
    (16, 4, 2, 1),  # one group of two
    (37, 33, 1, 1),  # so many that they are sorted afterwards
    (1, 1, 1, 1),
)


def spec_of(family: Family, dtype: mx.Dtype, shape: tuple[int, ...], scale: float = 2.5) -> RouterSpec:
    experts, top_k, groups, kept = shape
    return family.router(
        num_experts=experts,
        top_k=top_k,
        num_groups=groups if family.groups else 1,
        top_groups=kept if family.groups else 1,
        scale=scale,
        dtype=str(dtype).removeprefix("mlx.core."),
    )


@dtypes
@families
def test_routes_like_oracle_and_reference(
    family: Family, dtype: mx.Dtype, route: Route, rng: np.random.Generator, floats: Floats
) -> None:
    logits_dtype = mx.float32 if family.float32_logits else dtype
    for shape, ties in itertools.product(SHAPES, (False, True)):
        spec, experts = spec_of(family, dtype, shape), shape[0]
        logits = (few_values(rng, 40, experts) if ties else floats(40, experts)).astype(logits_dtype)
        bias = floats(experts, scale=0.1) if family.bias else None
        scale = 1 + mx.abs(floats(experts, dtype=dtype)) if family.expert_scale else None
        got = route(logits, spec, selection_bias=bias, expert_scale=scale)
        want = oracle.route(logits, spec, bias, scale)
        assert_same_routing(got, want[:2], spec, logits_dtype, margin=want.margin)
        plain = reference(logits, spec, selection_bias=bias, expert_scale=scale)
        assert got.indices.dtype == mx.uint32
        assert got.weights.dtype == plain.weights.dtype
        assert_same_routing(got, plain, spec, logits_dtype, margin=want.margin)


@dtypes
@families
def test_equal_keys_are_settled_by_index(
    family: Family, dtype: mx.Dtype, route: Route, rng: np.random.Generator
) -> None:
    """Logits of 0 have exact scores, and so exact keys. Kept keys go below the 0 of dropped groups."""
    spec = spec_of(family, dtype, SHAPES[0])
    logits = mx.zeros((40, 64), mx.float32 if family.float32_logits else dtype)
    for _ in range(10):
        bias = mx.array(rng.integers(-7, 0, 64).astype(np.float32) / 4) if family.bias else None
        got = route(logits, spec, selection_bias=bias)
        assert_same_routing(got, oracle.route(logits, spec, bias)[:2], spec, logits.dtype)


@dtypes
@pytest.mark.parametrize(
    "family", ["glm4_moe", "bailing_hybrid", "deepseek_v2", "kimi_linear", "longcat_flash"]
)
def test_negative_keys(family: str, dtype: mx.Dtype, route: Route, floats: Floats) -> None:
    """A bias that sinks kept keys below the fill of dropped groups, or all keys below 0."""
    spec = spec_of(BY_NAME[family], dtype, SHAPES[0])
    logits = floats(60, 64, dtype=dtype)
    for low in (0.5, 3.0):
        bias = floats(64) - low if BY_NAME[family].bias else None
        want = oracle.route(logits, spec, bias)
        got = route(logits, spec, selection_bias=bias)
        assert_same_routing(got, want[:2], spec, dtype, margin=want.margin)


def test_every_combination_of_dtypes(route: Route, rng: np.random.Generator, floats: Floats) -> None:
    """The dtype of scores, keys and weights, by MLX's promotion: five fields decide."""
    names = ("float32", "float16", "bfloat16")
    fields = itertools.product(
        DTYPES, DTYPES, (None, *names), (None, "scores", *names), (None, "logits", *names)
    )
    for logits_dtype, vector_dtype, score, key, weight in fields:
        spec = RouterSpec(
            num_experts=24,
            top_k=5,
            score="sigmoid",
            score_dtype=score,
            bias_dtype=key,
            weight_dtype=weight,
            num_groups=4,
            top_groups=3,
            renormalize=True,
            scale=1.7,
            weights_from=("scores", "masked")[int(rng.integers(2))],
        )
        logits = floats(3, 24, dtype=logits_dtype)
        vectors = {
            "selection_bias": floats(24, dtype=vector_dtype, scale=0.05),
            "expert_scale": None if rng.integers(2) else 1 + mx.abs(floats(24, dtype=vector_dtype)),
        }
        got, want = route(logits, spec, **vectors), reference(logits, spec, **vectors)
        assert got.weights.dtype == want.weights.dtype, spec
        margin = oracle.route(logits, spec, *vectors.values()).margin
        assert_same_routing(got, want, spec, logits_dtype, margin=margin)


@given(spec=router_specs(), seed=st.integers(0, 2**32 - 1), few=st.booleans(), biased=st.booleans())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_spec_routes_like_the_oracle(
    route: Route, spec: RouterSpec, seed: int, few: bool, biased: bool
) -> None:
    rng = np.random.default_rng(seed)
    shape = (6, spec.num_experts)
    logits = few_values(rng, *shape) if few else mx.array(rng.standard_normal(shape).astype(np.float32))
    bias = mx.array(rng.standard_normal(spec.num_experts).astype(np.float32) / 4) if biased else None
    got = route(logits, spec, selection_bias=bias)
    assert got.weights.dtype == reference(logits, spec, selection_bias=bias).weights.dtype
    check_distinct(got, spec.num_experts)
    # What follows is exact only in float32; a weight taken from a filled key has no fixed meaning.
    half = {spec.score_dtype, spec.bias_dtype, spec.weight_dtype} & {"float16", "bfloat16"}
    if not half and spec.weights_from == "scores":
        want = oracle.route(logits, spec, bias)
        assert_same_routing(got, want[:2], spec, mx.float32, margin=want.margin)


@pytest.mark.parametrize("eps_form", ["add", "max"])
@pytest.mark.parametrize("eps", [0.5, 4.0], ids=["below the sum", "above the sum"])
def test_renormalization_is_guarded(eps_form: str, eps: float, route: Route, floats: Floats) -> None:
    spec = RouterSpec(
        num_experts=16, top_k=4, score="sigmoid", renormalize=True, renormalize_eps=eps, eps_form=eps_form
    )
    logits = floats(9, 16)
    want = oracle.route(logits, spec)
    assert_same_routing(route(logits, spec), want[:2], spec, mx.float32, margin=want.margin)


# -- order -------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("ties", ["lowest", "highest"])
@pytest.mark.parametrize("top_k", [1, 8, 40, 64])
def test_order_is_that_of_a_stable_sort(
    ties: str, top_k: int, dtype: mx.Dtype, route: Route, rng: np.random.Generator
) -> None:
    """What Metal's argpartition gives, which sorts: ascending, NaN last, of the key or of its negative."""
    spec = RouterSpec(num_experts=64, top_k=top_k, score_over="selected", ties=ties)
    logits = np.array(few_values(rng, 30, 64))
    logits[10:20, ::5] = np.nan
    logits[12:14, ::5] = -np.nan
    logits[15:, 3::7] = np.inf
    logits[20:, 4::7] = -np.inf
    logits[25:, ::2] *= np.where(logits[25:, ::2] == 0, -1, 1)  # 0 and -0 are equal
    got = np.array(route(mx.array(logits).astype(dtype), spec).indices)
    if ties == "lowest":
        want = np.argsort(-logits, axis=-1, kind="stable")[:, :top_k]
    else:
        want = np.argsort(logits, axis=-1, kind="stable")[:, -top_k:]
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("ties", ["lowest", "highest"])
def test_equal_groups_are_settled_by_index(ties: str, route: Route) -> None:
    """Of equal groups those of the lowest index are dropped, whatever the idiom for experts."""
    spec = RouterSpec(
        num_experts=32, top_k=4, score="sigmoid", num_groups=8, top_groups=2, ties=ties, dropped_fill="-inf"
    )
    got = np.sort(np.array(route(mx.zeros((1, 32)), spec).indices))
    np.testing.assert_array_equal(got, [[24, 25, 26, 27]] if ties == "lowest" else [[28, 29, 30, 31]])


# -- half precision ----------------------------------------------------------------------------------------

# Scores, keys and weights in the model's dtype. Not gemma4_text: its softmax rounds the sum over the chosen
# at every step, in their order, and argpartition on a CPU leaves another one.
HALF = ("mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v2", "longcat_flash", "kimi_linear", "lfm2_moe")
# exp differs in the last bit of float32: one in some thousand float16 values is rounded the other way.
NEARLY_ALL = 0.98


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("family", HALF)
def test_half_precision_rounds_where_the_reference_does(
    family: str, dtype: mx.Dtype, route: Route, floats: Floats
) -> None:
    """Every step is rounded where MLX rounds it, so weights are equal to the bit."""
    spec = spec_of(BY_NAME[family], dtype, SHAPES[0])
    logits = floats(500, 64, dtype=dtype)
    bias = floats(64, scale=0.1) if BY_NAME[family].bias else None  # float32
    got, want = (f(logits, spec, selection_bias=bias) for f in (route, reference))
    by_expert = [np.zeros((500, 64)), np.zeros((500, 64))]
    for dense, routing in zip(by_expert, (got, want), strict=True):
        np.put_along_axis(
            dense, np.array(routing.indices).astype(np.int64), float64(routing.weights), axis=-1
        )
    equal = (by_expert[0] == by_expert[1]).all(axis=-1)
    assert equal.mean() >= NEARLY_ALL


def test_group_scores_are_rounded_too(route: Route) -> None:
    """In bfloat16 1.0078125 + 1 is 2: the groups are equal, and the first one is dropped."""
    spec = RouterSpec(
        num_experts=4, top_k=2, score="sigmoid", bias_dtype="scores", num_groups=2, dropped_fill="-inf"
    )
    bias = mx.array([0.5078125, 0.5, 0.5, 0.5])
    for dtype, want in ((mx.bfloat16, [2, 3]), (mx.float32, [0, 1])):
        got = route(mx.zeros((1, 4), dtype), spec, selection_bias=bias)
        np.testing.assert_array_equal(np.sort(np.array(got.indices)), [want])


# -- sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 64, 4096])
@pytest.mark.parametrize("ties", ["lowest", "highest"])
def test_thousands_of_experts(ties: str, top_k: int, route: Route, floats: Floats) -> None:
    spec = RouterSpec(
        num_experts=4096,
        top_k=top_k,
        score="sigmoid",
        num_groups=64,
        top_groups=16,
        ties=ties,
        renormalize=True,
    )
    logits, bias = floats(3, 4096), floats(4096, scale=0.1)
    want = oracle.route(logits, spec, bias)
    got = route(logits, spec, selection_bias=bias)
    check_distinct(got, 4096)
    assert_same_routing(got, want[:2], spec, mx.float32, margin=want.margin)


@dtypes
@pytest.mark.parametrize("family", ["glm4_moe", "granitemoe", "qwen2_moe", "longcat_flash"])
def test_a_token_is_routed_alike_alone_and_among_many(
    family: str, dtype: mx.Dtype, route: Route, floats: Floats
) -> None:
    """Many tokens are shared out among threads."""
    spec = spec_of(BY_NAME[family], dtype, SHAPES[0])
    logits = floats(1500, 64, dtype=dtype)
    together = route(logits, spec)
    for first, count in ((0, 1), (63, 2), (64, 65), (1499, 1)):
        part = route(logits[first : first + count], spec)
        for mine, theirs in zip(part, together, strict=True):
            np.testing.assert_array_equal(float64(mine), float64(theirs)[first : first + count])


def test_several_threads_route_at_once(route: Route, floats: Floats) -> None:
    spec = spec_of(BY_NAME["glm4_moe"], mx.float32, SHAPES[0])
    batches = [floats(300, 64) for _ in range(4)]
    mx.eval(batches)
    want = [np.array(route(batch, spec).indices) for batch in batches]
    wrong: list[object] = []

    def work(i: int) -> None:
        try:
            with mx.stream(mx.new_stream(mx.cpu)):
                for _ in range(20):
                    if not np.array_equal(np.array(route(batches[i], spec).indices), want[i]):
                        wrong.append(i)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# -- edges -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (64,), (3, 64), (2, 1, 3, 64)])
def test_leading_dimensions_are_tokens(shape: tuple[int, ...], route: Route, floats: Floats) -> None:
    spec = spec_of(BY_NAME["glm4_moe"], mx.float32, SHAPES[0])
    logits = floats(*shape)
    shaped, flat = route(logits, spec), route(logits.reshape(-1, 64), spec)
    for mine, theirs in zip(shaped, flat, strict=True):
        assert mine.shape == (*shape[:-1], 8)
        np.testing.assert_array_equal(np.array(mine).reshape(-1, 8), np.array(theirs))


@dtypes
def test_strided_logits(dtype: mx.Dtype, route: Route, floats: Floats) -> None:
    spec = spec_of(BY_NAME["glm4_moe"], dtype, SHAPES[0])
    wide = floats(2 * 64, 10, dtype=dtype)
    for view in (wide.T[:, :64], wide[:64].T[::3], wide.reshape(10, 128)[::2, 64:], wide.T[:1, ::2]):
        copy = mx.array(np.ascontiguousarray(float64(view)).astype(np.float32)).astype(dtype)
        for mine, theirs in zip(route(view, spec), route(copy, spec), strict=True):
            np.testing.assert_array_equal(float64(mine), float64(theirs))


@dtypes
@families
def test_any_logits_choose_real_experts(
    family: Family, dtype: mx.Dtype, route: Route, floats: Floats
) -> None:
    """NaN, infinities, numbers beyond any exp: indices stay in range and distinct, and the other tokens are
    not touched."""
    spec = spec_of(family, dtype, SHAPES[0])
    logits_dtype = mx.float32 if family.float32_logits else dtype
    clean = np.array(floats(12, 64))
    dirty = clean.copy()
    dirty[1] = np.nan
    dirty[2, 5] = np.nan
    dirty[3] = np.inf
    dirty[4] = -np.inf
    dirty[5, ::2], dirty[5, 1::2] = np.inf, -np.inf
    dirty[6, 63] = -np.inf
    dirty[7] *= 1e4
    dirty[8, ::3] = np.nan
    dirty[9] = -1e4
    bias = mx.zeros(64) if family.bias else None
    got, want = (route(mx.array(x).astype(logits_dtype), spec, selection_bias=bias) for x in (dirty, clean))
    check_distinct(got, 64)
    for mine, theirs in zip(got, want, strict=True):
        for token in (0, 10, 11):
            np.testing.assert_array_equal(float64(mine)[token], float64(theirs)[token])


@dtypes
@pytest.mark.parametrize("family", ["glm4_moe", "bailing_moe", "kimi_linear", "lfm2_moe", "deepseek_v41"])
def test_one_nan_is_placed_as_in_the_reference(
    family: str, dtype: mx.Dtype, route: Route, rng: np.random.Generator, floats: Floats
) -> None:
    """It is the largest of all keys: its group stays; it is chosen last where the best come first, and before
    all others where they come last."""
    spec = spec_of(BY_NAME[family], dtype, SHAPES[0])
    logits = np.array(floats(60, 64))
    np.put_along_axis(logits, rng.integers(64, size=(60, 1)), np.nan, axis=-1)
    logits = mx.array(logits).astype(dtype)
    bias = mx.array(rng.permutation(64).astype(np.float32) / 8)  # far apart: scores do not matter
    got, want = (
        np.sort(np.array(f(logits, spec, selection_bias=bias).indices), axis=-1) for f in (route, reference)
    )
    np.testing.assert_array_equal(got, want)


@families
def test_saturated_scores_tie_as_in_the_reference(family: Family, route: Route, floats: Floats) -> None:
    """Sigmoids of 1 and 0 and softmaxes of 0: the index decides."""
    spec = spec_of(family, mx.float32, SHAPES[0])
    spread = [floats(30, 64, scale=scale) for scale in (40.0, 100.0, 300.0)]
    edge = [mx.linspace(*ends, 64)[None] for ends in ((-88.6, -88.05), (-120.0, -30.0), (88.05, 88.6))]
    logits = mx.concatenate(spread + edge)
    got, want = (f(logits, spec, selection_bias=mx.zeros(64)) for f in (route, reference))
    margin = oracle.route(logits, spec).margin
    # 0 / 0, where there is no eps.
    nan = [np.isnan(float64(routing.weights)).any(axis=-1) for routing in (got, want)]
    np.testing.assert_array_equal(*nan)
    got, want = ((routing.indices, mx.nan_to_num(routing.weights)) for routing in (got, want))
    assert_same_routing(got, want, spec, mx.float32, margin=margin)
