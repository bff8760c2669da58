"""``route`` on the metal backend, emulated: MLX's own kernels to the bit, in order; the float64 oracle."""

from __future__ import annotations

import itertools
from importlib import import_module
from typing import Any

import mlx.core as mx
import mlx_routing
import numpy as np
import oracle
import pytest
from factories import Floats
from families import BY_NAME, FAMILIES, Family
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from metal import emulated, needs_emulator
from strategies import router_specs

from moefast import RouterSpec, emulator
from moefast.backends.metal import launch
from moefast.backends.metal import route as metal_route
from moefast.backends.reference.route import route as reference
from moefast.registry import Problem
from moefast.routing import Routing
from moefast.testing import assert_same_routing, float64

pytestmark = needs_emulator

DTYPES = (mx.float32, mx.float16, mx.bfloat16)
slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def arrays_on_the_cpu(cpu: None) -> None:
    """The emulator's are there."""


def run(
    logits: mx.array,
    spec: RouterSpec,
    bias: mx.array | None = None,
    scale: mx.array | None = None,
    *,
    check: bool = True,
    seed: int = 0,
) -> tuple[Routing, launch.Launch]:
    """The routing, and the one launch that made it."""
    with emulated(check=check, seed=seed) as launches:
        routing = metal_route.route(logits, spec, bias, scale)
    (made,) = launches
    return routing, made


def assert_equals_mlx(got: Routing, want: mlx_routing.Routed, spec: RouterSpec) -> None:
    """Indices, their order and every bit of the weights (any NaN is as good as another)."""
    np.testing.assert_array_equal(np.array(got.indices), want[0], err_msg=repr(spec))
    assert got.weights.dtype == want[1].dtype, spec
    np.testing.assert_array_equal(float64(got.weights), float64(want[1]), err_msg=repr(spec))


def assert_distinct(routing: Routing, num_experts: int) -> None:
    indices = np.sort(np.array(routing.indices).astype(np.int64), axis=-1)
    assert ((indices >= 0) & (indices < num_experts)).all()
    assert (np.diff(indices, axis=-1) > 0).all(), "an expert was chosen twice"


def spec_of(
    family: Family, dtype: mx.Dtype, experts: int, top_k: int, groups: int = 1, kept: int = 1
) -> RouterSpec:
    return family.router(
        num_experts=experts,
        top_k=top_k,
        num_groups=groups if family.groups else 1,
        top_groups=kept if family.groups else 1,
        scale=2.5,
        dtype=str(dtype).removeprefix("mlx.core."),
    )


def vectors_of(family: Family, dtype: mx.Dtype, experts: int, floats: Floats) -> list[mx.array | None]:
    """A selection bias and factors of experts, where the family has them."""
    bias = floats(experts, scale=0.1) if family.bias else None
    return [bias, 1 + mx.abs(floats(experts, dtype=dtype)) if family.expert_scale else None]


def hard_logits(rng: np.random.Generator, experts: int, dtype: mx.Dtype) -> mx.array:
    """Normal ones, few values, equal rows, 0 and -0, NaN, infinities, numbers beyond any exp."""
    x = rng.standard_normal((33, experts)).astype(np.float32)
    x[8:14] = np.round(x[8:14])
    x[14] = 0.5
    x[15] = np.where(rng.random(experts) < 0.5, 0.0, -0.0)
    x[16, ::5] = np.nan
    x[17, -1] = np.nan
    x[18] = np.nan
    x[19, 1::3] = -np.nan
    x[19, ::3] = np.nan
    x[20] = np.inf
    x[21] = -np.inf
    x[22, ::2], x[22, 1::2] = np.inf, -np.inf
    x[23, -1] = -np.inf
    x[24] *= 1e4
    x[25] = -1e4
    x[26:28] *= 40
    return mx.array(x).astype(dtype)


# -- MLX's kernels -----------------------------------------------------------------------------------------

# One family of each formula on one dtype every day; each on all dtypes with -m slow.
DAILY = {
    "mixtral": mx.bfloat16,
    "gpt_oss": mx.float16,
    "granitemoe": mx.bfloat16,
    "gemma4_text": mx.bfloat16,
    "qwen3_moe": mx.bfloat16,
    "qwen2_moe": mx.float32,
    "deepseek_v2": mx.float16,
    "mistral4": mx.bfloat16,
    "longcat_flash": mx.bfloat16,
    "ernie4_5_moe": mx.float16,
    "dbrx": mx.bfloat16,
    "glm4_moe": mx.bfloat16,
    "bailing_moe": mx.float16,
    "kimi_linear": mx.bfloat16,
    "bailing_hybrid": mx.float32,
    "minimax": mx.bfloat16,
    "lfm2_moe": mx.bfloat16,
    "laguna": mx.bfloat16,
    "deepseek_v41": mx.float32,
}

families = pytest.mark.parametrize(
    ("family", "dtype"),
    [
        pytest.param(
            family,
            dtype,
            marks=() if dtype == DAILY.get(family.name, mx.int8) else slow,
            id=f"{family.name}-{str(dtype).removeprefix('mlx.core.')}",
        )
        for family in FAMILIES
        for dtype in DTYPES
    ],
)


@families
def test_equals_mlx_to_the_bit(
    family: Family, dtype: mx.Dtype, floats: Floats, rng: np.random.Generator
) -> None:
    """A bias may sink kept keys below the fill of dropped groups, or all keys below 0."""
    spec = spec_of(family, dtype, 64, 8, groups=8, kept=4)
    bias, scale = vectors_of(family, dtype, 64, floats)
    logits = hard_logits(rng, 64, mx.float32 if family.float32_logits else dtype)
    for seed, low in enumerate((0.0, 0.5, 3.0) if bias is not None else (0.0,)):
        lowered = None if bias is None else bias - low
        got, _ = run(logits, spec, lowered, scale, seed=seed)
        assert_equals_mlx(got, mlx_routing.route(logits, spec, lowered, scale), spec)
        assert_distinct(got, 64)


@families
def test_routes_like_oracle_and_reference(
    family: Family, dtype: mx.Dtype, rng: np.random.Generator, floats: Floats
) -> None:
    spec = spec_of(family, dtype, 64, 8, groups=8, kept=4)
    vectors = vectors_of(family, dtype, 64, floats)
    logits_dtype = mx.float32 if family.float32_logits else dtype
    few = mx.array(rng.integers(-2, 3, (33, 64)).astype(np.float32)).astype(logits_dtype)
    for logits in (floats(33, 64, dtype=logits_dtype), few):
        got, _ = run(logits, spec, *vectors, seed=1)
        want = oracle.route(logits, spec, *vectors)
        assert_same_routing(got, want[:2], spec, logits_dtype, margin=want.margin)
        plain = reference(logits, spec, *vectors)
        assert got.indices.dtype == mx.uint32
        assert got.weights.dtype == plain.weights.dtype
        assert_same_routing(got, plain, spec, logits_dtype, margin=want.margin)


# Experts, k, groups, groups kept; the family that runs it every day, if one does.
SIZES = {
    (1, 1, 1, 1): "deepseek_v3",
    (7, 7, 1, 1): "gpt_oss",
    (8, 3, 4, 2): "",
    (32, 32, 8, 3): "deepseek_v3",  # all experts, from kept and dropped groups
    (37, 5, 1, 1): "deepseek_v2",  # no power of two
    (60, 4, 3, 2): "",
    (160, 6, 8, 3): "deepseek_v2",
    (160, 6, 5, 2): "deepseek_v3",
    (256, 8, 8, 4): "deepseek_v3",
    (384, 8, 2, 1): "gpt_oss",
    (512, 10, 64, 9): "deepseek_v3",  # more groups than lanes
    (512, 10, 512, 90): "deepseek_v2",  # of one expert
    (1024, 32, 32, 16): "deepseek_v2",
}


@pytest.mark.parametrize(
    ("size", "family"),
    [
        pytest.param(size, family, marks=() if SIZES[size] == family else slow, id=f"{family}-{size}")
        for size in SIZES
        for family in ("deepseek_v3", "deepseek_v2", "gpt_oss")
        if family != "deepseek_v3" or size[0] != size[2] or size[2] == 1
    ],
)
def test_sizes(
    size: tuple[int, int, int, int], family: str, floats: Floats, rng: np.random.Generator
) -> None:
    """Sigmoid and bias; softmax over all and the largest of a group; softmax of the selected."""
    spec = spec_of(BY_NAME[family], mx.bfloat16, *size)
    vectors = vectors_of(BY_NAME[family], mx.bfloat16, size[0], floats)
    logits = hard_logits(rng, size[0], mx.bfloat16)
    got, _ = run(logits, spec, *vectors)
    assert_equals_mlx(got, mlx_routing.route(logits, spec, *vectors), spec)
    assert_distinct(got, size[0])


# Of score, bias_dtype, the bias, the expert's factor and the weights.
COMBINATIONS = (
    ("float32", "bfloat16", mx.float32, mx.float16, None),
    ("float16", None, mx.bfloat16, None, "bfloat16"),
    ("bfloat16", "scores", mx.float32, mx.bfloat16, "float16"),
    (None, "float16", mx.float16, mx.float32, "logits"),
)


@pytest.mark.parametrize(
    "combination", [COMBINATIONS[0], *(pytest.param(c, marks=slow) for c in COMBINATIONS[1:])], ids=str
)
def test_every_step_rounds_to_its_dtype(
    combination: tuple[str | None, str | None, mx.Dtype, mx.Dtype | None, str | None],
    floats: Floats,
    rng: np.random.Generator,
) -> None:
    score, key, bias_dtype, scale_dtype, weight = combination
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
        softcap=3.3,
        weights_from=("scores", "masked")[scale_dtype is None],
    )
    logits, bias = hard_logits(rng, 24, mx.bfloat16), floats(24, dtype=bias_dtype)
    scale = None if scale_dtype is None else floats(24, dtype=scale_dtype)
    got, _ = run(logits, spec, bias, scale)
    assert_equals_mlx(got, mlx_routing.route(logits, spec, bias, scale), spec)


def test_dtypes_of_weights_are_the_references(floats: Floats) -> None:
    names = ("float32", "float16", "bfloat16")
    vectors = (None, *DTYPES)
    places = ("scores", "masked")
    fields = itertools.product(
        DTYPES, vectors, vectors, (None, *names), (None, "scores", *names), (None, "logits", *names), places
    )
    for logits, bias, scale, score, key, weight, place in fields:
        spec = RouterSpec(
            num_experts=4,
            top_k=2,
            score="sigmoid",
            score_dtype=score,
            bias_dtype=key,
            weight_dtype=weight,
            weights_from=place,
        )
        given = [None if dtype is None else mx.zeros(4, dtype) for dtype in (bias, scale)]
        got = metal_route.route(mx.zeros((0, 4), logits), spec, *given).weights
        assert got.dtype == reference(mx.zeros((0, 4), logits), spec, *given).weights.dtype, spec


def check_any_spec(spec: RouterSpec, seed: int, dtypes: tuple[mx.Dtype, ...]) -> None:
    rng = np.random.default_rng(seed)
    logits = hard_logits(rng, spec.num_experts, dtypes[0])
    bias, scale = (
        None if rng.random() < 0.3 else mx.array(rng.standard_normal(spec.num_experts) / 4).astype(dtype)
        for dtype in dtypes[1:]
    )
    got, _ = run(logits, spec, bias, scale, seed=seed)
    assert_equals_mlx(got, mlx_routing.route(logits, spec, bias, scale), spec)
    assert_distinct(got, spec.num_experts)


any_spec = given(
    spec=router_specs(),
    seed=st.integers(0, 2**32 - 1),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 3),
)


# A kernel is compiled for each: hours to shrink one, and the failure has the spec.
_PHASES = (Phase.explicit, Phase.reuse, Phase.generate)


@any_spec
@settings(max_examples=3, deadline=None, phases=_PHASES, suppress_health_check=list(HealthCheck))
def test_any_spec_equals_mlx(spec: RouterSpec, seed: int, dtypes: tuple[mx.Dtype, ...]) -> None:
    check_any_spec(spec, seed, dtypes)


@slow
@pytest.mark.timeout(3600)
@any_spec
@settings(max_examples=300, deadline=None, phases=_PHASES, suppress_health_check=list(HealthCheck))
def test_many_specs_equal_mlx(spec: RouterSpec, seed: int, dtypes: tuple[mx.Dtype, ...]) -> None:
    check_any_spec(spec, seed, dtypes)


# -- order -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "top_k"), [(mx.float32, 32), (mx.float16, 1), (mx.bfloat16, 8)], ids=["f32", "f16", "bf16"]
)
@pytest.mark.parametrize("ties", ["lowest", "highest"])
def test_order_is_that_of_a_stable_sort(
    ties: str, dtype: mx.Dtype, top_k: int, rng: np.random.Generator
) -> None:
    """Ascending, NaN last, of the key or of its negative: NumPy's."""
    spec = RouterSpec(num_experts=64, top_k=top_k, score_over="selected", ties=ties)
    logits = hard_logits(rng, 64, dtype)
    got, _ = run(logits, spec)
    keys = float64(logits)
    if ties == "lowest":
        want = np.argsort(-keys, axis=-1, kind="stable")[:, :top_k]
    else:
        want = np.argsort(keys, axis=-1, kind="stable")[:, -top_k:]
    np.testing.assert_array_equal(np.array(got.indices), want)


@pytest.mark.parametrize("ties", ["lowest", "highest"])
def test_equal_groups_are_settled_by_index(ties: str) -> None:
    """Of equal groups those of the lowest index are dropped, whatever the idiom for experts."""
    spec = RouterSpec(
        num_experts=32, top_k=4, score="sigmoid", num_groups=8, top_groups=2, ties=ties, dropped_fill="-inf"
    )
    got, _ = run(mx.zeros((1, 32)), spec)
    want = [[24, 25, 26, 27]] if ties == "lowest" else [[28, 29, 30, 31]]
    np.testing.assert_array_equal(np.array(got.indices), want)


@pytest.mark.parametrize("ties", ["lowest", "highest"])
def test_denormals_may_be_flushed(
    ties: str, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """As GPUs may do with those of float: all that are left of equal keys are their indices, as in MLX."""
    spec = RouterSpec(num_experts=64, top_k=8, score_over="selected", ties=ties)
    logits = rng.standard_normal((33, 64)).astype(np.float32)
    logits[:16] *= 1e-39
    logits[16:] *= 1e-38  # some are normal
    kept, _ = run(mx.array(logits), spec)
    emulated_launch = emulator.launch

    def flushing(*args: Any, **options: Any) -> emulator.Result:
        return emulated_launch(*args, **{**options, "denormals": "flush"})

    monkeypatch.setattr(emulator, "launch", flushing)
    monkeypatch.setattr(import_module("moefast.emulator.metal_kernel"), "launch", flushing)
    got, _ = run(mx.array(logits), spec)
    assert_equals_mlx(got, mlx_routing.route(mx.array(logits), spec), spec)
    assert (np.array(got.indices)[:16] != np.array(kept.indices)[:16]).any()


# -- tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [0, 1, 3, 7, 33, 127, 128, 513])
def test_tokens(tokens: int, floats: Floats) -> None:
    """The last threadgroup of several simdgroups need not be full."""
    spec = spec_of(BY_NAME["deepseek_v3"], mx.bfloat16, 64, 8, groups=8, kept=4)
    logits, bias = floats(tokens, 64, dtype=mx.bfloat16), floats(64, scale=0.1)
    if not tokens:
        with emulated() as launches:
            got = metal_route.route(logits, spec, bias, None)
        assert not launches
        assert got.indices.shape == got.weights.shape == (0, 8)
        return
    got, made = run(logits, spec, bias)
    assert_equals_mlx(got, mlx_routing.route(logits, spec, bias), spec)
    assert made.result is not None
    counters = made.result.counters
    assert counters.threadgroups == (tokens if tokens < 128 else -(-tokens // 4))
    assert counters.buffers["indices"].stored == counters.buffers["indices"].unique == 4 * 8 * tokens


@pytest.mark.parametrize("shape", [(2, 0, 64), (64,), (3, 64), (2, 1, 3, 64), (2, 65, 64)])
def test_leading_dimensions_are_tokens(shape: tuple[int, ...], floats: Floats) -> None:
    spec = spec_of(BY_NAME["deepseek_v3"], mx.float32, 64, 8, groups=8, kept=4)
    logits = floats(*shape)
    with emulated():
        shaped, flat = (metal_route.route(x, spec, None, None) for x in (logits, logits.reshape(-1, 64)))
    for mine, theirs in zip(shaped, flat, strict=True):
        assert mine.shape == (*shape[:-1], 8)
        np.testing.assert_array_equal(np.array(mine).reshape(-1, 8), np.array(theirs))


@pytest.mark.parametrize("experts", [1, 7, 8])
def test_few_elements(experts: int, floats: Floats, rng: np.random.Generator) -> None:
    """Of one token: inputs of fewer than 8 are in another address space."""
    spec = RouterSpec(num_experts=experts, top_k=experts, score="sigmoid", renormalize=True)
    logits, bias, scale = floats(1, experts), floats(experts), floats(experts)
    got, _ = run(logits, spec, bias, scale)
    assert_equals_mlx(got, mlx_routing.route(logits, spec, bias, scale), spec)


def test_strided_logits(floats: Floats) -> None:
    spec = spec_of(BY_NAME["granitemoe"], mx.float32, 64, 8)
    wide = floats(2 * 64, 10)
    for view in (wide.T[:, :64], wide[:64].T[::3], wide.reshape(10, 128)[::2, 64:]):
        got, _ = run(view, spec)
        want, _ = run(mx.array(np.ascontiguousarray(np.array(view))), spec)
        for mine, theirs in zip(got, want, strict=True):
            np.testing.assert_array_equal(np.array(mine), np.array(theirs))


# -- economy -----------------------------------------------------------------------------------------------

# Experts, k, groups, groups kept; simd operations of a token, and what they are.
OPERATIONS = {
    "granitemoe": (40, 8, 1, 1, 8 + 6),  # choices of 16-bit keys; softmax of the selected
    "qwen2_moe": (60, 4, 1, 1, 2 + 4),  # softmax of one block
    "qwen3_moe": (256, 8, 1, 1, 4 + 8 + 8),  # of two blocks; the sum of the weights
    "glm4_moe": (128, 8, 1, 1, 16 + 8),  # choices of 32-bit keys
    "bailing_moe": (256, 8, 8, 4, 4 + 16 + 8),  # the best two of each group, from four lanes
    "dbrx": (16, 4, 1, 1, 2 + 8 + 4),
    "gemma4_text": (128, 8, 1, 1, 8 + 6),
}


@pytest.mark.parametrize("family", OPERATIONS)
def test_economy(family: str, floats: Floats) -> None:
    """Logits are read once, a bias once for each token, factors of the chosen; no threadgroup barrier."""
    experts, top_k, groups, kept, operations = OPERATIONS[family]
    spec = spec_of(BY_NAME[family], mx.bfloat16, experts, top_k, groups, kept)
    bias, scale = vectors_of(BY_NAME[family], mx.bfloat16, experts, floats)
    tokens = 3
    got, made = run(floats(tokens, experts, dtype=mx.bfloat16), spec, bias, scale)
    assert made.result is not None
    counters = made.result.counters
    moved = {name: (buffer.loaded, buffer.stored) for name, buffer in counters.buffers.items()}
    chosen = tokens * top_k
    assert moved == {
        "logits": (2 * tokens * experts, 0),
        **({"selection_bias": (4 * tokens * experts, 0)} if bias is not None else {}),
        **({"expert_scale": (2 * chosen, 0)} if scale is not None else {}),
        "indices": (0, 4 * chosen),
        "weights": (0, got.weights.itemsize * chosen),
    }
    assert counters.simd_operations == operations * tokens
    assert counters.threads == 32 * tokens
    assert counters.barriers == 0


# -- refusals ----------------------------------------------------------------------------------------------


def problem_of(spec: RouterSpec, dtype: mx.Dtype = mx.float32, phase: str = "decode") -> Problem:
    return Problem("route", "gpu", dtype, phase, (spec, None, None))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"num_experts": 1024, "top_k": 32}, None),
        ({"num_experts": 2048, "top_k": 8}, "num_experts=2048 > 1024"),
        ({"num_experts": 64, "top_k": 33}, "top_k=33 > 32"),
        ({"num_experts": 64, "top_k": 8, "scale": 1e39}, "scale=1e+39 is too large for float32"),
        ({"num_experts": 64, "top_k": 8, "softcap": 1e39}, "softcap=1e+39 is too large for float32"),
    ],
)
def test_what_is_refused(fields: dict[str, float], reason: str | None) -> None:
    assert metal_route.why_not(problem_of(RouterSpec(**fields))) == reason  # type: ignore[arg-type]


@pytest.mark.parametrize(("phase", "tokens"), [("decode", 1), ("prefill", 130)])
def test_a_bound_problem_routes(phase: str, tokens: int, floats: Floats) -> None:
    spec = spec_of(BY_NAME["deepseek_v3"], mx.bfloat16, 64, 8, groups=8, kept=4)
    logits, bias = floats(tokens, 64, dtype=mx.bfloat16), floats(64)
    bound = metal_route.bind(Problem("route", "gpu", mx.bfloat16, phase, (spec, bias.dtype, None)))
    with emulated():
        got, want = (f(logits, spec, bias, None) for f in (bound, metal_route.route))
    for mine, theirs in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.array(mine), np.array(theirs))
