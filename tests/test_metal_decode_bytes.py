"""What the decode kernels ask of memory at the models' shapes, counted by the emulator.

Output rows do not depend on each other: some of them are computed, and their bytes scaled up.
"""

from __future__ import annotations

import mlx.core as mx
import mlx_chain as chain
import numpy as np
import pytest
from factories import Floats, MakeExperts, MakeShared
from metal import emulated, needs_emulator
from mlx_kernels import bits
from test_metal_decode_bits import MODELS, down_of_mlx, gate_up_of_mlx, routes_of

from moefast import QuantSpec
from moefast.backends.metal import decode
from moefast.emulator.counters import Counters

pytestmark = needs_emulator

# Requested by lanes, over the unique bytes of weights, scales and offsets.
WHOLE_LAYER = 2.2
# Of x and inner, over what MLX's launches request.
OF_X = 0.75


def of_weights(counters: Counters) -> dict[str, int]:
    """Of packed weights, scales and offsets together: what lanes requested, threadgroups needed, is there."""
    named = {name: c for name, c in counters.buffers.items() if name.endswith(("weight", "scales", "biases"))}
    return {
        "packed": sum(c.loaded for name, c in named.items() if name.endswith("weight")),
        "unique packed": sum(c.unique for name, c in named.items() if name.endswith("weight")),
        "per threadgroup": sum(c.per_threadgroup for name, c in named.items() if not name.endswith("weight")),
        "unique others": sum(c.unique for name, c in named.items() if not name.endswith("weight")),
    }


@pytest.mark.parametrize("bits_", [4, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("model", MODELS)
def test_bytes_of_the_models(
    model: str, bits_: int, expert_weights: MakeExperts, floats: Floats, rng: np.random.Generator
) -> None:
    shape, quant, dtype, rows = MODELS[model], QuantSpec(bits=bits_), mx.bfloat16, 64
    experts = shape.top_k + 2
    indices = routes_of(rng, 1, shape.top_k)
    x, inner = (
        floats(1, shape.hidden, dtype=dtype),
        floats(1, shape.top_k, shape.width, dtype=dtype),
    )
    first = expert_weights(experts, shape.hidden, rows, quant=quant, dtype=dtype)
    second = expert_weights(experts, rows, shape.width, quant=quant, dtype=dtype)
    route_weights = mx.abs(floats(1, shape.top_k))
    with emulated() as launches:
        decode.gate_up(x, first, indices)
        decode.down_combine(inner, second, indices, route_weights)
    requested = unique = 0.0
    for made, scale in zip(launches, (shape.width / rows, shape.hidden / rows), strict=True):
        assert made.result is not None
        counters = made.result.counters
        read = of_weights(counters)
        assert read["packed"] == read["unique packed"]
        assert read["per threadgroup"] == read["unique others"]
        requested += scale * (counters.loaded + counters.stored)
        unique += scale * (read["unique packed"] + read["unique others"])
    assert requested <= WHOLE_LAYER * unique, requested / unique

    with chain.checked() as theirs:
        gate_up_of_mlx(x, first, indices)
        down_of_mlx(inner, second, indices)
    up, gate, _, down = theirs  # the third is the activation
    scales = (shape.width / rows, shape.hidden / rows)
    mine = [launches[0].result, launches[1].result]
    assert mine[0] is not None
    assert mine[1] is not None
    ours = scales[0] * mine[0].counters.buffers["x"].loaded
    ours += scales[1] * mine[1].counters.buffers["inner"].loaded
    of_mlx = scales[0] * (up.counters.buffers["x"].loaded + gate.counters.buffers["x"].loaded)
    of_mlx += scales[1] * down.counters.buffers["x"].loaded
    assert ours <= OF_X * of_mlx, ours / of_mlx
    assert bits(x).nbytes == mine[0].counters.buffers["x"].unique


@pytest.mark.parametrize("width", [5632, 1408], ids=["qwen2", "glm4"])
def test_bytes_of_the_shared_expert(
    width: int,
    expert_weights: MakeExperts,
    shared_expert: MakeShared,
    floats: Floats,
    rng: np.random.Generator,
) -> None:
    """In the launches of the routed experts; its weights, too, are read once."""
    quant, dtype, rows = QuantSpec(), mx.bfloat16, 64
    indices = routes_of(rng, 1, 2)
    x, route_weights = floats(1, 2048, dtype=dtype), mx.abs(floats(1, 2))
    first = expert_weights(4, 2048, rows, quant=quant, dtype=dtype)
    second = expert_weights(4, rows, 128, quant=quant, dtype=dtype)
    shared_first = shared_expert(2048, rows, output_gate=True, quant=quant, dtype=dtype)
    shared_second = shared_expert(rows, width, output_gate=True, quant=quant, dtype=dtype)
    with emulated() as launches:
        _, kept = decode.gate_up_with_shared(x, first, indices, shared_first)
        kept = decode.SharedInner(shared_second, floats(1, width, dtype=dtype), kept.logits)
        inner = floats(1, 2, 128, dtype=dtype)
        decode.down_combine(inner, second, indices, route_weights, shared=kept)
    for made in launches:
        assert made.result is not None
        read = of_weights(made.result.counters)
        assert read["packed"] == read["unique packed"]
        assert read["per threadgroup"] == read["unique others"]
    assert launches[0].result is not None
    assert launches[0].result.counters.buffers["shared_output_gate_weight"].unique == 2048 // 2


@pytest.mark.parametrize(
    ("model", "shared_width", "output_gate"),
    [("glm4", 1408, False), ("qwen2", 5632, True), ("bailing", 2816, False)],
)
def test_bytes_of_a_whole_layer_with_its_shared_expert(
    model: str,
    shared_width: int,
    output_gate: bool,
    expert_weights: MakeExperts,
    shared_expert: MakeShared,
    floats: Floats,
    rng: np.random.Generator,
) -> None:
    shape, quant, dtype, rows = MODELS[model], QuantSpec(), mx.bfloat16, 64
    experts = shape.top_k + 2
    indices, route_weights = routes_of(rng, 1, shape.top_k), mx.abs(floats(1, shape.top_k))
    x, inner = floats(1, shape.hidden, dtype=dtype), floats(1, shape.top_k, shape.width, dtype=dtype)
    first = expert_weights(experts, shape.hidden, rows, quant=quant, dtype=dtype)
    second = expert_weights(experts, rows, shape.width, quant=quant, dtype=dtype)
    shared_first = shared_expert(shape.hidden, rows, output_gate=output_gate, quant=quant, dtype=dtype)
    shared_second = shared_expert(rows, shared_width, output_gate=output_gate, quant=quant, dtype=dtype)
    with emulated() as launches:
        decode.gate_up(x, first, indices)
        kept = decode.shared_gate_up(x, shared_first)
        kept = decode.SharedInner(shared_second, floats(1, shared_width, dtype=dtype), kept.logits)
        decode.down_combine(inner, second, indices, route_weights, shared=kept)
    requested = unique = 0.0
    scales = (shape.width / rows, shared_width / rows, shape.hidden / rows)
    for made, scale in zip(launches, scales, strict=True):
        assert made.result is not None
        counters = made.result.counters
        read = of_weights(counters)
        requested += scale * (counters.loaded + counters.stored)
        unique += scale * (read["unique packed"] + read["unique others"])
    assert requested <= WHOLE_LAYER * unique, requested / unique
