"""The mat-vec kernels made otherwise: other numbers of rows, which must not change a bit, and the order of
sums that ``metal-fast`` takes, which reads less."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import oracle
import pytest
from factories import Floats, MakeExperts, MakeShared
from formats import BY_NAME
from metal import emulated, needs_emulator
from mlx_kernels import bits
from test_metal_decode import some_indices
from test_metal_decode_bits import MODELS, routes_of

from moefast import QuantSpec, RouterSpec, Routing, experts, moe, switch_glu
from moefast.backends import metal, registry
from moefast.backends.metal import dispatch
from moefast.backends.metal.matvec import EXACT, Variant, is_fast
from moefast.testing import assert_close

pytestmark = needs_emulator

FAST = Variant(fidelity="fast")
# No length is a number of their long chunks, 256 to 1024 values.
FORMATS = ("affine4-g64", "affine8-g32", "affine2-g32", "affine3-g32", "affine5-g32", "affine6-g32")
FORMATS += ("mxfp4", "mxfp8", "nvfp4", "plain")


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_rows_do_not_change_a_bit(
    rows: int,
    monkeypatch: pytest.MonkeyPatch,
    floats: Floats,
    expert_weights: MakeExperts,
    shared_expert: MakeShared,
) -> None:
    spec = RouterSpec(num_experts=8, top_k=3, renormalize=True)
    format_: dict[str, Any] = {"quant": QuantSpec(group_size=32), "dtype": mx.bfloat16}
    weights = expert_weights(8, 96, 160, **format_)
    shared = shared_expert(96, 32, output_gate=True, **format_)
    x, logits = floats(1, 96, dtype=mx.bfloat16), floats(1, 8, dtype=mx.bfloat16)
    outputs, threadgroups = [], set()
    for limits in [dispatch.Thresholds(2, 16, None, m, r) for m in (False, True) for r in (4, rows)]:
        with emulated() as launches, dispatch.trying(limits):
            outputs.append(bits(moe(x, logits, spec, weights, shared=shared, backend="metal")))
        last = launches[-1].result
        assert last is not None
        threadgroups.add(last.counters.threadgroups)
    assert threadgroups == {96 // 4, 96 // rows}
    for other in outputs[1:]:
        np.testing.assert_array_equal(other, outputs[0])


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("name", FORMATS)
def test_fast_is_within_the_bound(
    name: str, tokens: int, floats: Floats, expert_weights: MakeExperts, rng: np.random.Generator
) -> None:
    format_ = BY_NAME[name].of(mx.bfloat16)
    weights = expert_weights(6, 192, 320, bias=True, **format_)
    x, indices = floats(tokens, 192, dtype=mx.bfloat16), some_indices(rng, tokens, 2, 6)
    mix = mx.array(rng.random(indices.shape).astype(np.float32))
    with emulated():
        apart = switch_glu(x, weights, indices, backend="metal-fast")
        y = experts(x, weights, Routing(indices, mix), backend="metal-fast")
    close: dict[str, Any] = {"reductions": (192, 320), "top_k": 2}
    assert_close(apart, oracle.switch_glu(x, weights, indices), "switch_glu", **close)
    assert_close(y, oracle.experts(x, weights, indices, mix), "experts", **close)


def test_fast_blocks_with_a_shared_expert(
    floats: Floats, expert_weights: MakeExperts, shared_expert: MakeShared
) -> None:
    spec = RouterSpec(num_experts=8, top_k=3, renormalize=True)
    format_: dict[str, Any] = {"quant": QuantSpec(group_size=32), "dtype": mx.float32}
    weights, shared = (
        expert_weights(8, 96, 160, **format_),
        shared_expert(96, 32, output_gate=True, **format_),
    )
    for tokens in (0, 1, 4, 150):
        x, logits = floats(tokens, 96), floats(tokens, 8)
        with emulated():
            y = moe(x, logits, spec, weights, shared=shared, backend="metal-fast")
        assert_close(
            y, oracle.moe(x, logits, spec, weights, shared=shared), "moe", reductions=(96, 160), top_k=3
        )


@pytest.mark.parametrize("model", MODELS)
def test_fast_asks_for_fewer_scales(
    model: str, floats: Floats, expert_weights: MakeExperts, rng: np.random.Generator
) -> None:
    """Where MLX takes the shorter chunks; packed weights are read once in either order."""
    shape, dtype = MODELS[model], mx.bfloat16
    weights = expert_weights(shape.top_k + 2, 64, shape.width, quant=QuantSpec(), dtype=dtype)
    inner, indices = floats(1, shape.top_k, shape.width, dtype=dtype), routes_of(rng, 1, shape.top_k)
    loaded = []
    for variant in (EXACT, FAST):
        with emulated() as launches:
            metal.decode.down(inner, weights, indices, variant)
        assert launches[0].result is not None
        loaded.append(launches[0].result.counters.buffers)
    exact, fast = loaded
    assert fast["down_weight"].loaded == fast["down_weight"].unique == exact["down_weight"].loaded
    of_scales = fast["down_scales"].loaded / exact["down_scales"].loaded
    assert of_scales == (1.0 if is_fast(weights.layout.down) else 0.5)


def test_fast_must_be_asked_for(floats: Floats, expert_weights: MakeExperts) -> None:
    weights, indices = expert_weights(2, 32, 32), mx.array([[1]], mx.uint32)
    with emulated():
        for name in ("auto", "metal", "metal-fast"):
            switch_glu(floats(1, 32), weights, indices, backend=name)
            chosen = {choice.backend for _, choice in registry.choices()}
            assert ("metal-fast" in chosen) == (name == "metal-fast")
