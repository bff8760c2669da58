"""A block that remembers its kernels on Metal: nothing but launches is made, and nothing stale is used."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import mlx.core as mx
import pytest
from metal import emulated, needs_emulator
from mlx.utils import tree_flatten
from test_recall import CHANGES, HIDDEN, WIDTH, check, double, inputs, make_block

from moefast import nn, use_backend
from moefast.backends import native
from moefast.backends.metal import launch, of_layers, products
from moefast.nn.projection import projection_of
from moefast.registry import Problem
from moefast.testing import assert_close, float64
from moefast.weights import Layout

pytestmark = [
    needs_emulator,
    pytest.mark.usefixtures("cpu", "on_metal"),
    pytest.mark.skipif(not native.bindings().native, reason=native.bindings().reason),
]
CLOSE = {"reductions": (HIDDEN, WIDTH), "top_k": 3}


@pytest.fixture
def on_metal() -> Iterator[list[launch.Launch]]:
    with emulated(check=False) as launches, use_backend("auto"):
        yield launches


@pytest.fixture
def block(on_metal: list[launch.Launch]) -> nn.MoE:
    """One that has been called, and remembers Metal's kernels."""
    block = make_block()
    mx.eval(block(inputs(1)))
    assert block._recall is not None
    assert on_metal
    on_metal.clear()
    return block


def is_recalled(block: nn.MoE, x: mx.array) -> bool:
    """Whether a call is not made in full."""
    with mock.patch("moefast.nn.moe.choose", side_effect=KeyError):
        try:
            block(x)
        except KeyError:
            return False
    return True


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_changes_is_seen(change: Callable[[nn.MoE], Any], block: nn.MoE) -> None:
    change(block)
    check(block, inputs(1))


@pytest.mark.parametrize("lead", [(1,), (1, 1), (5,), (0,), (160,)], ids=str)
def test_the_second_call_is_recalled(
    lead: tuple[int, ...], block: nn.MoE, on_metal: list[launch.Launch]
) -> None:
    x = inputs(*lead)
    first = block(x)
    full = [made.name for made in on_metal]
    on_metal.clear()
    assert is_recalled(block, x)
    assert [made.name for made in on_metal] == full
    assert mx.array_equal(block(x), first)
    assert block(x).shape == x.shape


def test_a_recalled_call_makes_nothing_but_launches(block: nn.MoE) -> None:
    x = inputs(1)
    with mock.patch.object(mx, "custom_function", side_effect=AssertionError):
        block(x)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("bits", [4, None])
def test_gradients_of_a_recalled_block(tokens: int, bits: int | None) -> None:
    """By x and by whatever is a parameter, in eval mode, where nothing says beforehand that one is taken."""
    block, x = make_block(bits), inputs(tokens)
    block.spec = replace(block.spec, renormalize=False)  # renormalised, slopes nearly cancel out
    block(x)
    assert is_recalled(block, x)

    def loss(x: mx.array, parameters: Any) -> mx.array:
        block.update(parameters)
        return (block(x) ** 2).sum()

    parameters = block.trainable_parameters()
    got = mx.grad(loss, argnums=(0, 1))(x, parameters)
    block.update(parameters)
    with use_backend("reference"):
        want = mx.grad(loss, argnums=(0, 1))(x, parameters)
    block.update(parameters)
    pairs = zip(arrays_in(got), arrays_in(want), strict=True)
    for mine, theirs in pairs:
        # One row: what is left of an entry that nearly cancels out is as wrong as its neighbours.
        mine, theirs = mine.reshape(1, -1), theirs.reshape(1, -1)
        assert_close(mine, float64(theirs), "moe", **CLOSE, gradient=True)
    block(x)
    assert is_recalled(block, x)


def arrays_in(tree: Any) -> list[mx.array]:
    return [leaf for _, leaf in tree_flatten(tree)]


def test_a_gradient_further_back(block: nn.MoE) -> None:
    """x is made from what the gradient is by."""
    x = inputs(1)

    def loss(scale: mx.array) -> mx.array:
        return (block(scale * x) ** 2).sum()

    got = mx.grad(loss)(mx.array(0.5))
    with use_backend("reference"):
        want = mx.grad(loss)(mx.array(0.5))
    assert_close(got.reshape(1, 1), float64(want.reshape(1, 1)), "moe", **CLOSE, gradient=True)


def test_compiled_it_still_refuses(block: nn.MoE) -> None:
    """Arrays that are traced are not handed to an eager kernel."""
    x = inputs(1)
    block(x)
    with pytest.raises(RuntimeError, match="an emulated kernel is eager"):
        mx.compile(block)(x)
    check(block, x)


def test_weights_that_lie_in_columns(block: nn.MoE, on_metal: list[launch.Launch]) -> None:
    """Never copied: the next call goes to another backend."""
    layer, x = block.switch_mlp.up_proj, inputs(1)
    layer.scales = mx.contiguous(layer.scales.swapaxes(1, 2)).swapaxes(1, 2)
    mx.eval(layer.scales)
    check(block, x)
    assert not on_metal


def test_weights_that_are_not_there_yet(block: nn.MoE) -> None:
    """Evaluated first, since only then is it known how they lie."""
    x = inputs(1)
    double(block)
    assert not is_recalled(block, x)
    check(block, x)
    assert is_recalled(block, x)


def test_what_was_replaced_is_free_at_once(block: nn.MoE) -> None:
    old = [weakref.ref(block.switch_mlp.up_proj.weight), weakref.ref(block.shared_experts.gate_proj.scales)]
    block.switch_mlp = make_block().switch_mlp
    double(block.shared_experts)
    gc.collect()
    assert [ref() for ref in old] == [None, None]


def test_without_the_extension_every_call_is_made_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    without = native.bindings()._replace(native=None)
    monkeypatch.setattr(of_layers, "bindings", lambda: without)
    block, x = make_block(), inputs(1)
    block(x)
    assert not is_recalled(block, x)
    check(block, x)


# -- dense products, which are MLX's own -------------------------------------------------------------------


@pytest.fixture
def as_on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX's operations run on the CPU; what is recalled is what a GPU would get."""
    monkeypatch.setattr(products, "device_name", lambda: "gpu")


@pytest.mark.usefixtures("as_on_gpu")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", [None, 4])
def test_a_dense_layer(bits: int | None, bias: bool) -> None:
    layer: Any = nn.Linear(HIDDEN, 8, bias=bias)
    if bits:
        layer = layer.to_quantized(32, bits)
    call = products.bind(problem_of(layer)).of_layers
    assert call is not None
    x = inputs(1)
    want = layer(x)
    got = call(x, layer, type(layer), 1, 1)
    assert_close(got, float64(want), "moe", **CLOSE)
    double(layer)
    assert_close(call(x, layer, type(layer), 1, 1), float64(layer(x)), "moe", **CLOSE)


@pytest.mark.usefixtures("as_on_gpu")
def test_a_dense_call_of_another_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(HIDDEN, 8).to_quantized(32, 4)
    call = products.bind(problem_of(layer)).of_layers
    assert call is not None
    kind = type(layer)
    assert call(inputs(2), layer, kind, 1, 1) is None
    assert call(inputs(1).astype(mx.bfloat16), layer, kind, 1, 1) is None
    assert call(mx.ones((2, HIDDEN // 2)), layer, kind, 1, 1) is None  # as many values as a token has
    assert call(inputs(1), layer, nn.Linear, 1, 1) is None
    assert call(inputs(1), nn.Linear(HIDDEN, 8).to_quantized(32, 8), kind, 1, 1) is None
    monkeypatch.setattr(products, "device_name", lambda: "cpu")
    assert call(inputs(1), layer, kind, 1, 1) is None


def problem_of(layer: Any) -> Problem:
    weight = projection_of(layer)
    assert weight is not None
    layout: Layout = weight.layout
    return Problem("quantized_matmul", "gpu", mx.float32, "decode", (layout,))
