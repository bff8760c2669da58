"""Residual streams: layers that leave their sums to the next norm compute what layers that add do; training,
gradient checkpointing and layers of other kinds see arrays."""

from __future__ import annotations

import io
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from marks import needs_native
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import grad_checkpoint
from model_builders import ours, prompt_cache, tokens
from model_cases import BASE, FULL, Case, sizes

import moefast
from moefast import use_backend
from moefast.models.residual import Residual, ResidualLayer
from moefast.testing import assert_gradients_close

pytestmark = pytest.mark.usefixtures("cpu")

BACKENDS = tuple(name for name, reason in moefast.backends().items() if reason is None)
DTYPES = [mx.float32, mx.bfloat16]

cases = pytest.mark.parametrize("case", FULL, ids=str)
families = pytest.mark.parametrize("family", BASE)


class Wrapped(nn.Module):
    """A layer as someone else would put around one: of arrays."""

    def __init__(self, layer: Any):
        super().__init__()
        self.layer = layer

    def __call__(self, x: mx.array, mask: Any, cache: Any) -> mx.array:
        assert isinstance(x, mx.array)
        y = self.layer(x, mask, cache)
        assert isinstance(y, mx.array)
        return y


def backbone_of(model: Any) -> Any:
    return model[model.BACKBONE]


def run(model: Any) -> list[mx.array]:
    """A prompt, then a token."""
    cache = prompt_cache(model)
    return [model(tokens(2, 9), cache), model(tokens(2, 1), cache)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@cases
def test_sums_left_to_the_next_norm_have_the_same_bits(case: Case, dtype: mx.Dtype, backend: str) -> None:
    model = ours(case.config, bits=4, dtype=dtype)
    backbone = backbone_of(model)
    with use_backend(backend):
        got = run(model)
        mx.eval(got)
        layers = backbone[backbone.LAYERS]
        assert all(isinstance(layer, ResidualLayer) for layer in layers)
        for some in (slice(0, 1), slice(0, len(layers))):
            kept = list(layers)
            layers[some] = [Wrapped(layer) for layer in kept[some]]
            want = run(model)
            layers[:] = kept
            for mine, theirs in zip(got, want, strict=True):
                assert mx.array_equal(mine, theirs)


@families
def test_a_layer_takes_arrays_and_streams(family: str) -> None:
    """mlx-lm's tools call layers one by one."""
    model = ours(BASE[family])
    layer = model.layers[0]
    hidden = backbone_of(model).embed(tokens(1, 5))
    other = hidden[:, ::-1]
    y = layer(hidden, "causal", None)
    assert isinstance(y, mx.array)
    stream = layer(Residual(hidden), "causal", None)
    assert isinstance(stream, Residual)
    assert mx.array_equal(stream.sum(), y)
    for multiplier in (1.0, 0.5):
        before = Residual(hidden, other, multiplier)
        want = layer(hidden + multiplier * other, "causal", None)
        assert mx.array_equal(layer(before, "causal", None).sum(), want)


@families
def test_gradient_checkpointing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """mlx-lm replaces the call of a layer's class, and recomputes the layer from what it was given."""
    model = ours(BASE[family]).train()
    text = tokens(2, 9)

    def loss() -> mx.array:
        return nn.losses.cross_entropy(model(text[:, :-1]), text[:, 1:], reduction="mean")

    want, slopes = nn.value_and_grad(model, loss)()
    mx.eval(want, slopes)
    kind = type(model.layers[0])
    given: list[Any] = []
    call = kind.__call__

    def spy(self: Any, x: Any, *others: Any) -> Any:
        given.append(x)
        return call(self, x, *others)

    monkeypatch.setattr(kind, "__call__", spy)
    grad_checkpoint(model.layers[0])
    got, again = nn.value_and_grad(model, loss)()
    mx.eval(got, again)
    assert len(given) >= 2 * len(model.layers)  # forward, and once more
    assert all(isinstance(x, mx.array) for x in given)
    assert mx.array_equal(got, want)
    assert_gradients_close(dict(tree_flatten(again)), dict(tree_flatten(slopes)), **sizes(BASE[family]))


@needs_native
@cases
def test_a_layer_has_two_operations_of_sums_and_norms(case: Case) -> None:
    """Counted in the graph of one token: no sum of the residual stream stands alone."""
    model = ours(case.config, bits=4)
    model.set_dtype(mx.bfloat16)
    with use_backend("native"):
        cache = prompt_cache(model)
        mx.eval(model(tokens(1, 9), cache))
        hidden = backbone_of(model)(tokens(1, 1), cache)
    graph = io.StringIO()
    mx.export_to_dot(graph, hidden)
    drawn = graph.getvalue()
    sums = drawn.count("MoefastAddRMSNorm") + drawn.count("MoefastAddLayerNorm")
    assert sums == 2 * len(model.layers)
    assert 'label ="Add"' not in drawn


def test_a_stream_adds_up() -> None:
    x, branch = mx.array([1.0, 2.0]), mx.array([4.0, 8.0])
    assert Residual(x).sum() is x
    assert Residual(x, branch).sum().tolist() == [5.0, 10.0]
    assert Residual(x, branch, 0.5).sum().tolist() == [3.0, 6.0]
