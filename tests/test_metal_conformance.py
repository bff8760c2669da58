"""Every kernel of the Metal backend, through the operations, against the float64 oracle: checked by the
emulator for memory and synchronisation errors, with threads in an order drawn from a seed.

``make test`` runs a row of each kind; the whole matrix is marked slow (``make test-all``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import Any

import mlx.core as mx
import numpy as np
import oracle
import pytest
from factories import Floats, MakeExperts, MakeShared
from families import FAMILIES, Family
from formats import ACTIVATIONS, BY_NAME, DTYPES, FORMATS, Format
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from metal import emulated, needs_emulator

from moefast import Activation, ExpertWeights, Routing, experts, moe, route, switch_glu
from moefast.backends.metal.dispatch import kernels_for
from moefast.testing import assert_close, assert_same_routing

pytestmark = needs_emulator

# A scale or weight of another dtype than x is refused.
OWN_DTYPE = [format_ for format_ in FORMATS if format_.dtype is None]


@dataclass(frozen=True)
class Case:
    """One call. ``why`` says what is special about it."""

    why: str = ""
    tokens: int = 1
    hidden: int = 128
    width: int = 128
    num_experts: int = 8
    top_k: int = 2
    format: str = "affine4-g32"
    dtype: mx.Dtype = mx.bfloat16
    activation: Activation = field(default_factory=Activation)
    bias: bool = False
    routing: str = "random"

    def __str__(self) -> str:
        sizes = f"{self.tokens}x{self.hidden}x{self.width}-{self.num_experts}of{self.top_k}"
        dtype = str(self.dtype).removeprefix("mlx.core.")
        return f"{self.why or self.format}-{sizes}-{dtype}-{self.activation.name}"

    @property
    def kernels(self) -> str:
        return kernels_for(self.tokens, self.top_k, self.num_experts)

    def indices(self, rng: np.random.Generator) -> mx.array:
        """Experts of each token: all different, but for ``hot``, where all routes go to the last one."""
        rows = {
            "random": lambda: rng.permutation(self.num_experts)[: self.top_k],
            "few": lambda: rng.permutation(min(self.top_k + 1, self.num_experts))[: self.top_k],
            "hot": lambda: np.full(self.top_k, self.num_experts - 1),
        }
        made = [rows[self.routing]() for _ in range(self.tokens)]
        return mx.array(np.array(made, np.uint32).reshape(self.tokens, self.top_k))


# On either side of what a tile, a simdgroup or a phase takes.
LENGTHS = (0, 1, 3, 7, 33, 127, 128, 513)
# Tokens that run decode, band and tiles.
EACH = (1, 5, 70)
FAST = [
    *(
        Case(format=name, tokens=t, dtype=d)
        for (name, d), t in product(
            (
                ("affine4-g64", mx.bfloat16),
                ("affine3-g32", mx.float16),
                ("affine8-g128", mx.float32),
                ("mxfp4", mx.bfloat16),
                ("nvfp4-scaled", mx.float16),
                ("plain", mx.bfloat16),
            ),
            EACH,
        )
    ),
    *(Case(activation=activation, tokens=5, bias=True) for activation in ACTIVATIONS[1:]),
    Case("no-tokens", tokens=0),
    Case("one-expert", tokens=3, num_experts=1, top_k=1),
    Case("every-expert", tokens=3, num_experts=4, top_k=4),
    Case("hot-expert-band", tokens=40, num_experts=64, routing="hot"),
    Case("hot-expert-tiles", tokens=70, routing="hot"),
    Case("empty-experts", tokens=130, num_experts=160, top_k=4, routing="few"),
    Case("odd-sizes", tokens=7, hidden=96, width=160, num_experts=5, top_k=3),
    Case("odd-rows", tokens=33, hidden=72, width=40, format="plain", dtype=mx.float32),
    Case("no-multiple-of-anything", tokens=3, hidden=37, width=51, format="plain", dtype=mx.float32),
    Case("fast-mat-vec", hidden=512, width=512, format="affine4-g64"),
]

MATRIX = [
    *(Case(format=f.name, tokens=t, dtype=d) for f, d, t in product(OWN_DTYPE, DTYPES, EACH)),
    *(
        Case(activation=a, tokens=t, dtype=d, bias=b)
        for a, d, t, b in product(ACTIVATIONS, DTYPES, EACH, (False, True))
    ),
    *(Case(tokens=t, num_experts=e, top_k=4) for t, e in product(LENGTHS, (8, 160, 256, 384))),
    *(Case(tokens=t, num_experts=12, top_k=12) for t in (1, 3, 33, 130)),
    *(Case(tokens=t, routing=r) for t, r in product((1, 7, 33, 127, 128, 513), ("hot", "few"))),
    *(
        Case(tokens=t, hidden=h, width=w, format=f)
        for t, (h, w), f in product(
            EACH, ((96, 160), (160, 96), (224, 32)), ("affine4-g32", "mxfp8", "plain")
        )
    ),
    *(
        Case(tokens=t, hidden=h, width=w, format="plain")
        for t, (h, w) in product(EACH, ((40, 72), (136, 40), (33, 65)))
    ),
]


class TestConformance:
    """Whatever the case, the operations give what the oracle does, and the emulator has nothing to say."""

    @pytest.mark.parametrize("case", FAST, ids=str)
    def test_cases(self, case: Case, floats: Floats, expert_weights: MakeExperts) -> None:
        self.check(case, floats, expert_weights, seed=1)

    @pytest.mark.slow
    @pytest.mark.parametrize("seed", [2, 3])
    @pytest.mark.parametrize("case", MATRIX, ids=str)
    def test_matrix(self, case: Case, seed: int, floats: Floats, expert_weights: MakeExperts) -> None:
        self.check(case, floats, expert_weights, seed)

    def check(self, case: Case, floats: Floats, expert_weights: MakeExperts, seed: int) -> None:
        format_: Format = BY_NAME[case.format]
        weights: ExpertWeights = expert_weights(
            case.num_experts,
            case.hidden,
            case.width,
            activation=case.activation,
            bias=case.bias,
            **format_.of(case.dtype),
        )
        x = floats(case.tokens, case.hidden, dtype=case.dtype)
        rng = np.random.default_rng(seed)
        indices = case.indices(rng)
        mix = mx.array(rng.random(indices.shape).astype(np.float32)).astype(case.dtype)
        with emulated(seed=seed) as launches:
            apart = switch_glu(x, weights, indices, backend="metal")
            y = experts(x, weights, Routing(indices, mix), backend="metal")
        assert bool(launches) == bool(case.tokens)
        assert (apart.dtype, y.dtype) == (case.dtype, case.dtype)
        close: dict[str, Any] = {"reductions": (case.hidden, case.width), "top_k": case.top_k}
        assert_close(apart, oracle.switch_glu(x, weights, indices), "switch_glu", **close)
        assert_close(y, oracle.experts(x, weights, indices, mix), "experts", **close)


@pytest.mark.parametrize("tokens", EACH)
@pytest.mark.parametrize("family", [f for f in FAMILIES if f.letter in "ACE"][::3], ids=lambda f: f.name)
def test_whole_blocks(
    family: Family, tokens: int, floats: Floats, expert_weights: MakeExperts, shared_expert: MakeShared
) -> None:
    """Router, experts and a gated shared expert, as a family has them."""
    spec = family.router(
        num_experts=16, top_k=3, num_groups=4 if family.groups else 1, top_groups=2 if family.groups else 1
    )
    format_ = BY_NAME["affine4-g32"].of(mx.float32)
    weights = expert_weights(16, 64, 96, **format_)
    shared = shared_expert(64, 96, output_gate=True, **format_)
    x, logits = floats(tokens, 64), floats(tokens, 16)
    bias = floats(16, scale=0.1) if family.bias else None
    with emulated(seed=tokens):
        y = moe(x, logits, spec, weights, selection_bias=bias, shared=shared, backend="metal")
    want = oracle.moe(x, logits, spec, weights, selection_bias=bias, shared=shared)
    assert_close(y, want, "moe", reductions=(64, 96), top_k=3)


# Sizes are drawn from few: each new combination is a kernel to compile.
@st.composite
def cases(draw: st.DrawFn) -> Case:
    format_ = draw(st.sampled_from(OWN_DTYPE))
    unit = format_.quant.group_size if format_.quant else 8
    num_experts = draw(st.sampled_from((1, 3, 8, 40)))
    return Case(
        tokens=draw(st.integers(0, 200)),
        hidden=unit * draw(st.integers(1, 3)),
        width=unit * draw(st.integers(1, 3)),
        num_experts=num_experts,
        top_k=draw(st.integers(1, min(num_experts, 9))),
        format=format_.name,
        dtype=draw(st.sampled_from(DTYPES)),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        bias=draw(st.booleans()),
        routing=draw(st.sampled_from(("random", "few", "hot"))),
    )


CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=CHECKS)
@given(case=cases(), seed=st.integers(0, 2**31))
def test_any_case(case: Case, seed: int, floats: Floats, expert_weights: MakeExperts) -> None:
    TestConformance().check(case, floats, expert_weights, seed)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=200, deadline=None, suppress_health_check=CHECKS)
@given(case=cases(), seed=st.integers(0, 2**31))
def test_any_case_at_length(case: Case, seed: int, floats: Floats, expert_weights: MakeExperts) -> None:
    TestConformance().check(case, floats, expert_weights, seed)


@pytest.mark.parametrize("tokens", [1, 40])
def test_a_router_that_sees_nan_still_chooses(tokens: int, floats: Floats) -> None:
    spec = FAMILIES[0].router(num_experts=16, top_k=4)
    logits = mx.concatenate([floats(tokens, 15), mx.full((tokens, 1), mx.nan)], axis=-1)
    with emulated():
        indices = np.array(route(logits, spec, backend="metal").indices)
    assert indices.max() < 16
    assert all(len(set(row)) == 4 for row in indices.tolist())


def test_routers_agree_with_the_reference(floats: Floats) -> None:
    logits = floats(33, 16)
    for family in FAMILIES:
        if family.groups or family.expert_scale:
            continue
        spec = family.router(num_experts=16, top_k=4)
        want = route(logits, spec, backend="reference")
        with emulated(check=False):
            got = route(logits, spec, backend="metal")
        margin = oracle.route(logits, spec).margin
        assert assert_same_routing(got, want, spec, logits.dtype, margin=margin) > 0
