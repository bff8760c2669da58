"""Hypothesis strategies: every valid spec."""

from __future__ import annotations

import operator

from hypothesis import strategies as st

from moefast import Activation, QuantSpec, RouterSpec

_AFFINE = st.builds(
    QuantSpec, bits=st.sampled_from((2, 3, 4, 5, 6, 8)), group_size=st.sampled_from((32, 64, 128))
)
_FLOAT_MODES = st.sampled_from(
    (
        QuantSpec(mode="mxfp4", bits=4, group_size=32),
        QuantSpec(mode="mxfp8", bits=8, group_size=32),
        QuantSpec(mode="nvfp4", bits=4, group_size=16),
    )
)
_positive = st.floats(min_value=0.125, max_value=8)
_dtypes = st.sampled_from(("float32", "float16", "bfloat16"))


def quant_specs() -> st.SearchStrategy[QuantSpec]:
    return st.one_of(_AFFINE, _FLOAT_MODES)


def activations() -> st.SearchStrategy[Activation]:
    gated = ("swiglu", "swiglu_oai", "swiglu_clipped", "swiglu_clamped", "geglu_tanh", "situ")
    return st.builds(
        Activation,
        name=st.sampled_from((*gated, "gelu_tanh", "relu2")),
        alpha=_positive,
        limit=_positive,
        beta=_positive,
        linear_beta=st.none() | _positive,
    )


@st.composite
def router_specs(draw: st.DrawFn) -> RouterSpec:
    """Any router, of up to 24 experts."""
    groups = draw(st.integers(1, 4))
    per_group = draw(st.integers(1, 6))
    top_groups = draw(st.integers(1, groups))
    num_experts = groups * per_group
    drops = top_groups < groups
    scores = ("top2_sum", "max") if per_group > 1 or not drops else ("max",)
    fill = draw(st.sampled_from(("zero", "-inf")))
    over = draw(st.sampled_from(("all",) if drops else ("all", "selected")))
    places = ("scores", "masked") if fill == "zero" and over == "all" else ("scores",)
    return RouterSpec(
        num_experts=num_experts,
        top_k=draw(st.integers(1, num_experts)),
        softcap=draw(st.just(0.0) | _positive),
        temperature=draw(_positive),
        score=draw(st.sampled_from(("softmax", "sigmoid", "sqrtsoftplus"))),
        score_over=over,
        score_dtype=draw(st.none() | _dtypes),
        precise=draw(st.booleans()),
        bias_dtype=draw(st.none() | st.just("scores") | _dtypes),
        num_groups=groups,
        top_groups=top_groups,
        group_score=draw(st.sampled_from(scores)),
        dropped_fill=fill,
        ties=draw(st.sampled_from(("lowest", "highest"))),
        weights_from=draw(st.sampled_from(places)),
        renormalize=draw(st.booleans()),
        renormalize_eps=draw(st.sampled_from((0.0, 1e-20, 1e-12, 1e-6))),
        eps_form=draw(st.sampled_from(("add", "max"))),
        scale=draw(_positive | _positive.map(operator.neg)),
        scale_place=draw(st.sampled_from(("weights", "output"))),
        weight_dtype=draw(st.none() | st.just("logits") | _dtypes),
        identity_experts=draw(st.integers(0, num_experts - 1)),
    )
