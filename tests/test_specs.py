"""Specs are validated, hashable values that print as the Python that makes them."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import activations, quant_specs, router_specs

import moefast
from moefast import Activation, QuantSpec, RouterSpec

any_spec = st.one_of(router_specs(), quant_specs(), activations())

# constructor -> (arguments, what the message says after the constructor's name: the rule, and the value)
REFUSED: dict[type, list[tuple[dict[str, object], str]]] = {
    QuantSpec: [
        ({"mode": "int4"}, "mode must be one of ('affine', 'mxfp4', 'mxfp8', 'nvfp4'), got 'int4'."),
        ({"bits": 7}, "bits must be one of (2, 3, 4, 5, 6, 8), got 7."),
        ({"bits": 4.0}, "bits must be a whole number of at least 1, got 4.0."),  # though 4.0 == 4
        ({"group_size": 16}, "group_size must be one of (32, 64, 128), got 16."),
        # The float modes fix both numbers: the defaults are affine's.
        ({"mode": "mxfp4"}, "mode 'mxfp4' needs bits=4 and group_size=32, got bits=4 and group_size=64."),
        ({"mode": "nvfp4", "bits": 8, "group_size": 16}, "mode 'nvfp4' needs bits=4 and group_size=16"),
    ],
    Activation: [
        ({"name": "silu"}, "name must be one of ('swiglu', "),
        ({"limit": 0.0}, "limit must be finite and above 0, got 0.0."),
        ({"alpha": -1.0}, "alpha must be finite and above 0, got -1.0."),
        ({"beta": math.nan}, "beta must be finite and above 0, got nan."),
        ({"linear_beta": math.inf}, "linear_beta must be finite and above 0, got inf."),
    ],
    RouterSpec: [
        ({"num_experts": 0}, "num_experts must be a whole number of at least 1, got 0."),
        ({"num_experts": 64.0}, "num_experts must be a whole number of at least 1, got 64.0."),
        ({"num_experts": True}, "num_experts must be a whole number of at least 1, got True."),
        ({"top_k": 65}, "top_k must be in 1..64, got 65."),
        ({"top_k": 0}, "top_k must be a whole number of at least 1, got 0."),
        ({"score": "relu"}, "score must be one of ('softmax', 'sigmoid', 'sqrtsoftplus'), got 'relu'."),
        ({"score_over": "some"}, "score_over must be one of ('all', 'selected'), got 'some'."),
        ({"score_dtype": "float64"}, "score_dtype must be one of (None, 'float32', "),
        ({"bias_dtype": "logits"}, "bias_dtype must be one of (None, 'scores', 'float32', "),
        ({"weight_dtype": "scores"}, "weight_dtype must be one of (None, 'logits', 'float32', "),
        ({"group_score": "sum"}, "group_score must be one of ('top2_sum', 'max'), got 'sum'."),
        ({"dropped_fill": -math.inf}, "dropped_fill must be one of ('zero', '-inf'), got -inf."),
        ({"ties": "first"}, "ties must be one of ('lowest', 'highest'), got 'first'."),
        ({"weights_from": "keys"}, "weights_from must be one of ('scores', 'masked'), got 'keys'."),
        # Weights of minus infinity are of no use.
        (
            {"weights_from": "masked", "dropped_fill": "-inf"},
            "weights_from='masked' needs dropped_fill='zero', got '-inf'.",
        ),
        ({"eps_form": "mul"}, "eps_form must be one of ('add', 'max'), got 'mul'."),
        ({"scale_place": "input"}, "scale_place must be one of ('weights', 'output'), got 'input'."),
        ({"temperature": 0.0}, "temperature must be finite and above 0, got 0.0."),
        ({"scale": math.nan}, "scale must be finite, got nan."),
        # What a configuration file may hold instead of a number or a flag.
        ({"scale": "2.5"}, "scale must be finite, got '2.5'."),
        ({"renormalize": None}, "renormalize must be True or False, got None."),
        ({"precise": 1}, "precise must be True or False, got 1."),
        ({"softcap": -30.0}, "softcap must not be negative, got -30.0."),
        ({"renormalize_eps": math.inf}, "renormalize_eps must be finite, got inf."),
        ({"num_groups": 0}, "num_groups must be a whole number of at least 1, got 0."),
        ({"num_groups": 7}, "num_groups must divide num_experts=64, got 7."),
        ({"num_groups": 4, "top_groups": 5}, "top_groups must be in 1..num_groups=4, got 5."),
        ({"num_groups": 64}, "group_score='top2_sum' needs two experts per group, got "),
        ({"num_groups": 4, "score_over": "selected"}, "groups need score_over='all', got 'selected'."),
        ({"identity_experts": -1}, "identity_experts must be a whole number of at least 0, got -1."),
        ({"identity_experts": 64}, "identity_experts must be below num_experts=64, got 64."),
    ],
}


@pytest.mark.parametrize(
    ("kind", "arguments", "message"), [(kind, *row) for kind, rows in REFUSED.items() for row in rows]
)
def test_refusal_names_spec_rule_and_value(kind: type, arguments: dict[str, object], message: str) -> None:
    complete = {"num_experts": 64, "top_k": 8} | arguments if kind is RouterSpec else arguments
    with pytest.raises(ValueError, match=re.escape(f"[{kind.__name__}] {message}")):
        kind(**complete)


def test_every_field_of_the_router_is_tried() -> None:
    """A field added to RouterSpec needs a row above."""
    tried = {name for arguments, _ in REFUSED[RouterSpec] for name in arguments}
    assert tried == {field.name for field in dataclasses.fields(RouterSpec)}


@given(any_spec)
def test_repr_makes_the_spec_again(spec: object) -> None:
    assert eval(repr(spec), vars(moefast).copy()) == spec


@given(any_spec, any_spec)
def test_equal_specs_are_one_key(a: object, b: object) -> None:
    assert len({a, b, dataclasses.replace(a)}) == (1 if a == b else 2)


@given(any_spec)
def test_frozen(spec: object) -> None:
    name = dataclasses.fields(spec)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(spec, name, getattr(spec, name))


@pytest.mark.parametrize("kind", [QuantSpec, Activation, RouterSpec])
def test_keyword_only(kind: type) -> None:
    with pytest.raises(TypeError, match="positional"):
        kind(4, 64)


def test_repr_shows_only_what_differs_from_the_defaults() -> None:
    assert repr(QuantSpec()) == "QuantSpec()"
    assert repr(RouterSpec(num_experts=64, top_k=8, ties="highest")) == (
        "RouterSpec(num_experts=64, top_k=8, ties='highest')"
    )


def test_drops_groups_only_where_one_is_left_out() -> None:
    assert not RouterSpec(num_experts=64, top_k=8, num_groups=8, top_groups=8).drops_groups
    assert RouterSpec(num_experts=64, top_k=8, num_groups=8, top_groups=7).drops_groups
    # Without a group to drop, its size does not matter.
    assert RouterSpec(num_experts=8, top_k=2, num_groups=8, top_groups=8).num_groups == 8


@pytest.mark.parametrize(
    ("activation", "gated", "parameters"),
    [
        (Activation(), True, {}),
        (Activation(name="swiglu_oai", limit=5.0), True, {"alpha": 1.702, "limit": 5.0}),
        (Activation(name="situ"), True, {"beta": 1.0, "linear_beta": None}),
        (Activation(name="relu2"), False, {}),
    ],
)
def test_activation_knows_its_parameters(
    activation: Activation, gated: bool, parameters: dict[str, float | None]
) -> None:
    assert activation.gated is gated
    assert activation.parameters() == parameters


@pytest.mark.parametrize(
    "spec", [QuantSpec(bits=3, group_size=128), QuantSpec(mode="nvfp4", bits=4, group_size=16)]
)
def test_quant_spec_speaks_mlx(spec: QuantSpec) -> None:
    assert spec.mlx_arguments() == {"bits": spec.bits, "group_size": spec.group_size, "mode": spec.mode}
