"""The reference router is mlx-lm's, bit for bit: indices, order, ties, weights and their dtype."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx
import numpy as np
import pytest
from families import FAMILIES, Family
from mlx_lm_routers import ROUTERS, Call

from moefast import route

pytest.importorskip("mlx_lm", reason="compares with mlx-lm")


@dataclass(frozen=True)
class Case:
    """One configuration, run on ``tokens`` tokens in three dtypes; ``why`` it is here.

    Half of mlx-lm's functions are compiled. MLX's CPU takes up to a second for each new kernel, so only
    ``compiled`` cases run them so, the others as the Python they are.
    """

    name: str
    why: str
    num_experts: int
    top_k: int
    num_groups: int = 1
    top_groups: int = 1
    logits: Literal["normal", "few", "equal", "wide", "nan"] = "normal"
    bias: Literal["small", "negative", "few"] = "small"
    renormalize: bool = True
    scale: float = 2.5
    tokens: int = 33
    compiled: bool = False


CASES = (
    Case("plain", "no power of two, neither in experts nor in tokens", 60, 4, compiled=True),
    Case("large", "as many experts as DeepSeek-V3", 256, 8, tokens=7),
    Case("ties", "five values for 64 logits: every token ties at the cut", 64, 8, logits="few", bias="few"),
    Case("equal", "all logits alike: only indices decide", 16, 3, logits="equal", bias="few", tokens=3),
    Case("saturated", "sigmoids of 1.0 and softmaxes of 0.0 tie", 32, 6, logits="wide"),
    Case("negative", "keys below 0", 40, 8, bias="negative"),
    Case("raw", "renormalisation off by flag, no scale", 60, 4, renormalize=False, scale=1.0),
    Case("all-experts", "top_k = num_experts", 16, 16),
    Case("one-expert", "nothing to choose", 1, 1),
    Case("one-route", "some families never renormalise a single weight: it would be 1", 32, 1),
    Case("one-token", "decode", 64, 8, tokens=1),
    Case("no-token", "an empty batch", 64, 8, tokens=0),
    Case("nan", "a NaN in every token, beside zeros and a one", 64, 8, logits="nan"),
    Case("groups", "half of the groups stay", 64, 8, 8, 4, compiled=True),
    Case("group-ties", "group scores tie too", 64, 8, 8, 4, logits="few", bias="few"),
    Case("group-fill", "kept keys are negative: a dropped one's 0 wins", 64, 8, 8, 4, bias="negative"),
    Case("one-group", "the experts of one group of two, all of them", 16, 8, 2, 1),
    Case("pairs", "two experts per group: both make its score", 16, 4, 8, 4, logits="few"),
    Case("all-groups", "groups are configured but none is dropped", 64, 8, 8, 8),
    Case("one-kept-too-few", "top_k experts do not fit the kept groups", 32, 12, 8, 2, bias="few"),
)

# Where mlx-lm's own code refuses a case: its message, and why. moefast routes it.
RAISES = {
    # It adds up the two best keys of each group even where no group is dropped.
    ("bailing_moe_v3", "one-expert"): "invalid k=2",
    # It stacks a list with one entry per token.
    ("dbrx", "no-token"): "No arrays provided",
}

DTYPES = (mx.float32, mx.float16, mx.bfloat16)

ROWS = [
    pytest.param(family, case, id=f"{family.name}-{case.name}")
    for family in FAMILIES
    for case in CASES
    if family.groups or case.num_groups == 1
]


def make_call(family: Family, case: Case, dtype: mx.Dtype, rng: np.random.Generator) -> Call:
    shape = (case.tokens, case.num_experts)
    logits = {
        "normal": lambda: rng.standard_normal(shape) * 2,
        "few": lambda: rng.integers(-2, 3, shape) / 2,
        "equal": lambda: np.zeros(shape),
        "wide": lambda: rng.standard_normal(shape) * 40,
        "nan": lambda: np.where(np.arange(case.num_experts) == case.tokens // 2, np.nan, np.eye(*shape)),
    }[case.logits]()
    bias = {
        "small": lambda: rng.standard_normal(case.num_experts) / 8,
        "negative": lambda: -3.0 * rng.integers(0, 2, case.num_experts) - 1,
        "few": lambda: rng.integers(-1, 2, case.num_experts) / 4,
    }[case.bias]()
    name = str(dtype).removeprefix("mlx.core.")
    spec = family.router(
        num_experts=case.num_experts,
        top_k=case.top_k,
        num_groups=case.num_groups,
        top_groups=case.top_groups,
        renormalize=case.renormalize,
        scale=case.scale,
        dtype=name,
    )
    return Call(
        logits=array(logits).astype(mx.float32 if family.float32_logits else dtype),
        spec=spec,
        renormalize=case.renormalize,
        dtype=dtype,
        bias=array(bias) if family.bias else None,
        expert_scale=array(rng.uniform(0.5, 2, case.num_experts)).astype(dtype)
        if family.expert_scale
        else None,
    )


def array(values: np.ndarray) -> mx.array:
    return mx.array(values.astype(np.float32))


def bits(values: mx.array) -> np.ndarray:
    """Exact and comparable, NaN and the sign of zero included: every float dtype embeds in float32."""
    return np.array(values.astype(mx.float32)).view(np.uint32)


@pytest.fixture
def compiling(case: Case) -> Iterator[None]:
    if not case.compiled:
        mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize(("family", "case"), ROWS)
def test_router_is_mlx_lms_bit_for_bit(family: Family, case: Case, rng: np.random.Generator) -> None:
    for dtype in DTYPES:
        call = make_call(family, case, dtype, rng)
        routing = route(
            call.logits,
            call.spec,
            selection_bias=call.bias,
            expert_scale=call.expert_scale,
            backend="reference",
        )
        refusal = RAISES.get((family.name, case.name))
        if refusal is not None:
            with pytest.raises(ValueError, match=refusal):
                ROUTERS[family.name](call)
            assert routing.weights.shape == (case.tokens, case.top_k)
            mx.eval(routing)
            continue
        indices, weights = ROUTERS[family.name](call)
        mine = routing.weights
        if family.combine is not None:  # mlx-lm casts on the way into the combine, moefast in it
            mine = mine.astype(getattr(mx, family.combine))
        assert (routing.indices.dtype, mine.dtype) == (indices.dtype, weights.dtype), call.spec
        np.testing.assert_array_equal(np.array(routing.indices), np.array(indices), str((dtype, call.spec)))
        np.testing.assert_array_equal(bits(mine), bits(weights), str((dtype, call.spec)))


def test_every_router_of_the_harness_is_in_the_table() -> None:
    assert set(ROUTERS) == {family.name for family in FAMILIES}
    assert {family.letter for family in FAMILIES} == set("ABCDEFG")


def test_exceptions_name_existing_rows() -> None:
    rows = {(row.values[0].name, row.values[1].name) for row in ROWS}
    assert set(RAISES) <= rows
