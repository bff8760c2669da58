"""The CPU kernels among threads and processes: the same bits, whatever happens around them."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from factories import Floats, MakeExperts, MakeProjection
from formats import BY_NAME, DTYPES
from numpy_kernels import as_numpy, held, isas, kernels, run_experts

from moefast import QuantSpec

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)

HIDDEN = 128


@isas
@dtypes
@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_threads_change_no_bit(
    isa: str,
    dtype: mx.Dtype,
    tokens: int,
    floats: Floats,
    expert_weights: MakeExperts,
    projection: MakeProjection,
    rng: np.random.Generator,
) -> None:
    weights = expert_weights(5, HIDDEN, 192, **BY_NAME["affine4-g64"].of(dtype))
    head = held(projection(600, HIDDEN, **BY_NAME["affine6-g32"].of(dtype)))
    x, mix = floats(tokens, HIDDEN, dtype=dtype), mx.softmax(floats(tokens, 2), axis=-1)
    indices = mx.array(rng.integers(0, 5, (tokens, 2)).astype(np.int32))
    found = []
    for threads in (1, 2, 3, 5):
        engine = kernels.Engine(threads, isa)
        assert (engine.threads, engine.isa) == (threads, isa)
        apart, combined = run_experts(engine, x, weights, indices, mix)
        found.append([as_numpy(apart), as_numpy(combined), engine.matmul(as_numpy(x), head)])
    for others in found[1:]:
        for mine, first in zip(others, found[0], strict=True):
            np.testing.assert_array_equal(mine, first)


def test_one_engine_serves_many_threads(floats: Floats, projection: MakeProjection) -> None:
    engine, weight = kernels.Engine(2), held(projection(96, 64, quant=QuantSpec(group_size=32)))
    inputs = [as_numpy(floats(tokens, 64)) for tokens in (1, 9, 40, 3)] * 20
    want = [engine.matmul(x, weight) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for got, expected in zip(pool.map(lambda x: engine.matmul(x, weight), inputs), want, strict=True):
            np.testing.assert_array_equal(got, expected)


def _in_child(engine: Any, x: Any, weight: Any, answers: Any) -> None:
    answers.put(engine.matmul(x, weight))


def test_an_engine_survives_a_fork(floats: Floats, projection: MakeProjection) -> None:
    """Threads do not: the child makes its own."""
    engine, weight = kernels.Engine(3), held(projection(512, 256))
    x = as_numpy(floats(40, 256))
    want = engine.matmul(x, weight)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=_in_child, args=(engine, x, weight, answers))
    child.start()
    try:
        np.testing.assert_array_equal(answers.get(timeout=60), want)
    finally:
        child.join(10)
        child.kill()
    np.testing.assert_array_equal(engine.matmul(x, weight), want)
