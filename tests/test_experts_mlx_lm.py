"""The reference experts are mlx-lm's SwitchGLU and SwitchMLP: bit for bit in float32, closer to the truth
than them in half precision on a CPU, where MLX accumulates in the dtype of the activations."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import oracle
import pytest
from factories import Floats, MakeExperts
from families import BY_NAME as BY_FAMILY
from formats import BY_NAME, DTYPES
from mlx_lm_routers import ROUTERS, Block, Call

from moefast import Activation, ExpertWeights, Projection, experts, route, switch_glu
from moefast.testing import assert_close, error, float64

pytest.importorskip("mlx_lm", reason="compares with mlx-lm")

EXPERTS, HIDDEN, WIDTH = 8, 64, 128


def mlx_lm(module: str, name: str) -> Any:
    return getattr(import_module(f"mlx_lm.models.{module}"), name)


def switch_linear(p: Projection) -> nn.Module:
    """mlx-lm's module holding the arrays of a projection."""
    _, out, in_, *_ = p.layout
    if p.quant is None:
        module = mlx_lm("switch_layers", "SwitchLinear")(in_, out, EXPERTS, bias=False)
    else:
        kind = mlx_lm("switch_layers", "QuantizedSwitchLinear")
        module = kind(in_, out, EXPERTS, bias=False, **p.quant.mlx_arguments())
        module.scales, module.biases, module.global_scale = p.scales, p.biases, p.global_scale
    module.weight = p.weight
    if p.bias is not None:
        module.bias = p.bias
    return module


def stock(weights: ExpertWeights, activation: Callable[..., mx.array]) -> nn.Module:
    """mlx-lm's block of the same arrays."""
    if weights.gate is None:
        block = mlx_lm("switch_layers", "SwitchMLP")(HIDDEN, WIDTH, EXPERTS, activation=activation)
        block.fc1, block.fc2 = switch_linear(weights.up), switch_linear(weights.down)
        return block
    block = mlx_lm("switch_layers", "SwitchGLU")(HIDDEN, WIDTH, EXPERTS, activation=activation)
    block.gate_proj, block.up_proj, block.down_proj = (switch_linear(p) for p in weights.projections)
    return block


# activation -> what mlx-lm passes to its block
ACTIVATIONS: list[tuple[Activation, Callable[[], Any]]] = [
    (Activation(), lambda: mlx_lm("switch_layers", "SwiGLU")()),
    (Activation(name="swiglu_oai", limit=1.5), lambda: mlx_lm("activations", "SwigluOAI")(limit=1.5)),
    (Activation(name="swiglu_clipped", limit=1.0), lambda: mlx_lm("step3p5", "ClampedSwiGLU")(1.0)),
    (Activation(name="swiglu_clamped", limit=1.0), lambda: mlx_lm("deepseek_v41", "DeepseekV41SwiGLU")(1.0)),
    (Activation(name="geglu_tanh"), lambda: mlx_lm("gemma4_text", "GeGLU")()),
    (Activation(name="situ", beta=1.5), lambda: mlx_lm("kimi_k3", "SiTU")(1.5)),
    (Activation(name="situ", linear_beta=2.0), lambda: mlx_lm("kimi_k3", "SiTU")(1.0, 2.0)),
    (Activation(name="gelu_tanh"), lambda: nn.GELU(approx="precise")),
    (Activation(name="relu2"), nn.ReLU2),
]


def draw(rng: np.random.Generator, tokens: int) -> mx.array:
    return mx.array(rng.integers(0, EXPERTS, (tokens, 4)).astype(np.uint32))


@pytest.mark.parametrize(
    ("activation", "theirs"),
    ACTIVATIONS,
    ids=lambda value: repr(value) if isinstance(value, Activation) else "",
)
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_activations_bit_for_bit(
    tokens: int,
    activation: Activation,
    theirs: Callable[[], Any],
    floats: Floats,
    expert_weights: MakeExperts,
    rng: np.random.Generator,
) -> None:
    weights = expert_weights(EXPERTS, HIDDEN, WIDTH, activation=activation, bias=True)
    x, indices = floats(tokens, HIDDEN), draw(rng, tokens)
    got = switch_glu(x, weights, indices, backend="reference")
    np.testing.assert_array_equal(np.array(got), np.array(stock(weights, theirs())(x, indices)))


@pytest.mark.parametrize(
    "name", ["affine4-g32", "affine3-g64", "affine6-g64", "affine8-g32", "mxfp4", "mxfp8", "nvfp4"]
)
@pytest.mark.parametrize("tokens", [1, 40])
def test_formats_bit_for_bit(
    tokens: int, name: str, floats: Floats, expert_weights: MakeExperts, rng: np.random.Generator
) -> None:
    weights = expert_weights(EXPERTS, HIDDEN, WIDTH, **BY_NAME[name].of(mx.float32))
    x, indices = floats(tokens, HIDDEN), draw(rng, tokens)
    got = switch_glu(x, weights, indices, backend="reference")
    block = stock(weights, mlx_lm("switch_layers", "SwiGLU")())
    np.testing.assert_array_equal(np.array(got), np.array(block(x, indices)))


# Blocks that add nothing to their experts' weighted sum: what they return is the combine's result.
COMBINES = [
    name
    for name, router in ROUTERS.items()
    if isinstance(router, Block) and name not in ("qwen2_moe", "qwen3_next", "minimax_m3_vl", "Klear")
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", COMBINES)
def test_combine_bit_for_bit(
    name: str, dtype: mx.Dtype, floats: Floats, expert_weights: MakeExperts, rng: np.random.Generator
) -> None:
    """Given moefast's expert outputs, each family's own block adds them up to the same bits."""
    family = BY_FAMILY[name]
    spec = family.router(num_experts=EXPERTS, top_k=4, scale=2.5, dtype=str(dtype).removeprefix("mlx.core."))
    call = Call(
        logits=floats(9, EXPERTS, dtype=mx.float32 if family.float32_logits else dtype),
        spec=spec,
        renormalize=True,
        dtype=dtype,
        bias=floats(EXPERTS, scale=0.1) if family.bias else None,
    )
    weights, x = expert_weights(EXPERTS, EXPERTS, WIDTH, dtype=dtype), floats(1, 9, EXPERTS, dtype=dtype)

    def run(x: mx.array, indices: mx.array) -> mx.array:
        return switch_glu(x, weights, indices, backend="reference")

    theirs = ROUTERS[name].run(call, x, run)
    combine_dtype = family.combine and getattr(mx, family.combine)
    routing = route(call.logits[None], spec, selection_bias=call.bias, backend="reference")
    mine = experts(x, weights, routing, combine_dtype=combine_dtype, backend="reference")
    assert mine.dtype == theirs.dtype
    np.testing.assert_array_equal(float64(mine), float64(theirs))


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_closer_to_the_truth_than_stock_on_a_cpu(
    dtype: mx.Dtype, floats: Floats, expert_weights: MakeExperts, rng: np.random.Generator
) -> None:
    weights = expert_weights(EXPERTS, HIDDEN, WIDTH, **BY_NAME["affine4-g32"].of(dtype))
    x, indices = floats(5, HIDDEN, dtype=dtype), draw(rng, 5)
    want = oracle.switch_glu(x, weights, indices)
    got = switch_glu(x, weights, indices, backend="reference")
    theirs = stock(weights, mlx_lm("switch_layers", "SwiGLU")())(x, indices)
    assert_close(got, want, "switch_glu", reductions=(HIDDEN, WIDTH))
    assert error(got, want).rms < error(theirs, want).rms


@pytest.mark.usefixtures("cpu")
def test_what_stock_cannot_do_on_a_cpu(
    floats: Floats, expert_weights: MakeExperts, rng: np.random.Generator
) -> None:
    """The two refusals of MLX's CPU that the reference works around; when one falls, so can its way round."""
    for name, dtype, message in (
        ("plain", mx.bfloat16, "only supports float32"),
        ("nvfp4-scaled", mx.float32, "[Gg]lobal scale|global_scale"),
    ):
        weights = expert_weights(EXPERTS, HIDDEN, WIDTH, **BY_NAME[name].of(dtype))
        x, indices = floats(5, HIDDEN, dtype=dtype), draw(rng, 5)
        block = stock(weights, mlx_lm("switch_layers", "SwiGLU")())
        with pytest.raises((RuntimeError, ValueError), match=message):
            mx.eval(block(x, indices))
        mx.eval(switch_glu(x, weights, indices, backend="reference"))
