"""Models that decode, with the recording of their steps and without it, for the tests of that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache, make_prompt_cache
from model_builders import ours, random_weights
from model_cases import FULL, Case

from moefast.lm.presets import FAMILIES
from moefast.models import backbone, decoding

DTYPES = [mx.bfloat16, mx.float32]
CASES = [next(case for case in FULL if case.family == family) for family in FAMILIES]
PROMPT = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])
TOKENS = [2, 7, 1, 8, 2, 8, 1, 8, 2, 8, 4, 5]


def build(case: Case, dtype: mx.Dtype = mx.bfloat16, bits: int | None = 4) -> Any:
    weights = random_weights(ours(case.config, {}))
    return ours(case.config, weights, bits=bits, dtype=dtype)


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
