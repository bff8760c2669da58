"""Where anything has changed that Python would look at, it makes the decoding step, and not the recording."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest
from decoding_steps import (
    CASES,
    PROMPT,
    TOKENS,
    assert_same,
    build,
    filled,
    replay,
    rows,
    step,
)
from marks import needs_native
from mlx.utils import tree_map
from mlx_lm.models.cache import RotatingKVCache
from mlx_lm.tuner.lora import LoRALinear

import moefast
from moefast.nn import RMSNorm

pytestmark = [pytest.mark.usefixtures("cpu", "on_native"), needs_native]


@pytest.fixture
def model() -> Any:
    """Of Qwen2-MoE: with a shared expert, and biases."""
    return build(next(case for case in CASES if case.family == "qwen2_moe"))


def new_scales(model: Any) -> None:
    layer = model.layers[0].mlp.switch_mlp.up_proj
    layer.scales = layer.scales * 2


def scales_in_place(model: Any) -> None:
    layer = model.layers[1].self_attn.q_proj
    layer.scales[:] = layer.scales * 2


def other_dtype(model: Any) -> None:
    model.update(tree_map(lambda a: a if a.dtype == mx.uint32 else a.astype(mx.float32), model.parameters()))


def other_settings(model: Any) -> None:
    model.layers[0].self_attn.scale *= 2


def other_eps(model: Any) -> None:
    model.model.norm.eps = 0.5


def adapter(model: Any) -> None:
    attention = model.layers[1].self_attn
    attention.o_proj = layer = LoRALinear.from_base(attention.o_proj, r=4)
    layer.lora_a, layer.lora_b = mx.ones_like(layer.lora_a), mx.ones_like(layer.lora_b)


def other_module(model: Any) -> None:
    norm = RMSNorm(model.model.norm.weight.size, eps=1e-6)
    norm.weight = model.model.norm.weight * 2
    model.model.norm = norm


class Doubled(RMSNorm):
    """A class of somebody else's."""

    def __call__(self, *arguments: Any) -> Any:
        y = super().__call__(*arguments)
        return (y[0], 2 * y[1]) if isinstance(y, tuple) else 2 * y


def other_class(model: Any) -> None:
    model.layers[1].input_layernorm.__class__ = Doubled


def fewer_layers(model: Any) -> None:
    model.model.layers = [*model.model.layers[:-1], model.model.layers[0]]


CHANGES = [
    new_scales,
    scales_in_place,
    other_settings,
    other_eps,
    adapter,
    other_module,
    other_class,
    fewer_layers,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_noticed(model: Any, change: Callable[[Any], None]) -> None:
    with replay(True) as spared:
        cache = filled(model)
        mx.eval([step(model, cache) for _ in range(4)])
        assert spared[-1]
        change(model)
        got = [step(model, cache, token) for token in TOKENS]
        mx.eval(got)
    fresh = build(next(case for case in CASES if case.family == "qwen2_moe"))
    with replay(False):
        cache = filled(fresh)
        mx.eval([step(fresh, cache) for _ in range(4)])
        change(fresh)
        want = [step(fresh, cache, token) for token in TOKENS]
    assert_same(got, want)


@pytest.mark.parametrize("pending", [False, True], ids=["", "while a step runs"])
def test_other_weights_are_taken_as_they_are(model: Any, pending: bool) -> None:
    with replay(True) as spared:
        cache = filled(model)
        mx.eval([step(model, cache) for _ in range(4)])
        running = step(model, cache)
        if not pending:
            mx.eval(running)
        new_scales(model)
        mx.eval(model.parameters())
        got = [step(model, cache, token) for token in TOKENS]
        mx.eval(running, got)
    assert all(spared[2:])
    fresh = build(next(case for case in CASES if case.family == "qwen2_moe"))
    with replay(False):
        cache = filled(fresh)
        mx.eval([step(fresh, cache) for _ in range(5)])
        new_scales(fresh)
        assert_same(got, [step(fresh, cache, token) for token in TOKENS])


def test_another_dtype_is_noticed(model: Any) -> None:
    with replay(True) as spared:
        cache = filled(model)
        mx.eval([step(model, cache) for _ in range(4)])
        other_dtype(model)
        assert step(model, filled(model)).dtype == mx.float32
    assert spared == [False, False, True, True, False]


def test_a_patched_class_is_noticed(model: Any) -> None:
    with replay(True) as spared:
        cache = filled(model)
        mx.eval([step(model, cache) for _ in range(4)])
        calls = []
        call = RMSNorm.__call__

        def spy(self: RMSNorm, *arguments: Any) -> Any:
            calls.append(self)
            return call(self, *arguments)

        with mock.patch.object(RMSNorm, "__call__", spy):
            mx.eval(step(model, cache))
        assert calls
        assert not spared[-1]


def test_the_reference_is_asked_for(model: Any) -> None:
    with replay(True) as spared:
        cache = filled(model)
        mx.eval([step(model, cache) for _ in range(4)])
        with moefast.use_backend("reference"):
            mx.eval([step(model, cache) for _ in range(4)])
        mx.eval([step(model, cache) for _ in range(4)])
    assert spared == [*[False, False, True, True], *[False] * 4, *[False, False, True, True]]


def test_training_is_no_step(model: Any) -> None:
    with replay(True) as spared:
        cache = filled(model)
        mx.eval([step(model, cache) for _ in range(3)])
        model.train()
        mx.eval(step(model, cache))
        model.eval()
        mx.eval(step(model, cache))
    assert spared == [False, False, True, True]


def test_other_caches(model: Any) -> None:
    with replay(True) as spared:
        cache = filled(model)
        mx.eval([step(model, cache) for _ in range(4)])
        count = len(spared)
        rotating = [RotatingKVCache(max_size=64) for _ in model.layers]
        mx.eval(model(PROMPT, cache=rotating), step(model, rotating))
        mx.eval(model(mx.array([[1]])))
        uneven = filled(model)
        uneven[0].trim(1)
        mx.eval(step(model, uneven))
    assert len(spared) == count


def test_trimmed_caches(model: Any) -> None:
    def logits() -> list[mx.array]:
        cache = filled(model)
        found = [step(model, cache, token) for token in TOKENS]
        for c in cache:
            c.trim(5)
        return found + [step(model, cache, token) for token in TOKENS] + rows(cache)

    with replay(False):
        want = logits()
    with replay(True) as spared:
        got = logits()
    assert spared.count(False) == 2
    assert_same(got, want)


def test_transformations_pass_through_python(model: Any) -> None:
    with replay(True) as spared:
        cache = filled(model)
        mx.eval([step(model, cache) for _ in range(3)])

        def total(weight: mx.array) -> mx.array:
            model.model.norm.weight = weight
            return step(model, copy.deepcopy(cache)).sum()

        weight = model.model.norm.weight
        slope = mx.grad(total)(weight)
        model.model.norm.weight = weight
        with moefast.use_backend("reference"):
            want = mx.grad(total)(weight)
        model.model.norm.weight = weight
    assert not any(spared[3:])
    assert np.allclose(
        np.asarray(slope.astype(mx.float32)), np.asarray(want.astype(mx.float32)), rtol=0.1, atol=0.1
    )
