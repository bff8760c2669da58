"""The operations on the Metal backend: which kernels run, how long their chains are, derivatives, refusals.

What the kernels compute, format by format, is in test_metal_conformance.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn
import numpy as np
import oracle
import pytest
from factories import Floats, MakeExperts, MakeShared
from formats import BY_NAME
from metal import emulated, needs_emulator

from moefast import (
    ExpertWeights,
    Projection,
    QuantSpec,
    RouterSpec,
    Routing,
    experts,
    moe,
    nn,
    route,
    switch_glu,
    use_backend,
)
from moefast.backends import metal
from moefast.backends.metal import dispatch, launch
from moefast.registry import Problem
from moefast.testing import assert_close, float64

pytestmark = needs_emulator

HIDDEN, WIDTH, EXPERTS, TOP_K = 64, 96, 8, 2
SPEC = RouterSpec(num_experts=EXPERTS, top_k=TOP_K, renormalize=True)
AFFINE4 = BY_NAME["affine4-g32"]


def longest_chain(launches: list[launch.Launch]) -> int:
    """Launches of which each needs the one before."""
    length: dict[int, int] = {}
    for made in launches:
        before = max((length.get(address(a), 0) for a in made.inputs.values()), default=0)
        for output in made.outputs.values():
            length[address(output)] = before + 1
    return max(length.values(), default=0)


def address(array: mx.array) -> int:
    """Of an array's memory, which its reshapes share."""
    mx.eval(array)
    if not array.size:
        return 0
    return np.frombuffer(memoryview(array.reshape(-1).view(mx.uint8)), np.uint8).ctypes.data


# -- how many launches -------------------------------------------------------------------------------------

# family -> its shared expert; sizes are cut, routing and the shape of the block are those of the model.
FAMILIES: dict[str, tuple[RouterSpec, dict[str, Any]]] = {
    "granitemoe": (RouterSpec(num_experts=40, top_k=8, score_over="selected", ties="highest"), {}),
    "glm4_moe": (
        RouterSpec(num_experts=128, top_k=8, score="sigmoid", renormalize=True, scale=1.5),
        {"shared_width": 64},
    ),
    "qwen2_moe": (RouterSpec(num_experts=60, top_k=4), {"shared_width": 96, "shared_gate": True}),
    "bailing_moe": (
        RouterSpec(num_experts=64, top_k=6, score="sigmoid", num_groups=8, top_groups=4, renormalize=True),
        {"shared_width": 64},
    ),
    "dbrx": (RouterSpec(num_experts=16, top_k=4, renormalize=True), {}),
}
# tokens -> launches without a shared expert, with one, and the longest chain.
LAUNCHES = {1: (3, 5, 3), 5: (4, 4, 4), 160: (6, 6, 6)}


@pytest.mark.parametrize("tokens", LAUNCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_launches_and_their_chain(family: str, tokens: int) -> None:
    spec, shared = FAMILIES[family]
    block = nn.MoE(spec, HIDDEN, 64, **shared)
    mlx.nn.quantize(block, group_size=32, bits=4)
    block.set_dtype(mx.bfloat16)
    block.eval()
    x = mx.random.normal((tokens, HIDDEN)).astype(mx.bfloat16)
    logits = block.gate.logits(x).astype(mx.float32)  # rounded scores would tie where the oracle's do not
    gate = block.shared_expert_gate if "shared_gate" in shared else None
    weights = block.switch_mlp.expert_weights()
    others = block.shared_experts.shared_expert(gate) if shared else None
    mx.eval(x, logits)
    with emulated(check=False) as launches:
        y = moe(x, logits, spec, weights, shared=others, backend="metal")
    without, with_shared, chain = LAUNCHES[tokens]
    assert len(launches) <= (with_shared if shared else without), [made.name for made in launches]
    assert longest_chain(launches) <= chain, [made.name for made in launches]
    assert launches[0].name == "route"
    want = oracle.moe(x, logits, spec, weights, shared=others)
    assert_close(y, want, "moe", reductions=(HIDDEN, 64), top_k=spec.top_k)
    # Nothing in between is larger than what routes need.
    largest = tokens * spec.top_k * max(HIDDEN, 64)
    assert all(array.size <= largest for made in launches for array in made.outputs.values())


def test_the_chain_is_measured() -> None:
    """Two launches beside one another are a chain of one."""
    x, weight = mx.ones((1, HIDDEN)), mx.ones((EXPERTS, 8, HIDDEN))
    weights = ExpertWeights(
        gate=Projection(weight), up=Projection(weight), down=Projection(weight.swapaxes(1, 2))
    )
    with emulated(check=False) as launches:
        for _ in range(2):
            metal.decode.gate_up(x, weights, mx.array([[1]]))
    assert len(launches) == 2
    assert longest_chain(launches) == 1


# -- which kernels -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "top_k", "num_experts", "generation", "kernels"),
    [
        (0, 8, 128, 0, "decode"),
        (1, 8, 128, 0, "decode"),
        (1, 1, 1, 17, "decode"),
        (2, 8, 128, 0, "band"),
        (127, 8, 128, 0, "band"),  # 7 routes an expert
        (64, 4, 16, 0, "tiles"),  # 16
        (2, 65, 128, 0, "tiles"),
        (128, 8, 256, 0, "tiles"),  # the band's kernels look through all routes
        (512, 4, 60, 13, "tiles"),
        (512, 4, 60, 17, "by_mlx"),  # matrix units that ours do not use
        (128, 8, 128, 17, "tiles"),  # 8 routes an expert are too few for them
    ],
)
def test_dispatch(tokens: int, top_k: int, num_experts: int, generation: int, kernels: str) -> None:
    assert dispatch.kernels_for(tokens, top_k, num_experts, generation) == kernels


@pytest.mark.parametrize(
    ("architecture", "generation"), [("applegpu_g13s", 13), ("applegpu_g17p", 17), ("x86_64", 0)]
)
def test_generation(architecture: str, generation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "device_info", lambda: {"architecture": architecture})
    assert dispatch._generation.__wrapped__() == generation


@pytest.mark.parametrize("merged", [False, True])
def test_a_shared_experts_first_half(
    merged: bool,
    floats: Floats,
    expert_weights: MakeExperts,
    shared_expert: MakeShared,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beside the routed experts' launch or within it: the bits are the same."""
    monkeypatch.setattr(dispatch, "_TABLE", {0: dispatch._TABLE[0]._replace(merged=merged)})
    weights = expert_weights(EXPERTS, HIDDEN, WIDTH, **AFFINE4.of(mx.float32))
    shared = shared_expert(HIDDEN, 32, output_gate=True, **AFFINE4.of(mx.float32))
    x, logits = floats(1, HIDDEN), floats(1, EXPERTS)
    with emulated() as launches:
        y = moe(x, logits, SPEC, weights, shared=shared, backend="metal")
    assert [made.name for made in launches] == (
        ["route", "gate_up_with_shared", "down_combine"]
        if merged
        else ["route", "shared_gate_up", "gate_up", "down_combine"]
    )
    assert longest_chain(launches) == 3
    want = oracle.moe(x, logits, SPEC, weights, shared=shared)
    assert_close(y, want, "moe", reductions=(HIDDEN, WIDTH), top_k=TOP_K)


def test_a_shared_expert_may_have_a_global_scale(
    floats: Floats, expert_weights: MakeExperts, shared_expert: MakeShared
) -> None:
    """A number, where a stack has an array."""
    format_ = BY_NAME["nvfp4-scaled"].of(mx.float32)
    weights = expert_weights(EXPERTS, HIDDEN, WIDTH, **format_)
    shared = shared_expert(HIDDEN, 32, output_gate=True, **format_)
    for tokens in (1, 3):
        x, logits = floats(tokens, HIDDEN), floats(tokens, EXPERTS)
        with emulated():
            y = moe(x, logits, SPEC, weights, shared=shared, backend="metal")
        want = oracle.moe(x, logits, SPEC, weights, shared=shared)
        assert_close(y, want, "moe", reductions=(HIDDEN, WIDTH), top_k=TOP_K)


# -- derivatives -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("op", ["route", "switch_glu", "experts", "moe"])
def test_gradients_are_the_references(
    op: str, tokens: int, floats: Floats, expert_weights: MakeExperts, shared_expert: MakeShared
) -> None:
    spec = RouterSpec(num_experts=EXPERTS, top_k=TOP_K)  # renormalised, slopes nearly cancel out
    x, logits = floats(tokens, HIDDEN), floats(tokens, EXPERTS)
    weights = expert_weights(EXPERTS, HIDDEN, WIDTH, **AFFINE4.of(mx.float32))
    shared = shared_expert(HIDDEN, WIDTH, output_gate=True, **AFFINE4.of(mx.float32))
    routing = route(logits, spec, backend="reference")
    by_expert = mx.arange(EXPERTS) * 0.5 + 1

    def routed(x: mx.array, logits: mx.array, backend: str) -> mx.array:
        found = route(logits, spec, backend=backend)
        return (found.weights * by_expert[found.indices]).sum(axis=-1)

    functions: dict[str, Callable[[mx.array, mx.array, str], mx.array]] = {
        "route": routed,
        "switch_glu": lambda x, _, backend: switch_glu(x, weights, routing.indices, backend=backend),
        "experts": lambda x, mix, backend: experts(
            x, weights, Routing(routing.indices, mix[:, :TOP_K]), backend=backend
        ),
        "moe": lambda x, logits, backend: moe(x, logits, spec, weights, shared=shared, backend=backend),
    }

    def loss(backend: str) -> Callable[..., mx.array]:
        return lambda x, logits: (functions[op](x, logits, backend) ** 2).sum()

    want = mx.grad(loss("reference"), argnums=(0, 1))(x, logits)
    with emulated(check=False) as launches:
        got = mx.grad(loss("metal"), argnums=(0, 1))(x, logits)
    assert launches
    for mine, theirs in zip(got, want, strict=True):
        assert_close(mine, float64(theirs), "moe", reductions=(HIDDEN, WIDTH), top_k=TOP_K, gradient=True)


def test_weights_that_are_not_quantized_have_gradients(floats: Floats, expert_weights: MakeExperts) -> None:
    x, indices = floats(2, HIDDEN), mx.array([[1, 5], [5, 2]])
    weights = expert_weights(EXPERTS, HIDDEN, WIDTH)

    def loss(up: mx.array, backend: str) -> mx.array:
        changed = ExpertWeights(gate=weights.gate, up=Projection(up), down=weights.down)
        return (switch_glu(x, changed, indices, backend=backend) ** 2).sum()

    want = mx.grad(lambda up: loss(up, "reference"))(weights.up.weight)
    with emulated(check=False):
        got = mx.grad(lambda up: loss(up, "metal"))(weights.up.weight)
    # One row: what is left of an entry that nearly cancels out is as wrong as its neighbours.
    got, want = got.reshape(1, -1), want.reshape(1, -1)
    assert_close(got, float64(want), "moe", reductions=(HIDDEN, WIDTH), top_k=TOP_K, gradient=True)


# -- what is refused ---------------------------------------------------------------------------------------


def test_without_a_gpu_it_says_so(floats: Floats) -> None:
    if mx.metal.is_available():
        pytest.skip("there is a Metal device")
    with pytest.raises(ValueError, match="there is no Metal device"):
        route(floats(1, EXPERTS), SPEC, backend="metal")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": mx.float16}, "scales are bfloat16, x is float16"),
        ({"spec": RouterSpec(num_experts=EXPERTS, top_k=TOP_K, scale=1e300)}, "too large for float32"),
    ],
    ids=["dtypes", "numbers"],
)
def test_reasons(change: dict[str, Any], reason: str, floats: Floats, expert_weights: MakeExperts) -> None:
    dtype, spec = change.get("dtype", mx.bfloat16), change.get("spec", SPEC)
    weights = expert_weights(EXPERTS, HIDDEN, WIDTH, **AFFINE4.of(mx.bfloat16))
    x, logits = floats(1, HIDDEN, dtype=dtype), floats(1, EXPERTS)
    with emulated(check=False) as launches:
        with pytest.raises(ValueError, match=reason):
            moe(x, logits, spec, weights, backend="metal")
        moe(x, logits, spec, weights) if "dtype" in change else None
    assert not launches


def test_too_many_experts() -> None:
    spec = RouterSpec(num_experts=2048, top_k=2)
    with emulated(check=False), pytest.raises(ValueError, match="num_experts=2048 > 1024"):
        route(mx.zeros((1, 2048)), spec, backend="metal")


def test_problems_of_another_device() -> None:
    problem = Problem("route", "gpu", mx.float32, "decode", (SPEC, None, None))
    with emulated():
        assert "default device is the gpu" in (metal.METAL.why_not(problem) or "")


def test_stacks_that_would_be_copied(floats: Floats, expert_weights: MakeExperts) -> None:
    """Every second expert of a stack: named, Metal raises; auto goes on, and the answer is right."""
    x, indices = floats(2, HIDDEN), mx.array([[1, 3], [3, 0]])
    whole = expert_weights(2 * EXPERTS, HIDDEN, WIDTH, **AFFINE4.of(mx.float32))

    def every_second(p: Projection | None) -> Projection:
        assert p is not None
        weight, scales, biases = (a[::2] for a in (p.weight, p.scales, p.biases))
        return Projection(weight, scales, biases, quant=p.quant)

    apart = ExpertWeights(
        gate=every_second(whole.gate), up=every_second(whole.up), down=every_second(whole.down)
    )
    with emulated(check=False) as launches:
        with pytest.raises(
            ValueError, match=r"does not lie row by row in memory, and weights are never copied"
        ):
            switch_glu(x, apart, indices, backend="metal")
        y = switch_glu(x, apart, indices)
        assert not launches
        switch_glu(x, whole, indices)
        assert launches
    assert_close(y, oracle.switch_glu(x, apart, indices), "switch_glu", reductions=(HIDDEN, WIDTH))


def test_compiled_it_refuses_in_the_emulator(floats: Floats) -> None:
    logits = floats(2, EXPERTS)
    with emulated(), pytest.raises(RuntimeError, match="an emulated kernel is eager"):
        mx.compile(lambda logits: route(logits, SPEC, backend="metal").weights)(logits)


@pytest.mark.parametrize("tokens", [1, 4, 160])
def test_indices_out_of_range_contribute_nothing(
    tokens: int, floats: Floats, expert_weights: MakeExperts
) -> None:
    """Of any integer dtype, negative ones too. The emulator would report a read outside of a buffer."""
    weights = expert_weights(EXPERTS, HIDDEN, WIDTH, **AFFINE4.of(mx.float32))
    x = floats(tokens, HIDDEN)
    inside = mx.broadcast_to(mx.array([3, 1]), (tokens, 2))
    for dtype, outside in ((mx.int32, -1), (mx.int64, 2**32 + 3), (mx.uint8, 255), (mx.uint32, EXPERTS)):
        column = mx.full((tokens, 1), outside, dtype)
        indices = mx.concatenate([inside[:, :1].astype(dtype), column], axis=-1)
        with emulated():
            y = switch_glu(x, weights, indices, backend="metal")
        assert not y[:, 1].any()
        want = oracle.switch_glu(x, weights, inside)[:, 0]
        assert_close(y[:, 0], want, "switch_glu", reductions=(HIDDEN, WIDTH))


@pytest.mark.parametrize("lead", [(), (0,), (2, 0), (2, 3)], ids=str)
def test_leading_dimensions(
    lead: tuple[int, ...], floats: Floats, expert_weights: MakeExperts, shared_expert: MakeShared
) -> None:
    x, logits = floats(*lead, HIDDEN), floats(*lead, EXPERTS)
    weights = expert_weights(EXPERTS, HIDDEN, WIDTH, **AFFINE4.of(mx.float32))
    shared = shared_expert(HIDDEN, WIDTH, output_gate=True, **AFFINE4.of(mx.float32))
    want = moe(x, logits, SPEC, weights, shared=shared, backend="reference")
    routing = route(logits, SPEC, backend="reference")
    apart = switch_glu(x, weights, routing.indices, backend="reference")
    with emulated():
        y = moe(x, logits, SPEC, weights, shared=shared, backend="metal")
        assert route(logits, SPEC, backend="metal").indices.shape == (*lead, TOP_K)
        alone = switch_glu(x, weights, routing.indices, backend="metal")
        combined = experts(x, weights, routing, backend="metal")
    assert y.shape == combined.shape == (*lead, HIDDEN)
    assert alone.shape == (*lead, TOP_K, HIDDEN)
    close = {"reductions": (HIDDEN, WIDTH), "top_k": TOP_K}
    assert_close(y, float64(want), "moe", **close)
    assert_close(alone, float64(apart), "moe", **close)


@pytest.mark.parametrize("tokens", [1, 3, 140])
def test_what_a_block_may_add(tokens: int, floats: Floats, expert_weights: MakeExperts) -> None:
    """Identity experts, a factor on the output, an expert scale, a cast of the routing weights."""
    spec = RouterSpec(
        num_experts=EXPERTS + 2,
        top_k=3,
        identity_experts=2,
        scale=0.7,
        scale_place="output",
        weight_dtype="float32",
    )
    weights = expert_weights(EXPERTS, HIDDEN, WIDTH, **AFFINE4.of(mx.bfloat16))
    x, logits = floats(tokens, HIDDEN, dtype=mx.bfloat16), floats(tokens, EXPERTS + 2)
    bias, factors = floats(EXPERTS + 2, scale=0.1), 1 + floats(EXPERTS + 2, scale=0.1)
    with emulated():
        y = moe(
            x,
            logits,
            spec,
            weights,
            selection_bias=bias,
            expert_scale=factors,
            combine_dtype=mx.bfloat16,
            backend="metal",
        )
    want = oracle.moe(x, logits, spec, weights, selection_bias=bias, expert_scale=factors)
    assert y.dtype == mx.bfloat16
    assert_close(y, want, "moe", reductions=(HIDDEN, WIDTH), top_k=3)


def test_packings_may_differ(floats: Floats) -> None:
    """Granite's checkpoints keep down at 8 bits."""

    def packed(out_dims: int, in_dims: int, bits: int) -> Projection:
        quant = QuantSpec(bits=bits, group_size=32)
        weight = floats(EXPERTS, out_dims, in_dims, scale=in_dims**-0.5)
        return Projection(*mx.quantize(weight, **quant.mlx_arguments()), quant=quant)

    weights = ExpertWeights(
        gate=packed(WIDTH, HIDDEN, 4), up=packed(WIDTH, HIDDEN, 6), down=packed(HIDDEN, WIDTH, 8)
    )
    for tokens in (1, 4, 150):
        x = floats(tokens, HIDDEN)
        routing = route(floats(tokens, EXPERTS), SPEC, backend="reference")
        with emulated():
            y = experts(x, weights, routing, backend="metal")
        want = oracle.experts(x, weights, routing.indices, routing.weights)
        assert_close(y, want, "experts", reductions=(HIDDEN, WIDTH), top_k=TOP_K)


# -- called again ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantized", [False, True])
def test_a_block_that_was_called_before(quantized: bool) -> None:
    """What it remembers holds as long as arrays, layers and settings are as they were."""
    block = nn.MoE(SPEC, HIDDEN, WIDTH, shared_width=WIDTH, shared_gate=True)
    if quantized:
        mlx.nn.quantize(block, group_size=32, bits=4)
    block.eval()

    def double_in_place() -> None:
        layer = block.switch_mlp.up_proj
        layer["scales" if quantized else "weight"] *= 2

    def other_dtype() -> None:
        block.set_dtype(mx.bfloat16)

    def add_a_bias() -> None:
        block.switch_mlp.down_proj.bias = mx.ones((EXPERTS, HIDDEN), mx.bfloat16)

    def views() -> None:
        layer = block.switch_mlp.up_proj
        layer.weight = mx.concatenate([layer.weight, layer.weight], axis=1)[:, :WIDTH]

    with emulated(check=False) as launches, use_backend("auto"):
        for change in (lambda: None, double_in_place, other_dtype, add_a_bias, views):
            change()
            parts = block.gate.layer
            dtype = parts["scales" if quantized else "weight"].dtype
            x = mx.random.normal((1, HIDDEN)).astype(dtype)
            with use_backend("reference"):
                want = block(x)
            for _ in range(2):
                before = len(launches)
                y = block(x)
                assert (len(launches) > before) == (change is not views)  # those are never copied
                assert y.dtype == want.dtype
                assert_close(y, float64(want), "moe", reductions=(HIDDEN, WIDTH), top_k=TOP_K)
    assert block._recall is not None
