"""Derivatives of the expert operations, numerically checked, and their life under MLX's transformations."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import oracle
import pytest
from factories import Floats, MakeExperts
from formats import ACTIVATIONS, BY_NAME

from moefast import Activation, ExpertWeights, Projection, Routing, experts
from moefast.testing import assert_close, float64

EXPERTS, HIDDEN, WIDTH = 3, 4, 5

# The reference has other paths for few routes and for many (64): sorted, in blocks of several rows.
ROUTES = pytest.mark.parametrize(("tokens", "top_k"), [(3, 2), (8, 8)], ids=["few", "many"])


class Layer:
    """One set of experts with all its arrays by name, to differentiate by any of them."""

    def __init__(self, weights: ExpertWeights, x: mx.array, routing: Routing, slopes: mx.array):
        self.weights, self.indices, self.slopes = weights, routing.indices, slopes
        self.arrays = {"x": x, "mix": routing.weights}
        self.dequantized: dict[str, oracle.Float64] = {}
        for name in ("gate", "up", "down"):
            projection = getattr(weights, name)
            if projection is not None:
                self.arrays |= {f"{name}.weight": projection.weight, f"{name}.bias": projection.bias}
                self.dequantized[f"{name}.weight"] = oracle.dequantize(projection)

    def cost(self, arrays: dict[str, mx.array]) -> mx.array:
        """A scalar of the layer's output, by moefast."""

        def projection(name: str) -> Projection | None:
            if (p := getattr(self.weights, name)) is None:
                return None
            weight, bias = arrays[f"{name}.weight"], arrays[f"{name}.bias"]
            return Projection(weight, p.scales, p.biases, bias=bias, quant=p.quant)

        weights = ExpertWeights(
            gate=projection("gate"),
            up=projection("up"),
            down=projection("down"),
            activation=self.weights.activation,
        )
        y = experts(arrays["x"], weights, Routing(self.indices, arrays["mix"]), backend="reference")
        return (y.astype(mx.float32) * self.slopes).sum()

    def true_gradient(self, name: str) -> oracle.Float64:
        """The derivative of the same scalar by the oracle, which takes plain float64 arrays as well."""

        def true_cost(value: oracle.Float64) -> float:
            arrays = {name: float64(array) for name, array in self.arrays.items()}
            arrays |= self.dequantized | {name: value}
            parts = {
                part: SimpleNamespace(weight=arrays[f"{part}.weight"], bias=arrays[f"{part}.bias"], **plain)
                if f"{part}.weight" in arrays
                else None
                for part in ("gate", "up", "down")
            }
            weights = SimpleNamespace(activation=self.weights.activation, **parts)
            y = oracle.experts(arrays["x"], weights, self.indices, arrays["mix"])
            return float((y * float64(self.slopes)).sum())

        plain = {"quant": None, "global_scale": None}
        return oracle.gradient(true_cost, self.arrays[name])


def make_layer(
    floats: Floats,
    expert_weights: MakeExperts,
    rng: np.random.Generator,
    *,
    tokens: int,
    top_k: int,
    sizes: tuple[int, int] = (HIDDEN, WIDTH),
    dtype: mx.Dtype = mx.float32,
    **format_: Any,
) -> Layer:
    indices = mx.array(rng.integers(0, EXPERTS, (tokens, top_k)).astype(np.uint32))
    routing = Routing(indices, mx.softmax(floats(tokens, top_k), axis=-1).astype(dtype))
    x = floats(tokens, sizes[0], dtype=dtype)
    weights = expert_weights(EXPERTS, *sizes, dtype=dtype, bias=True, **format_)
    return Layer(weights, x, routing, floats(tokens, sizes[0]))


def check(layer: Layer, names: list[str], sizes: tuple[int, int] = (HIDDEN, WIDTH)) -> None:
    slopes = mx.grad(lambda some: layer.cost(layer.arrays | some))({n: layer.arrays[n] for n in names})
    routes = layer.indices.size  # over which an expert's gradient is summed
    for name in names:
        got, want = slopes[name], layer.true_gradient(name)
        assert got.dtype == layer.arrays[name].dtype, name
        # Of a vector per expert the rows are too short to have a size of their own.
        got, want = got.reshape(-1), want.reshape(-1)
        assert_close(got, want, "experts", reductions=(*sizes, routes), gradient=True)


@ROUTES
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_every_array_of_a_float32_layer(
    activation: Activation,
    tokens: int,
    top_k: int,
    floats: Floats,
    expert_weights: MakeExperts,
    rng: np.random.Generator,
) -> None:
    layer = make_layer(floats, expert_weights, rng, tokens=tokens, top_k=top_k, activation=activation)
    assert len(layer.arrays) == (8 if activation.gated else 6)
    check(layer, list(layer.arrays))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@ROUTES
def test_every_array_of_a_half_precision_layer(
    tokens: int,
    top_k: int,
    dtype: mx.Dtype,
    floats: Floats,
    expert_weights: MakeExperts,
    rng: np.random.Generator,
) -> None:
    """On a CPU these go through products of blocks, row by row or padded."""
    layer = make_layer(floats, expert_weights, rng, tokens=tokens, top_k=top_k, dtype=dtype)
    check(layer, list(layer.arrays))


@ROUTES
@pytest.mark.parametrize("name", ["affine4-g32", "affine3-g32", "mxfp4", "mxfp8", "nvfp4"])
def test_input_and_mix_of_a_quantized_layer(
    name: str,
    tokens: int,
    top_k: int,
    floats: Floats,
    expert_weights: MakeExperts,
    rng: np.random.Generator,
) -> None:
    """What LoRA trains through: the weights are frozen, the gradient passes them."""
    sizes = (32, 64)
    quant = BY_NAME[name].quant
    layer = make_layer(floats, expert_weights, rng, tokens=tokens, top_k=top_k, sizes=sizes, quant=quant)
    check(layer, ["x", "mix", "down.bias"], sizes)


# -- transformations ---------------------------------------------------------------------------------------


@pytest.fixture(params=["plain", "affine4-g32"])
def weights(request: pytest.FixtureRequest, expert_weights: MakeExperts) -> ExpertWeights:
    return expert_weights(8, 32, 64, **BY_NAME[request.param].of(mx.bfloat16))


def make_call(floats: Floats, rng: np.random.Generator, tokens: int) -> tuple[mx.array, ...]:
    indices = mx.array(rng.integers(0, 8, (tokens, 2)).astype(np.uint32))
    return floats(tokens, 32, dtype=mx.bfloat16), indices, mx.softmax(floats(tokens, 2), axis=-1)


def test_compiled_for_several_shapes(
    weights: ExpertWeights, floats: Floats, rng: np.random.Generator
) -> None:
    traces = []

    def function(x: mx.array, indices: mx.array, mix: mx.array) -> mx.array:
        traces.append(x.shape)
        return experts(x, weights, Routing(indices, mix), backend="reference")

    compiled = mx.compile(function)
    for tokens in (1, 40, 1):
        call = make_call(floats, rng, tokens)
        want = oracle.experts(call[0], weights, *call[1:])
        assert_close(compiled(*call), want, "experts", reductions=(32, 64), top_k=2)
    assert traces == [(1, 32), (40, 32)]


def square_sum(run: Any) -> Any:
    """Value and gradients of a scalar of ``run(x, mix)``."""
    return mx.value_and_grad(lambda *of: (run(*of) ** 2).astype(mx.float32).sum(), argnums=(0, 1))


@pytest.mark.parametrize("tokens", [3, 40])
def test_checkpointed(tokens: int, weights: ExpertWeights, floats: Floats, rng: np.random.Generator) -> None:
    """Recomputing the forward pass gives the same bits."""
    x, indices, mix = make_call(floats, rng, tokens)

    def layer(x: mx.array, mix: mx.array) -> mx.array:
        return experts(x, weights, Routing(indices, mix), backend="reference")

    value, slopes = square_sum(layer)(x, mix)
    again, same_slopes = square_sum(mx.checkpoint(layer))(x, mix)
    assert value.item() == again.item()
    for mine, same in zip(slopes, same_slopes, strict=True):
        np.testing.assert_array_equal(float64(mine), float64(same))


def test_compiled_with_gradient(weights: ExpertWeights, floats: Floats, rng: np.random.Generator) -> None:
    x, indices, mix = make_call(floats, rng, 40)

    def layer(x: mx.array, mix: mx.array) -> mx.array:
        return experts(x, weights, Routing(indices, mix), backend="reference")

    value, slopes = square_sum(layer)(x, mix)
    compiled, near_slopes = mx.compile(square_sum(layer))(x, mix)
    rounding = {"dtype": mx.bfloat16, "reductions": (32, 64), "top_k": 2, "gradient": True}
    assert_close(compiled, float64(value), "experts", **rounding)
    for mine, near in zip(slopes, near_slopes, strict=True):
        assert_close(near, float64(mine), "experts", **rounding)


def test_indices_are_constants(floats: Floats, expert_weights: MakeExperts, rng: np.random.Generator) -> None:
    """A derivative may pass through whatever made the indices: it finds nothing there."""
    weights, x = expert_weights(4, 32, 64), floats(3, 32)

    def cost(logits: mx.array) -> mx.array:
        indices = mx.argpartition(-logits, kth=1, axis=-1)[..., :2]
        return experts(x, weights, Routing(indices, mx.ones((3, 2))), backend="reference").sum()

    assert not np.array(mx.grad(cost)(floats(3, 4))).any()
