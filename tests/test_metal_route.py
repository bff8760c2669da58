"""``route`` on the metal backend, emulated: MLX's own kernels to the bit, in order; the float64 oracle."""

from __future__ import annotations

import mlx.core as mx
import mlx_routing
import numpy as np
import oracle
import pytest
from factories import Floats
from families import BY_NAME, FAMILIES, Family
from metal import emulated

from moefast import RouterSpec
from moefast.backends.metal import launch
from moefast.backends.metal import route as metal_route
from moefast.backends.reference.route import route as reference
from moefast.routing import Routing
from moefast.testing import assert_same_routing, float64

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
    spec = spec_of(family, dtype, 64, 8, groups=8, kept=4)
    vectors = vectors_of(family, dtype, 64, floats)
    logits = hard_logits(rng, 64, mx.float32 if family.float32_logits else dtype)
    got, _ = run(logits, spec, *vectors)
    assert_equals_mlx(got, mlx_routing.route(logits, spec, *vectors), spec)
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


# Experts, k, groups, groups kept.
SIZES = (
    (1, 1, 1, 1),
    (7, 7, 1, 1),  # constant vectors
    (8, 3, 4, 2),
    (32, 32, 8, 3),  # all experts, from kept and dropped groups
    (37, 5, 1, 1),  # no power of two
    (60, 4, 3, 2),
    (160, 6, 8, 3),
    (160, 6, 5, 2),  # groups that straddle
    (256, 8, 8, 4),
    (384, 8, 2, 1),
    (512, 10, 64, 9),  # more groups than lanes
    (1024, 32, 32, 16),
)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2", "gpt_oss"])
def test_sizes(
    family: str, size: tuple[int, int, int, int], floats: Floats, rng: np.random.Generator
) -> None:
    """Sigmoid and bias; softmax over all and the largest of a group; softmax of the selected."""
    spec = spec_of(BY_NAME[family], mx.bfloat16, *size)
    vectors = vectors_of(BY_NAME[family], mx.bfloat16, size[0], floats)
    logits = hard_logits(rng, size[0], mx.bfloat16)
    got, _ = run(logits, spec, *vectors, check=size[0] < 100)
    assert_equals_mlx(got, mlx_routing.route(logits, spec, *vectors), spec)
    assert_distinct(got, size[0])
