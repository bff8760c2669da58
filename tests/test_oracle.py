"""The oracle itself: against MLX's own unpacking, and against examples worked by hand."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import oracle
import pytest
from factories import MakeProjection
from formats import FORMATS, Format

from moefast import Activation, RouterSpec
from moefast.testing import assert_close


@pytest.mark.parametrize("format_", FORMATS, ids=lambda format_: format_.name)
def test_dequantizes_like_mlx(format_: Format, projection: MakeProjection) -> None:
    p = projection(3, 8, 128, **format_.of(mx.float32))
    if p.quant is None:
        np.testing.assert_array_equal(oracle.dequantize(p), np.array(p.weight.astype(mx.float32)))
        return
    arguments = p.quant.mlx_arguments()
    for expert in range(3):
        scale = {} if p.global_scale is None else {"global_scale": p.global_scale[expert]}
        biases = None if p.biases is None else p.biases[expert].astype(mx.float32)
        scales = p.scales[expert] if p.scales.dtype == mx.uint8 else p.scales[expert].astype(mx.float32)
        theirs = mx.dequantize(p.weight[expert], scales, biases, dtype=mx.float32, **arguments, **scale)
        assert_close(theirs, oracle.dequantize(p, expert), "dequantize")
        np.testing.assert_array_equal(oracle.dequantize(p)[expert], oracle.dequantize(p, expert))


@pytest.mark.parametrize(
    ("bits", "values", "words"),
    [(4, [1, 2, 3, 4, 5, 6, 7, 8], [0x87654321]), (8, [1, 2, 3, 255], [0xFF030201])],
)
def test_unpacks_least_significant_bits_first(bits: int, values: list[int], words: list[int]) -> None:
    np.testing.assert_array_equal(oracle.unpack(np.array(words, np.uint32), bits), values)


@pytest.mark.parametrize("bits", [3, 5, 6])
def test_odd_bits_straddle_words(bits: int) -> None:
    values = (np.arange(32) * 7 + 3) % 2**bits
    stream = sum(int(value) << (bits * place) for place, value in enumerate(values))
    words = [(stream >> (32 * word)) & 0xFFFFFFFF for word in range(bits)]
    np.testing.assert_array_equal(oracle.unpack(np.array(words, np.uint32), bits), values)


@pytest.mark.parametrize(
    ("code", "bits", "value"),
    [
        (0b0_0000_000, (4, 3), 0.0),
        (0b0_0000_001, (4, 3), 2.0**-9),  # the smallest subnormal of e4m3
        (0b0_0001_000, (4, 3), 2.0**-6),  # its smallest normal number
        (0b0_1111_110, (4, 3), 448.0),  # its largest
        (0b1_0111_100, (4, 3), -1.5),
        (0b0_00_1, (2, 1), 0.5),  # e2m1: the only subnormal
        (0b0_11_1, (2, 1), 6.0),  # its largest
        (0b1_01_1, (2, 1), -1.5),
    ],
)
def test_minifloats(code: int, bits: tuple[int, int], value: float) -> None:
    assert oracle.minifloat(np.array(code), *bits) == value


def assert_equal(got: object, want: object) -> None:
    """Equal in float32: the oracle and the examples both compute in float64."""
    assert_close(np.atleast_1d(got), np.atleast_1d(want), "quantized_matmul", dtype=mx.float32)


# -- routing by hand ---------------------------------------------------------------------------------------


def route(
    logits: list[float], bias: list[float] | None = None, **spec: object
) -> tuple[list[int], list[float]]:
    """Indices, best first, and weights of one token."""
    routed = oracle.route(
        np.array([logits]),
        RouterSpec(num_experts=len(logits), **spec),
        None if bias is None else np.array(bias),
    )
    return routed.indices[0].tolist(), routed.weights[0].tolist()


LOG = np.log([1, 2, 3, 4]).tolist()  # a softmax of 0.1, 0.2, 0.3, 0.4


def test_softmax_over_all_and_over_the_selected() -> None:
    indices, weights = route(LOG, top_k=2)
    assert indices == [3, 2]
    assert_equal(weights, [0.4, 0.3])
    for spec in ({"score_over": "selected"}, {"renormalize": True}):
        assert_equal(route(LOG, top_k=2, **spec)[1], [4 / 7, 3 / 7])


def test_bias_selects_but_does_not_weigh() -> None:
    indices, weights = route([0.0, 0.0, 0.0, 0.0], [0.1, 0.0, 0.3, 0.2], top_k=2, score="sigmoid", scale=2.0)
    assert (indices, weights) == ([2, 3], [1.0, 1.0])


@pytest.mark.parametrize(("ties", "indices"), [("lowest", [1, 0, 2]), ("highest", [1, 3, 2])])
def test_ties(ties: str, indices: list[int]) -> None:
    assert route([1.0, 2.0, 1.0, 1.0], top_k=3, ties=ties)[0] == indices


# Four pairs of experts; keys are 0.5 + bias: (-0.2, 0.9), (0.5, 0.5), (0.6, 0.6), (-0.4, -0.4).
PAIRS = [-0.7, 0.4, 0.0, 0.0, 0.1, 0.1, -0.9, -0.9]


@pytest.mark.parametrize(
    ("score", "fill", "indices"),
    [
        ("top2_sum", "zero", [4, 5, 2, 3]),  # sums 0.7, 1.0, 1.2, -0.8
        ("max", "zero", [1, 4, 5, 2]),  # the 0 of a dropped expert beats expert 0's key of -0.2
        ("max", "-inf", [1, 4, 5, 0]),
    ],
)
def test_groups(score: str, fill: str, indices: list[int]) -> None:
    spec = {"num_groups": 4, "top_groups": 2, "group_score": score, "dropped_fill": fill, "score": "sigmoid"}
    assert route([0.0] * 8, PAIRS, top_k=4, **spec)[0] == indices


@pytest.mark.parametrize(
    ("spec", "weights"),
    [
        ({"renormalize": True}, [0.5, 0.5]),
        ({"renormalize": True, "renormalize_eps": 1.0}, [0.25, 0.25]),
        ({"renormalize": True, "renormalize_eps": 4.0, "eps_form": "max"}, [0.125, 0.125]),
        ({"renormalize": True, "renormalize_eps": 0.5, "eps_form": "max"}, [0.5, 0.5]),
        ({"scale": 3.0}, [1.5, 1.5]),
        ({"scale": 3.0, "scale_place": "output"}, [0.5, 0.5]),
        ({"softcap": 2.0, "temperature": 3.0}, [0.5, 0.5]),
    ],
)
def test_weights(spec: dict[str, object], weights: list[float]) -> None:
    assert route([0.0, 0.0, -9.0], top_k=2, score="sigmoid", **spec)[1] == weights


def test_masked_weights() -> None:
    """DeepSeek-V2: with more routes than kept experts, a dropped one is chosen with weight 0."""
    spec = {"num_groups": 2, "top_groups": 1, "group_score": "max", "weights_from": "masked"}
    indices, weights = route(LOG, top_k=3, **spec)
    assert indices == [3, 2, 0]
    assert_equal(weights, [0.4, 0.3, 0.0])


def test_transforms_before_the_score() -> None:
    cap = route([3.0, -3.0], top_k=1, score="sigmoid", softcap=2.0)[1]
    assert_equal(cap, [1 / (1 + np.exp(-2 * np.tanh(1.5)))])
    cool = route([3.0, -3.0], top_k=1, score="sqrtsoftplus", temperature=1.5)[1]
    assert_equal(cool, [np.sqrt(np.log(1 + np.e**2))])


def test_margin_is_the_gap_at_the_cut() -> None:
    def margin(logits: list[float], **spec: object) -> float:
        return float(oracle.route(np.array([logits]), RouterSpec(num_experts=4, **spec)).margin[0])

    assert_equal(margin(LOG, top_k=2), (0.3 - 0.2) / 0.3)
    assert margin([1.0, 2.0, 2.0, 2.0], top_k=2) == 0
    assert margin(LOG, top_k=4) == np.inf
    # Groups of sums 0.3 and 0.7.
    groups = {"num_groups": 2, "top_groups": 1}
    assert_equal(margin(LOG, top_k=2, **groups), 0.4 / 0.7)


# -- activations by hand -----------------------------------------------------------------------------------

HALF_MORE = 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * 1.044715))  # of gelu_tanh(1)
SIGMOID_1, SIGMOID_2 = 1 / (1 + np.exp(-1)), 1 / (1 + np.exp(-2))


@pytest.mark.parametrize(
    ("activation", "gate", "up", "value"),
    [
        (Activation(), 1.0, 3.0, 3 * SIGMOID_1),
        (Activation(name="swiglu_oai", alpha=0.5, limit=2.0), 9.0, -9.0, (1 - 2) * 2 * SIGMOID_1),
        (Activation(name="swiglu_clipped", limit=0.5), 9.0, -9.0, 0.5 * -0.5),
        (Activation(name="swiglu_clamped", limit=2.0), 9.0, -9.0, 2 * SIGMOID_2 * -2),
        (Activation(name="geglu_tanh"), 1.0, 3.0, 3 * HALF_MORE),
        (Activation(name="situ", beta=2.0), 1.0, 3.0, 2 * np.tanh(0.5) * SIGMOID_1 * 3),
        (Activation(name="situ", linear_beta=3.0), 1.0, 3.0, np.tanh(1) * SIGMOID_1 * 3 * np.tanh(1)),
        (Activation(name="gelu_tanh"), 7.0, 1.0, HALF_MORE),
        (Activation(name="relu2"), 7.0, -3.0, 0.0),
        (Activation(name="relu2"), 7.0, 3.0, 9.0),
    ],
    ids=repr,
)
def test_activations(activation: Activation, gate: float, up: float, value: float) -> None:
    assert_equal(oracle.activate(activation, np.array(gate), np.array(up)), value)


def test_gradient_of_a_polynomial() -> None:
    at = np.array([[1.0, 2.0], [3.0, -4.0]])
    assert_equal(oracle.gradient(lambda x: float((x**3).sum()), at), 3 * at**2)
