"""Decoding steps that are made from what was seen of the last two: they are what Python would have made, and
where anything has changed, Python makes them."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn
import numpy as np
import pytest
from marks import needs_native
from mlx.utils import tree_map
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache
from mlx_lm.tuner.lora import LoRALinear
from model_builders import ours, random_weights
from model_cases import FULL, Case
from test_cached_attention import occupy_the_stream

import moefast
from moefast.lm.presets import FAMILIES
from moefast.models import backbone, decoding
from moefast.nn import RMSNorm

pytestmark = [pytest.mark.usefixtures("cpu", "on_native"), needs_native]

DTYPES = [mx.bfloat16, mx.float32]
CASES = [next(case for case in FULL if case.family == family) for family in FAMILIES]
PROMPT = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])
TOKENS = [2, 7, 1, 8, 2, 8, 1, 8, 2, 8, 4, 5]


@pytest.fixture
def on_native() -> Iterator[None]:
    with moefast.use_backend("native"):
        yield


def build(case: Case, dtype: mx.Dtype = mx.bfloat16, bits: int | None = 4) -> Any:
    weights = random_weights(ours(case.config, {}))
    return ours(case.config, weights, bits=bits, dtype=dtype)


@pytest.fixture
def model() -> Any:
    """Of Qwen2-MoE: with a shared expert, and biases."""
    return build(next(case for case in CASES if case.family == "qwen2_moe"))


@contextmanager
def replay(on: bool) -> Iterator[list[bool]]:
    """With it or without; yields of each step that is looked at whether Python was spared."""
    spared: list[bool] = []

    def again(*arguments: Any) -> mx.array | None:
        logits = decoding.again(*arguments)
        if logits is not None:
            spared.append(True)
        return logits

    def watch(*arguments: Any) -> decoding.Step | None:
        step = decoding.watch(*arguments)
        if step is not None:
            spared.append(False)
        return step

    with (
        mock.patch.object(decoding, "settings", replace(decoding.settings, replay=on)),
        mock.patch.object(backbone, "again", again),
        mock.patch.object(backbone, "watch", watch),
    ):
        yield spared


def filled(model: Any, prompt: mx.array = PROMPT) -> list[KVCache]:
    """Caches with a prompt in them."""
    cache: list[KVCache] = make_prompt_cache(model)
    mx.eval(model(prompt, cache=cache))
    return cache


def step(model: Any, cache: list[Any], token: int = 7) -> mx.array:
    logits: mx.array = model(mx.array([[token]]), cache=cache)
    return logits


def bits_of(array: mx.array) -> Any:
    """For comparing exactly, NaN and all."""
    return np.asarray(mx.contiguous(array).view(mx.uint8))


def assert_same(a: list[mx.array], b: list[mx.array]) -> None:
    for x, y in zip(a, b, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert np.array_equal(bits_of(x), bits_of(y))


def rows(cache: list[KVCache]) -> list[mx.array]:
    """What the caches hold."""
    return [a[:, :, : c.offset] for c in cache for a in (c.keys, c.values)]


Evaluate = Callable[[mx.array], None]
EVALUATIONS: dict[str, Evaluate] = {
    "one by one": lambda y: mx.eval(y),
    "as mlx-lm": lambda y: mx.async_eval(y),
    "all at the end": lambda y: None,
}


def decode(model: Any, tokens: list[int], evaluate: Evaluate, prompt: mx.array = PROMPT) -> list[mx.array]:
    """Logits of every step, and what the caches hold in the end."""
    cache = filled(model, prompt)
    logits = []
    for token in tokens:
        logits.append(step(model, cache, token))
        evaluate(logits[-1])
    return logits + rows(cache)


@pytest.mark.parametrize("evaluate", EVALUATIONS.values(), ids=EVALUATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.family)
def test_equals_the_model(case: Case, dtype: mx.Dtype, evaluate: Evaluate) -> None:
    model = build(case, dtype)
    with replay(False) as spared:
        want = decode(model, TOKENS, evaluate)
    assert not any(spared)
    with replay(True) as spared:
        got = decode(model, TOKENS, evaluate)
    assert spared == [False, False] + [True] * (len(TOKENS) - 2)
    assert_same(got, want)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.family)
def test_unquantized(case: Case) -> None:
    model = build(case, mx.float32, bits=None)
    with replay(False):
        want = decode(model, TOKENS, mx.eval)
    with replay(True) as spared:
        got = decode(model, TOKENS, mx.eval)
    assert sum(spared) == len(TOKENS) - 2
    assert_same(got, want)


def test_caches_grow(model: Any) -> None:
    prompt = mx.arange(250)[None] % 100  # caches grow by 256 rows
    with replay(False):
        want = decode(model, TOKENS, mx.async_eval, prompt)
    with replay(True) as spared:
        got = decode(model, TOKENS, mx.async_eval, prompt)
    # Rows 250 to 255; the step that makes room is none to be watched; then two are watched again.
    assert spared == [False, False, True, True, True, True, False, False, True, True, True]
    assert_same(got, want)


def test_several_sequences_at_once(model: Any) -> None:
    prompt = mx.array([[3, 1, 4], [1, 5, 9], [2, 6, 5]])

    def logits() -> list[mx.array]:
        cache = filled(model, prompt)
        return [model(mx.array([[i], [i + 1], [i + 2]]), cache=cache) for i in range(5)]

    with replay(False):
        want = logits()
    with replay(True) as spared:
        got = logits()
    assert spared == [False, False, True, True, True]
    assert_same(got, want)


def test_no_sequence_at_all(model: Any) -> None:
    def logits() -> list[mx.array]:
        cache = filled(model, mx.zeros((0, 3), mx.int32))
        return [model(mx.zeros((0, 1), mx.int32), cache=cache) for _ in range(5)]

    with replay(True):
        found = logits()
        mx.eval(found)
    with replay(False):
        assert_same(found, logits())


@pytest.mark.parametrize("viewed", [False, True], ids=["", "a view"])
def test_logits_and_caches_are_the_callers(model: Any, viewed: bool) -> None:
    """What a step returned does not change when others are made, and rows that somebody holds stay."""
    if viewed:  # of what the head has made

        class Viewed(type(model)):  # type: ignore[misc]
            def head(self, h: mx.array) -> mx.array:
                return mx.unflatten(super().head(h), -1, (2, -1))

        model.__class__ = Viewed
    with replay(True) as spared:
        cache = filled(model)
        for _ in range(3):
            mx.eval(step(model, cache))
        first = step(model, cache)
        keys = cache[0].keys
        pending = step(model, cache)  # what steps have in common stays while one is under way
        mx.eval(first)
        values, rows = bits_of(first).copy(), bits_of(keys).copy()
        for token in TOKENS:
            following = step(model, cache, token)
            mx.eval(pending)
            pending = following
        mx.eval(pending)
    assert all(spared[2:])
    assert np.array_equal(values, bits_of(first))
    assert np.array_equal(rows, bits_of(keys))


def test_caches_stay_where_they_are(model: Any) -> None:
    def addresses() -> list[int]:
        return [np.asarray(a.view(mx.uint8)).ctypes.data for c in cache for a in (c.keys, c.values)]

    with replay(True) as spared:
        cache = filled(model)
        mx.eval([step(model, cache) for _ in range(2)])
        before = addresses()
        for token in TOKENS[:4]:
            mx.synchronize()  # what MLX holds of the steps before is let go
            occupy_the_stream()
            first = step(model, cache, token)
            mx.async_eval(first)
            # As mlx-lm does it: the next is asked for before the first has run.
            second = step(model, cache, token)
            mx.async_eval(second)
            mx.eval(first, second)
            assert addresses() == before
    assert all(spared[2:])


# -- what Python has to see --------------------------------------------------------------------------------


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


# -- keeping house -----------------------------------------------------------------------------------------


def test_no_weight_is_held(model: Any) -> None:
    with replay(True) as spared:
        cache = filled(model)
        mx.eval([step(model, cache) for _ in range(4)])
        assert spared[-1]
        mx.synchronize()
        kept = model._decoding
        size = sum(a.nbytes for _, a in mlx.utils.tree_flatten(model.parameters()))
        before = mx.get_active_memory()
        del cache
        model.update(tree_map(lambda a: mx.zeros(1, a.dtype), model.parameters()))
        mx.eval(model.parameters())
        gc.collect()
        assert kept is model._decoding
        assert before - mx.get_active_memory() > 0.9 * size


def test_no_model_is_kept_alive() -> None:
    model = build(CASES[0])
    layer = model.layers[0]
    layer.__dict__["owner"] = [model]  # a setting that leads back to it
    with replay(True) as spared:
        mx.eval([step(model, cache) for cache in [filled(model)] for _ in range(4)])
    assert spared[-1]
    gone = weakref.ref(layer)
    del model, layer
    gc.collect()
    assert gone() is None


def test_memory_does_not_grow(model: Any) -> None:
    cache = filled(model)
    with replay(True) as spared:
        for turn in range(4):
            for _ in range(50):
                mx.eval(step(model, cache))
            mx.synchronize()
            if turn == 0:
                before = mx.get_active_memory()
            for c in cache:
                c.trim(50)
    assert spared.count(False) == 2
    assert mx.get_active_memory() <= before + 4096


def test_copies_begin_anew(model: Any) -> None:
    with replay(True) as spared:
        cache = filled(model)
        mx.eval([step(model, cache) for _ in range(3)])
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model._decoding))):
            assert other is None or other._decoding is None
        twin = copy.deepcopy(model)
        del spared[:]
        assert_same([step(twin, filled(twin))], [step(model, filled(model))])
    assert not spared[0]


def test_a_wrong_token_is_an_error_and_no_more(model: Any) -> None:
    with replay(True):
        cache = filled(model)
        mx.eval([step(model, cache) for _ in range(3)])
        spoiled = copy.deepcopy(cache)
        with pytest.raises(ValueError, match=r"\[embed\] indices must be in .* got 1000000"):
            mx.eval(step(model, spoiled, 1000000))
        got = step(model, copy.deepcopy(cache))
    with replay(False):
        assert_same([got], [step(model, cache)])


@pytest.mark.parametrize("family", ["granitemoe", "qwen2_moe"])  # with operations of MLX's own, and without
def test_threads_of_their_own(family: str) -> None:
    model = build(next(case for case in CASES if case.family == family))
    with replay(False):
        want = decode(model, TOKENS, mx.eval)
    found: dict[int, list[Any]] = {}

    def work(which: int) -> None:
        with moefast.use_backend("native"), mx.stream(mx.new_stream(mx.cpu)):
            for _ in range(5):
                found[which] = [bits_of(a) for a in decode(model, TOKENS, mx.async_eval)]

    with replay(True):
        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(found) == [0, 1, 2]
    for got in found.values():
        assert all(np.array_equal(x, bits_of(y)) for x, y in zip(got, want, strict=True))
