"""The combine of a large step: MLX's bits where it sums, and every part of a block's end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx_reductions
import numpy as np
import oracle
import pytest
from factories import Floats
from metal import emulated, needs_emulator
from mlx_kernels import TYPES, bits

from moefast.backends.metal.combine import combine
from moefast.backends.reference.experts import combine as reference_combine
from moefast.backends.reference.experts import identity_share
from moefast.routing import Routing
from moefast.testing import assert_close, float64, unit_roundoff

pytestmark = needs_emulator

KINDS = {dtype: kind for kind, dtype in TYPES.items()}


@dataclass(frozen=True)
class Case:
    tokens: int
    top_k: int
    hidden: int
    dtype: mx.Dtype = mx.bfloat16
    weights: mx.Dtype = mx.float32
    cast: mx.Dtype | None = None

    def arrays(self, floats: Floats) -> tuple[mx.array, mx.array]:
        y = floats(self.tokens, self.top_k, self.hidden, dtype=self.dtype)
        return y, mx.abs(floats(self.tokens, self.top_k, dtype=self.weights))


CASES = (
    Case(1, 1, 8),
    Case(1, 1, 5),  # less than 8 of everything: constant
    Case(3, 2, 40),
    Case(7, 4, 136, mx.float16),
    Case(7, 4, 33, mx.float32),  # columns are left over
    Case(2, 8, 64, weights=mx.bfloat16),
    Case(2, 8, 64, mx.float16, mx.float16),
    Case(2, 9, 64, weights=mx.bfloat16),  # from here on eight sums
    Case(2, 22, 48, mx.float16, mx.float16),
    Case(2, 31, 48),
    Case(5, 40, 32, weights=mx.bfloat16),
    Case(3, 4, 96, mx.float16, mx.bfloat16),  # promoted to neither
    Case(3, 4, 96, mx.bfloat16, mx.bfloat16, mx.float32),
    Case(3, 4, 96, mx.bfloat16, mx.float32, mx.bfloat16),
    Case(2, 4, 1100),  # two threadgroups
)


def products(case: Case, y: mx.array, weights: mx.array) -> mx.array:
    """As the reference multiplies."""
    return y * (weights if case.cast is None else weights.astype(case.cast))[..., None]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sum(case: Case, floats: Floats) -> None:
    y, weights = case.arrays(floats)
    with emulated(seed=case.top_k) as launches:
        got = combine(y, weights, case.cast)
    assert len(launches) == 1
    assert got.dtype == case.dtype
    assert_close(got, _truth(case, y, weights), "experts", top_k=case.top_k)
    if case.top_k < 32:
        assert np.array_equal(bits(got), _mlx_bits(case, y, weights))


def _truth(case: Case, y: mx.array, weights: mx.array) -> np.ndarray:
    cast = weights if case.cast is None else weights.astype(case.cast)
    return (float64(y) * float64(cast)[..., None]).sum(axis=1)


def _mlx_bits(case: Case, y: mx.array, weights: mx.array) -> np.ndarray:
    """What MLX's own reduction, run here, makes of the products, token by token."""
    rows = []
    for terms in products(case, y, weights):
        run = mlx_reductions.col_reduce_small(KINDS[terms.dtype], "Sum", case.top_k, case.hidden)
        run.buffers["in"][:] = bits(terms)
        _, total = run.launch()
        total = mx.array(total)
        rows.append((total.view(mx.bfloat16) if terms.dtype == mx.bfloat16 else total).astype(case.dtype))
    return bits(mx.stack(rows))


@pytest.mark.parametrize(
    ("dtype", "weights"),
    [
        (mx.float32, mx.float32),
        (mx.float16, mx.float32),
        (mx.bfloat16, mx.bfloat16),
        (mx.float32, mx.bfloat16),
    ],
    ids=str,
)
def test_everything_else(
    dtype: mx.Dtype, weights: mx.Dtype, floats: Floats, rng: np.random.Generator
) -> None:
    tokens, top_k, hidden, experts = 9, 4, 50, 6
    case = Case(tokens, top_k, hidden, dtype, weights)
    y, w = case.arrays(floats)
    x, shared = (floats(tokens, hidden, dtype=dtype) for _ in range(2))
    gate = floats(tokens, 1, dtype=dtype)
    indices = mx.array(rng.integers(0, experts + 3, (tokens, top_k)).astype(np.uint32))
    truth = _truth(case, y, w)
    identity = float64(x) * np.where(np.array(indices) >= experts, float64(w), 0).sum(axis=1, keepdims=True)
    gated = oracle.sigmoid(float64(gate)) * float64(shared)

    def check(want: np.ndarray, **options: Any) -> None:
        with emulated():
            got = combine(y, w, **options)
        assert got.dtype == dtype
        assert_close(got, want, "moe", top_k=top_k, dtype=max(dtype, weights, key=unit_roundoff))

    check(
        (truth + identity) * 1.7 + gated,
        identity=(x, indices, experts),
        scale=1.7,
        shared=shared,
        shared_gate=gate,
    )
    if dtype == mx.float32:  # one at a time
        check(truth + identity, identity=(x, indices, experts))
        check(truth * 1.7, scale=1.7)
        check(truth + float64(shared), shared=shared)
        check(truth + gated, shared=shared, shared_gate=gate)


@pytest.mark.parametrize("dtype", TYPES.values(), ids=str)
def test_rounds_where_the_reference_does(dtype: mx.Dtype, floats: Floats, rng: np.random.Generator) -> None:
    """Up to 8 experts MLX's CPU adds in the same order."""
    tokens, top_k, hidden, experts = 5, 2, 64, 6
    y, w = Case(tokens, top_k, hidden, dtype).arrays(floats)
    x, shared = (floats(tokens, hidden, dtype=dtype) for _ in range(2))
    indices = mx.array(rng.integers(0, experts + 3, (tokens, top_k)).astype(np.uint32))
    want = reference_combine(y, w, None)
    want = want + identity_share(x, Routing(indices, w), experts).astype(dtype)
    want = want * 1.7 + shared
    with emulated():
        got = combine(y, w, identity=(x, indices, experts), scale=1.7, shared=shared)
    assert np.array_equal(bits(got), bits(want))


def test_no_tokens() -> None:
    with emulated() as launches:
        got = combine(mx.zeros((0, 4, 64), mx.float16), mx.zeros((0, 4)))
    assert (got.shape, got.dtype, launches) == ((0, 64), mx.float16, [])


def test_rows_are_read_once(floats: Floats) -> None:
    y, weights = Case(16, 8, 512).arrays(floats)
    with emulated() as launches:
        got = combine(y, weights)
    (launch,) = launches
    assert launch.result is not None
    counters = launch.result.counters
    assert counters.buffers["y"].loaded == y.nbytes
    assert counters.buffers["out"].stored == got.nbytes
    assert (counters.atomics, counters.barriers) == (0, 0)
