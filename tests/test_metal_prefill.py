"""Experts of many tokens, against the float64 oracle: checked, with threads in shuffled orders."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import oracle
import pytest
from factories import Floats, MakeProjection
from formats import ACTIVATIONS, BY_NAME, DTYPES
from metal import emulated, needs_emulator

from moefast import Activation, ExpertWeights, Projection
from moefast.backends.metal import prefill
from moefast.backends.metal.launch import Launch
from moefast.testing import Float64, assert_close, float64

pytestmark = needs_emulator

PACKED = tuple(name for name, format_ in BY_NAME.items() if format_.quant is not None and not format_.dtype)


@dataclass(frozen=True)
class Case:
    """``formats``: of gate, up and down; or of all."""

    tokens: int
    top_k: int = 2
    experts: int = 8
    hidden: int = 64
    width: int = 96
    formats: str = "plain"
    dtype: mx.Dtype = mx.float32
    kind: str = "uniform"
    height: int | None = None
    activation: Activation = Activation()  # noqa: RUF009 (frozen)
    bias: bool = False

    def indices(self) -> np.ndarray:
        """Experts, [tokens, top_k]."""
        rng, E = np.random.default_rng(self.tokens), self.experts
        shape = (self.tokens, self.top_k)
        if self.kind == "hot":  # one expert for nearly all
            return np.where(rng.random(shape) < 0.9, E // 2, rng.integers(0, E, shape))
        if self.kind == "few":  # most experts are empty
            return rng.choice([0, E // 3, E - 1], shape)
        if self.kind == "absent":  # a third of the routes lead nowhere
            return np.where(rng.random(shape) < 0.3, rng.choice([E, E + 1, 2**31], shape), rng.integers(E))
        if self.kind == "all":  # k = E
            return np.argsort(rng.random((self.tokens, E)), axis=1)
        return rng.integers(0, E, shape)


@dataclass(frozen=True)
class Problem:
    x: mx.array
    weights: ExpertWeights
    indices: mx.array
    truth: Float64


def problem(case: Case, floats: Floats, projection: MakeProjection) -> Problem:
    names = case.formats.split()

    def stack(index: int, *shape: int) -> Projection:
        format_ = BY_NAME[names[min(index, len(names) - 1)]]
        return projection(case.experts, *shape, bias=case.bias, **format_.of(case.dtype))

    activation = case.activation
    weights = ExpertWeights(
        gate=stack(0, case.width, case.hidden) if activation.gated else None,
        up=stack(1, case.width, case.hidden),
        down=stack(2, case.hidden, case.width),
        activation=activation,
    )
    x = floats(case.tokens, case.hidden, dtype=case.dtype)
    indices = case.indices()
    truth = oracle.switch_glu(x, weights, mx.array(np.minimum(indices, case.experts - 1)))
    truth[indices >= case.experts] = 0
    return Problem(x, weights, mx.array(indices.astype(np.uint32)), truth)


def check(case: Case, floats: Floats, projection: MakeProjection, seed: int = 0) -> list[Launch]:
    p = problem(case, floats, projection)
    with emulated(seed=seed) as launches:
        got = prefill.switch_glu(p.x, p.weights, p.indices, height=case.height)
    assert got.dtype == case.dtype
    assert_close(got, p.truth, "switch_glu", reductions=(case.hidden, case.width))
    missing = np.array(p.indices) >= case.experts
    assert not float64(got)[missing].any()
    return launches


SHAPES = (
    *(Case(tokens) for tokens in (0, 1, 3, 7, 33, 127, 128)),
    Case(1, top_k=1, experts=1, hidden=2, width=3),  # every buffer is constant
    Case(1, top_k=1, experts=1, hidden=7, width=1),
    Case(2, top_k=4, experts=4, hidden=8, width=8),  # 8 routes: device
    Case(40, hidden=40, width=72),
    Case(40, hidden=136, width=37, dtype=mx.bfloat16),
    Case(40, hidden=41, width=64, formats="plain plain affine4-g64"),  # odd rows of packed weights
    Case(40, hidden=96, width=160, formats="affine4-g32", dtype=mx.float16),
    Case(33, hidden=48, width=80, formats="nvfp4"),  # half a step of 32 is left over
    Case(70, kind="hot"),
    Case(70, experts=60, kind="few", height=64),
    Case(40, kind="absent", bias=True),
    Case(9, top_k=8, kind="all"),
    Case(20, top_k=8, experts=160, hidden=32, width=32),
    Case(65, kind="hot", formats="affine4-g32", height=32),
    Case(65, kind="hot", formats="affine4-g32", height=64),
)
# Three formats at a time: each projection has its own.
FORMATS = tuple(
    Case(20, hidden=128, width=128, experts=3, formats=" ".join(PACKED[i : i + 3]), dtype=DTYPES[i // 3 % 3])
    for i in range(0, len(PACKED), 3)
)
MIXED = (
    Case(20, hidden=128, width=64, formats="plain mxfp4 affine8-g32", dtype=mx.bfloat16, bias=True),
    Case(20, hidden=64, width=128, formats="nvfp4-scaled", dtype=mx.float16, height=32, bias=True),
)


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_shapes(case: Case, floats: Floats, projection: MakeProjection) -> None:
    launches = check(case, floats, projection, seed=case.tokens)
    assert len(launches) == (3 if case.tokens else 0)


@pytest.mark.parametrize("case", FORMATS + MIXED, ids=str)
def test_formats(case: Case, floats: Floats, projection: MakeProjection) -> None:
    check(case, floats, projection)


@pytest.mark.parametrize("activation", ACTIVATIONS[1:], ids=str)
def test_activations(activation: Activation, floats: Floats, projection: MakeProjection) -> None:
    case = Case(9, hidden=32, width=32, formats="affine4-g32", activation=activation, dtype=mx.bfloat16)
    check(case, floats, projection)


def test_bits_of_a_route_depend_on_nothing_else(floats: Floats, projection: MakeProjection) -> None:
    """Not on the tile's height, on other routes or on the order of threads."""
    p = problem(Case(65, kind="hot", formats="affine4-g32"), floats, projection)

    def run(rows: slice, height: int, seed: int) -> np.ndarray:
        with emulated(seed=seed):
            made = prefill.switch_glu(p.x[rows], p.weights, p.indices[rows], height=height)
        return np.array(made.view(mx.uint32))

    want = run(slice(None), 16, 0)
    for height, seed in ((32, 1), (64, 2)):
        assert np.array_equal(run(slice(None), height, seed), want)
    assert np.array_equal(run(slice(30, 37), 16, 3), want[30:37])


LARGE = (
    *(Case(513, top_k=8, formats=f, dtype=d) for f in ("plain", "affine4-g32") for d in DTYPES),
    Case(513, top_k=4, hidden=256, width=192, formats="affine4-g64", dtype=mx.bfloat16, kind="hot"),
    Case(600, top_k=8, experts=256, hidden=64, width=64, formats="affine8-g64", dtype=mx.float16),
    Case(513, top_k=8, experts=384, hidden=64, width=32, formats="mxfp4", dtype=mx.bfloat16),
    Case(128, top_k=6, experts=160, hidden=160, width=96, formats="affine4-g32", dtype=mx.bfloat16),
    Case(127, top_k=16, experts=16, kind="all", hidden=40, width=136, dtype=mx.float16),
    Case(513, top_k=4, kind="absent", bias=True, formats="affine3-g32", dtype=mx.bfloat16),
    Case(40, experts=2, hidden=2048, width=64, formats="affine4-g64", dtype=mx.bfloat16),  # long rows
    Case(40, experts=2, hidden=64, width=1408, formats="affine4-g64", dtype=mx.float16),
)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large(case: Case, seed: int, floats: Floats, projection: MakeProjection) -> None:
    check(case, floats, projection, seed)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["plain", *PACKED])
def test_every_format(name: str, dtype: mx.Dtype, floats: Floats, projection: MakeProjection) -> None:
    for height, bias in ((32, True), (32, False), (64, True)):
        case = Case(40, experts=3, hidden=128, width=256, formats=name, dtype=dtype, height=height, bias=bias)
        check(case, floats, projection, seed=height)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_every_activation(
    activation: Activation, dtype: mx.Dtype, floats: Floats, projection: MakeProjection
) -> None:
    for bias in (False, True):
        case = Case(33, hidden=72, width=40, activation=activation, dtype=dtype, bias=bias, height=32)
        check(case, floats, projection)


# -- combined ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        Case(0),
        Case(7, dtype=mx.bfloat16, formats="affine4-g32"),
        Case(33, top_k=4, kind="absent", dtype=mx.float16),
    ],
    ids=str,
)
def test_combined(case: Case, floats: Floats, projection: MakeProjection) -> None:
    p = problem(case, floats, projection)
    route_weights = mx.abs(floats(case.tokens, case.top_k))
    with emulated() as launches:
        got = prefill.experts(p.x, p.weights, p.indices, route_weights)
    assert len(launches) == (4 if case.tokens else 0)
    assert (got.shape, got.dtype) == (p.x.shape, case.dtype)
    want = (p.truth * float64(route_weights)[..., None]).sum(axis=1)
    assert_close(got, want, "experts", reductions=(case.hidden, case.width), top_k=case.top_k)


def test_a_whole_block_ends(floats: Floats, projection: MakeProjection) -> None:
    case = Case(11, top_k=4, kind="absent")
    p = problem(case, floats, projection)
    route_weights = mx.abs(floats(case.tokens, case.top_k))
    shared, gate = floats(case.tokens, case.hidden), floats(case.tokens, 1)
    indices = np.array(p.indices).astype(np.int64)
    indices[3, 1] = -1  # leads nowhere, not to an expert that returns its input
    p.truth[3, 1] = 0
    with emulated():
        got = prefill.experts(
            p.x,
            p.weights,
            mx.array(indices),
            route_weights,
            identity=True,
            scale=2.5,
            shared=shared,
            shared_gate=gate,
        )
    rows = np.where((indices >= case.experts)[..., None], float64(p.x)[:, None, :], p.truth)
    want = (rows * float64(route_weights)[..., None]).sum(axis=1) * 2.5
    want = want + oracle.sigmoid(float64(gate)) * float64(shared)
    assert_close(got, want, "moe", reductions=(case.hidden, case.width), top_k=case.top_k)


# -- economy -----------------------------------------------------------------------------------------------


def multiplies(launch: Launch) -> int:
    assert launch.result is not None
    return launch.result.counters.multiplies


@pytest.mark.parametrize(
    "case",
    [
        Case(150, hidden=64, width=96, kind="hot", formats="affine4-g32", dtype=mx.bfloat16),
        Case(30, hidden=64, width=96, formats="affine4-g32", dtype=mx.bfloat16),  # 3 to 13 rows each
        Case(70, hidden=96, width=128, kind="few", formats="mxfp8 affine3-g32 nvfp4-scaled", height=64),
    ],
    ids=str,
)
def test_weights_are_read_once_for_32_rows(case: Case, floats: Floats, projection: MakeProjection) -> None:
    """However uneven the experts' rows are; and rows that are not there are not multiplied."""
    p = problem(case, floats, projection)
    mix = mx.abs(floats(case.tokens, case.top_k))
    with emulated() as launches:
        prefill.experts(p.x, p.weights, p.indices, mix, height=case.height)
    plan, gate_up, down, combine = launches
    assert plan.name == "plan"
    rows = np.bincount(np.array(p.indices).reshape(-1), minlength=case.experts)
    tiles = -(-rows // (case.height or 32))
    assert (tiles <= -(-rows // 32)).all()
    # Of 8x8 matrices, those that have rows; all columns in steps of 32, all results in tiles of 64.
    squares = sum(-(-count // 8) for count in rows)
    assert multiplies(gate_up) == squares * 2 * -(-case.width // 32) * 4 * -(-case.hidden // 32) * 4
    assert multiplies(down) == squares * -(-case.hidden // 64) * 8 * -(-case.width // 32) * 4
    routes = p.indices.size
    for launch, names in ((gate_up, ("gate", "up")), (down, ("down",))):
        assert launch.result is not None
        counters = launch.result.counters
        for name in names:
            weight = getattr(p.weights, name).weight
            assert counters.buffers[f"{name}_weight"].loaded == tiles.sum() * weight[0].nbytes, name
            scales, group = getattr(p.weights, name).scales, getattr(p.weights, name).quant.group_size
            requests = group // 16  # of a thread 16 values
            assert counters.buffers[f"{name}_scales"].loaded == tiles.sum() * scales[0].nbytes * requests
        assert counters.atomics == 0
    for launch, name, columns, each in (
        (gate_up, "x", case.width, 32),
        (down, "inner", case.hidden, 64),
    ):
        source = launch.inputs[name]
        assert launch.result is not None
        row = source.nbytes // source.shape[0]
        assert launch.result.counters.buffers[name].loaded == routes * row * -(-columns // each)
    # x is where it was; nothing is larger than what a route needs.
    assert gate_up.inputs["x"] is p.x
    assert gate_up.outputs["inner"].shape == (routes, case.width)
    assert down.outputs["out"].shape == (routes, case.hidden)
    assert combine.inputs["y"].size == routes * case.hidden
    assert sum(array.nbytes for array in plan.outputs.values()) < 64 * routes + 16 * case.experts


def test_at_most_five_launches_after_the_router(floats: Floats, projection: MakeProjection) -> None:
    p = problem(Case(2100, hidden=8, width=8), floats, projection)
    with emulated(check=False) as launches:
        prefill.experts(p.x, p.weights, p.indices, mx.abs(floats(2100, 2)))
    assert [launch.name for launch in launches] == [
        "plan_count",
        "plan_place",
        "grouped_gate_up",
        "grouped_down",
        "combine",
    ]


@pytest.mark.parametrize(
    ("routes", "experts", "height"), [(8, 64, 32), (127 * 8, 8, 32), (128 * 8, 8, 64), (1 << 20, 256, 64)]
)
def test_height_follows_the_rows_of_an_expert(routes: int, experts: int, height: int) -> None:
    assert prefill.height_of(routes, experts) == height


# -- by MLX ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        Case(0),
        Case(33, formats="affine4-g32", kind="absent"),
        Case(40, formats="plain mxfp4 nvfp4-scaled", hidden=32),
        Case(5, activation=Activation(name="relu2")),
    ],
    ids=str,
)
def test_by_mlx(case: Case, floats: Floats, projection: MakeProjection) -> None:
    p = problem(case, floats, projection)
    with emulated():
        got = prefill.switch_glu_by_mlx(p.x, p.weights, p.indices)
    assert_close(got, p.truth, "switch_glu", reductions=(case.hidden, case.width))
    assert not float64(got)[np.array(p.indices) >= case.experts].any()
