"""Decoding steps that are made from what was seen of the last two: they are what Python would have made, and
leave nothing behind. That they notice what has changed: test_decoding_changes.py."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from typing import Any

import mlx.core as mx
import mlx.nn
import numpy as np
import pytest
from decoding_steps import (
    CASES,
    DTYPES,
    EVALUATIONS,
    TOKENS,
    Evaluate,
    assert_same,
    bits_of,
    build,
    decode,
    filled,
    replay,
    step,
)
from marks import needs_native
from mlx.utils import tree_map
from model_cases import Case
from test_cached_attention import occupy_the_stream

import moefast

pytestmark = [pytest.mark.usefixtures("cpu", "on_native"), needs_native]


@pytest.fixture
def model() -> Any:
    """Of Qwen2-MoE: with a shared expert, and biases."""
    return build(next(case for case in CASES if case.family == "qwen2_moe"))


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
