"""The plan of a large step against NumPy's stable sort: every route in its place, every tile its rows."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from metal import emulated, needs_emulator

from moefast.backends.metal.plan import MAX_EXPERTS, Plan, geometry, plan

pytestmark = needs_emulator


@dataclass(frozen=True)
class Case:
    tokens: int
    top_k: int
    experts: int
    kind: str = "uniform"
    height: int = 32
    seed: int = 0

    def indices(self) -> np.ndarray:
        """Experts, [tokens, top_k]."""
        rng, E = np.random.default_rng(self.seed), self.experts
        shape = (self.tokens, self.top_k)
        if self.kind == "hot":  # one expert for nearly all
            return np.where(rng.random(shape) < 0.9, E // 2, rng.integers(0, E, shape))
        if self.kind == "few":  # most experts are empty
            return rng.choice([0, E // 3, E - 1], shape)
        if self.kind == "absent":  # a third of the routes lead nowhere
            return np.where(rng.random(shape) < 0.3, rng.choice([E, E + 1, 2**32 - 1], shape), shape[0] % E)
        if self.kind == "nowhere":
            return np.full(shape, E)
        if self.kind == "all":  # k = E
            return np.argsort(rng.random((self.tokens, E)), axis=1)
        return rng.integers(0, E, shape)


SMALL = (
    *(Case(tokens, 2, 8) for tokens in (0, 1, 3, 4, 7, 33, 127, 128)),  # 1 to 7 routes are constant
    Case(7, 1, 1),
    Case(1, 1, 1),
    Case(129, 4, 8, "hot"),
    Case(65, 4, 60, "few"),
    Case(65, 4, 60, "absent"),
    Case(40, 2, 4, "nowhere"),
    Case(33, 16, 16, "all"),
    Case(127, 8, 256),
    Case(64, 6, 160, height=32),
    Case(64, 8, 384, "hot", height=64),
    Case(100, 8, 128, height=8),
    Case(50, 8, 1024),
    Case(50, 8, 1023, "absent"),  # the key of those that do not exist has a bit more than any expert
)
TWO_LAUNCHES = (
    Case(2049, 2, 8, "hot"),  # the second threadgroup is all but empty
    Case(700, 8, 60, "absent"),
    Case(513, 8, 300, height=32),
)
LARGE = (Case(4096, 8, 256), Case(4096, 10, 512, "hot"), Case(2048, 8, 1024, "few", height=64))


def check(indices: np.ndarray, experts: int, made: Plan) -> None:
    key = np.minimum(indices.reshape(-1), experts)
    order, offsets, tiles = (np.array(array).astype(np.int64) for array in made[:3])
    assert np.array_equal(order, np.argsort(key, kind="stable"))
    starts = np.concatenate([[0], np.cumsum(np.bincount(key, minlength=experts + 1))])
    assert np.array_equal(offsets, starts)
    want = [
        (expert, place, min(made.height, starts[expert + 1] - place))
        for expert in range(experts + 1)
        for place in range(starts[expert], starts[expert + 1], made.height)
    ]
    assert len(want) <= len(tiles)
    assert np.array_equal(tiles[: len(want)], np.array(want).reshape(-1, 3))
    assert not tiles[len(want) :].any()


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_one_launch(case: Case) -> None:
    with emulated(seed=case.tokens) as launches:
        made = plan(mx.array(case.indices().astype(np.uint32)), case.experts, case.height)
    assert len(launches) == (case.tokens > 0)
    check(case.indices(), case.experts, made)


@pytest.mark.parametrize("case", TWO_LAUNCHES, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_two_launches(case: Case, seed: int) -> None:
    with emulated(seed=seed) as launches:
        made = plan(mx.array(case.indices().astype(np.uint32)), case.experts, case.height)
    assert [launch.name for launch in launches] == ["plan_count", "plan_place"]
    check(case.indices(), case.experts, made)
    for launch in launches:
        assert launch.result is not None
        assert launch.result.counters.atomics == 0


@pytest.mark.slow
@pytest.mark.parametrize("case", LARGE, ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_large(case: Case, seed: int) -> None:
    with emulated(seed=seed):
        made = plan(mx.array(case.indices().astype(np.uint32)), case.experts, case.height)
    check(case.indices(), case.experts, made)


@pytest.mark.slow
@pytest.mark.parametrize("case", [Case(1 << 17, 8, 1024), Case(1 << 18, 8, 60, "absent")], ids=str)
def test_a_million_routes(case: Case) -> None:
    with emulated(check=False):
        made = plan(mx.array(case.indices().astype(np.uint32)), case.experts, case.height)
    check(case.indices(), case.experts, made)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_routes(data: st.DataObject) -> None:
    experts, height = data.draw(st.sampled_from((1, 5, 64))), data.draw(st.sampled_from((8, 32)))
    routes = data.draw(st.lists(st.integers(0, experts + 1), min_size=1, max_size=200))
    with emulated(seed=data.draw(st.integers(0, 100))):
        made = plan(mx.array(routes, dtype=mx.uint32), experts, height)
    check(np.array(routes), experts, made)


@pytest.mark.parametrize("dtype", [mx.int8, mx.int32, mx.int64, mx.uint8, mx.uint64], ids=str)
def test_any_integer_dtype(dtype: mx.Dtype) -> None:
    values = [0, 3, 5, 1, 3, 4, 0, 2, 5]
    if dtype not in (mx.uint8, mx.uint64):
        values += [-1, -128]
    if dtype.size == 8:
        values += [1 << 32, (1 << 40) + 2]  # as uint32 they would be experts
    with emulated():
        made = plan(mx.array(values, dtype=dtype), 5, 8)
    key = [value if 0 <= value < 5 else 5 for value in values]
    assert np.array_equal(np.array(made.order), np.argsort(key, kind="stable"))


def test_indices_are_read_twice_and_what_is_made_is_written_once() -> None:
    indices = mx.array(Case(128, 8, 64).indices().astype(np.uint32))
    with emulated() as launches:
        made = plan(indices, 64, 32)
    (launch,) = launches
    assert launch.result is not None
    counters = launch.result.counters
    assert counters.buffers["indices"].loaded == 2 * indices.nbytes
    for name in ("order", "offsets", "tiles"):
        assert counters.buffers[name].stored == getattr(made, name).nbytes, name


@pytest.mark.parametrize("num_experts", [1, 60, 256, 257, 512, 1023, MAX_EXPERTS])
@pytest.mark.parametrize("routes", [1, 4097, 1 << 16, 1 << 20, 1 << 24])
def test_geometry_is_within_the_limits(num_experts: int, routes: int) -> None:
    how = geometry(routes, num_experts, 8)
    assert 8 <= how.simdgroups <= 32
    shared = how.simdgroups * (2 * (num_experts + 1) + 4) + 8 * (num_experts + 2)
    assert shared <= 32768
    assert -(-routes // how.groups) + 32 * how.simdgroups <= 65535  # in a counter of 16 bits
