"""Experts of 2 to 127 tokens, against the float64 oracle: checked, with threads in shuffled orders; and what
they read, counted."""

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
from moefast.backends.metal import band, decode
from moefast.backends.metal.launch import Launch
from moefast.testing import Float64, assert_close, float64

pytestmark = needs_emulator


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
    activation: Activation = Activation()  # noqa: RUF009 (frozen)
    bias: bool = False

    def indices(self) -> np.ndarray:
        """Experts, [tokens, top_k]: those of a token are distinct, where they exist."""
        rng, E = np.random.default_rng(self.tokens), self.experts
        chosen = np.argsort(rng.random((self.tokens, E)), axis=1)[:, : self.top_k]
        if self.kind == "hot":  # one expert for all tokens
            others = np.argsort(rng.random((self.tokens, E - 1)), axis=1)[:, : self.top_k - 1]
            hot = E // 2
            chosen = np.append(others + (others >= hot), np.full((self.tokens, 1), hot), axis=1)
        if self.kind == "few":  # most experts are empty
            chosen = rng.choice([0, E // 3, E - 1], chosen.shape)
        if self.kind == "absent":  # a third of the routes lead nowhere
            chosen = np.where(
                rng.random(chosen.shape) < 0.3, rng.choice([E, E + 1, 2**31], chosen.shape), chosen
            )
        if self.kind == "nowhere":  # all of them
            chosen = np.full(chosen.shape, E)
        return chosen


@dataclass(frozen=True)
class Problem:
    x: mx.array
    weights: ExpertWeights
    indices: mx.array
    exists: np.ndarray
    truth: Float64


def problem(case: Case, floats: Floats, projection: MakeProjection) -> Problem:
    names = case.formats.split()

    def stack(index: int, *shape: int) -> Projection:
        format_ = BY_NAME[names[min(index, len(names) - 1)]]
        return projection(case.experts, *shape, bias=case.bias, **format_.of(case.dtype))

    weights = ExpertWeights(
        gate=stack(0, case.width, case.hidden) if case.activation.gated else None,
        up=stack(1, case.width, case.hidden),
        down=stack(2, case.hidden, case.width),
        activation=case.activation,
    )
    assert decode.why_not(case.dtype, weights.layout) is None
    x, indices = floats(case.tokens, case.hidden, dtype=case.dtype), case.indices()
    exists = indices < case.experts
    truth = oracle.switch_glu(x, weights, mx.array(np.where(exists, indices, 0)))
    return Problem(
        x, weights, mx.array(indices.astype(np.uint32)), exists, np.where(exists[..., None], truth, 0)
    )


def check(case: Case, floats: Floats, projection: MakeProjection, seed: int = 0) -> list[Launch]:
    p = problem(case, floats, projection)
    with emulated(seed=seed) as launches:
        got = band.switch_glu(p.x, p.weights, p.indices)
    assert [made.name for made in launches] == ["band_gate_up", "band_down"]
    assert (got.shape, got.dtype) == ((*p.indices.shape, case.hidden), case.dtype)
    assert_close(got, p.truth, "switch_glu", reductions=(case.hidden, case.width))
    assert not float64(got)[~p.exists].any()
    return launches


SHAPES = (
    *(Case(tokens) for tokens in (2, 3, 7, 8, 9, 16, 33, 127)),
    Case(70, kind="hot"),
    Case(70, kind="few"),
    Case(70, kind="absent"),
    Case(9, kind="nowhere"),
    Case(3, kind="absent"),
    Case(2, kind="nowhere"),
    # Buffers of fewer than 8 elements are constant.
    Case(1, top_k=1, experts=1, hidden=2, width=3),
    Case(1, top_k=7, experts=7, hidden=1, width=1),  # k = E
    # No multiples of 32 or 64; odd rows of packed weights; a rest of fewer than a lane's values.
    Case(2, hidden=40, width=72, kind="absent", bias=True),
    Case(2, hidden=41, width=64, formats="plain plain affine4-g64", dtype=mx.bfloat16),
    Case(3, hidden=96, width=37, formats="affine8-g32 affine8-g32 plain", dtype=mx.float16),
)
# Three formats at a time, each projection its own; and one for both of gate and up, which then share x.
FORMATS = (
    Case(2, hidden=128, width=128, experts=3, formats="affine2-g64 affine3-g64 affine5-g64"),
    Case(2, hidden=96, width=80, experts=3, formats="mxfp4 mxfp8 nvfp4-scaled", dtype=mx.bfloat16, bias=True),
    Case(2, hidden=192, width=64, experts=3, formats="affine6-g64 affine6-g64 affine8-g64", dtype=mx.float16),
)


@pytest.mark.parametrize("case", SHAPES + FORMATS, ids=str)
def test_cases(case: Case, floats: Floats, projection: MakeProjection) -> None:
    check(case, floats, projection, seed=case.tokens)


def test_without_a_gate(floats: Floats, projection: MakeProjection) -> None:
    case = Case(2, hidden=32, width=43, activation=Activation(name="relu2"), bias=True, dtype=mx.bfloat16)
    check(case, floats, projection)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name, format_ in BY_NAME.items() if format_.dtype is None])
def test_every_format(name: str, dtype: mx.Dtype, floats: Floats, projection: MakeProjection) -> None:
    for tokens, bias in ((2, False), (33, True)):
        case = Case(tokens, experts=3, hidden=128, width=256, formats=name, dtype=dtype, bias=bias)
        check(case, floats, projection, seed=tokens)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_every_activation(
    activation: Activation, dtype: mx.Dtype, floats: Floats, projection: MakeProjection
) -> None:
    for bias in (False, True):
        case = Case(4, hidden=72, width=40, activation=activation, dtype=dtype, bias=bias)
        check(case, floats, projection)


LARGE = (
    *(Case(127, top_k=8, experts=e, formats="affine4-g32", dtype=d) for e in (16, 256) for d in DTYPES),
    Case(127, top_k=8, experts=384, hidden=64, width=32, formats="mxfp4", dtype=mx.bfloat16),
    Case(127, top_k=4, experts=160, hidden=512, width=192, formats="affine4-g64", dtype=mx.bfloat16),
    Case(127, top_k=16, experts=16, hidden=40, width=136, dtype=mx.float16),
    Case(40, top_k=32, experts=1024, hidden=8, width=8, kind="hot"),
    Case(17, top_k=64, experts=64, hidden=32, width=32),
)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large(case: Case, seed: int, floats: Floats, projection: MakeProjection) -> None:
    check(case, floats, projection, seed)


@pytest.mark.parametrize("dtype", [mx.int64, mx.int32], ids=str)
def test_negative_indices_lead_nowhere(dtype: mx.Dtype, floats: Floats, projection: MakeProjection) -> None:
    case = Case(2)
    p = problem(case, floats, projection)
    indices = mx.array([[-1, 3], [2**32 if dtype == mx.int64 else 8, 5]], dtype)
    with emulated():
        got = float64(band.switch_glu(p.x, p.weights, indices))
        want = float64(band.switch_glu(p.x, p.weights, mx.array([[9, 3], [9, 5]], mx.uint32)))
    assert not got[:, 0].any()
    assert got[:, 1].all()
    assert np.array_equal(got, want)


def test_no_tokens(floats: Floats, projection: MakeProjection) -> None:
    p = problem(Case(2), floats, projection)
    with emulated() as launches:
        y = band.switch_glu(mx.zeros((0, 64)), p.weights, mx.zeros((0, 2), mx.uint32))
    assert y.shape == (0, 2, 64)
    assert launches == []


@pytest.mark.parametrize("shape", [(129, 2), (2, 65)])
def test_more_routes_than_there_is_memory_for(
    shape: tuple[int, int], floats: Floats, projection: MakeProjection
) -> None:
    p = problem(Case(2), floats, projection)
    with pytest.raises(ValueError, match=r"takes 128 tokens of 64 experts, got"):
        band.switch_glu(mx.zeros((shape[0], 64)), p.weights, mx.zeros(shape, mx.uint32))


# -- combined ----------------------------------------------------------------------------------------------


def test_a_whole_block(floats: Floats, projection: MakeProjection) -> None:
    """The three launches that follow the router's."""
    case = Case(70, kind="absent")
    p = problem(case, floats, projection)
    route_weights = mx.abs(floats(case.tokens, case.top_k))
    shared, gate = floats(case.tokens, case.hidden), floats(case.tokens, 1)
    with emulated() as launches:
        plain = band.experts(p.x, p.weights, p.indices, route_weights)
        assert [made.name.split("_identity")[0] for made in launches] == [
            "band_gate_up",
            "band_down",
            "combine",
        ]
        whole = band.experts(
            p.x,
            p.weights,
            p.indices.astype(mx.int64),
            route_weights,
            identity=True,
            scale=2.5,
            shared=shared,
            shared_gate=gate,
        )
    assert len(launches) == 6
    factors = float64(route_weights)[..., None]
    sizes = {"reductions": (case.hidden, case.width), "top_k": case.top_k}
    assert_close(plain, (p.truth * factors).sum(axis=1), "experts", **sizes)
    rows = np.where(p.exists[..., None], p.truth, float64(p.x)[:, None])
    want = (rows * factors).sum(axis=1) * 2.5 + oracle.sigmoid(float64(gate)) * float64(shared)
    assert_close(whole, want, "moe", **sizes)


# -- economy -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["uniform", "hot"])
@pytest.mark.parametrize("tokens", [2, 19, 127])
def test_weights_are_read_once_for_8_routes(
    tokens: int, kind: str, floats: Floats, projection: MakeProjection
) -> None:
    """Of gate, up and down, in whatever order the tokens come; x where it is, and nothing else of size."""
    case = Case(tokens, formats="affine4-g32", dtype=mx.bfloat16, kind=kind, experts=5)
    p = problem(case, floats, projection)
    routes = p.indices.size
    mix = mx.abs(floats(tokens, case.top_k))
    with emulated(seed=tokens) as launches:
        band.experts(p.x, p.weights, p.indices, mix)
    gate_up, down, combine = launches
    each = np.bincount(np.array(p.indices).flatten(), minlength=case.experts)
    if kind == "hot":
        assert each.max() == tokens
    tiles = -(-each // 8)
    for launch, names in ((gate_up, ("gate", "up")), (down, ("down",))):
        assert launch.result is not None
        counters = launch.result.counters
        for name in names:
            weight = launch.inputs[f"{name}_weight"]
            assert weight is getattr(p.weights, name).weight
            assert counters.buffers[f"{name}_weight"].loaded == tiles.sum() * weight[0].nbytes
        # Once for each threadgroup; of few routes each thread also reads its threadgroup's own.
        own = 128 if routes <= case.experts else 0
        assert counters.buffers["indices"].loaded <= counters.threadgroups * (routes + own) * 4
        assert counters.atomics == 0
    assert gate_up.inputs["x"] is p.x
    assert gate_up.outputs["inner"].size == routes * case.width
    assert down.outputs["out"].size == combine.inputs["y"].size == routes * case.hidden
    assert len(gate_up.outputs) == len(down.outputs) == 1


def test_threadgroups_of_few_routes_are_theirs(floats: Floats, projection: MakeProjection) -> None:
    """Not those of all experts: 4 routes of 96 experts."""
    launches = check(Case(2, experts=96, hidden=32, width=32, kind="hot"), floats, projection)
    for launch, each in zip(launches, (8, 16), strict=True):
        assert launch.result is not None
        assert launch.result.counters.threadgroups == 4 * 32 // each


def test_heights(floats: Floats, projection: MakeProjection) -> None:
    """A tile is no higher than an expert can have routes: fewer registers, the same values."""
    case = Case(9)
    p = problem(case, floats, projection)
    with emulated():
        want = np.array(band.switch_glu(p.x, p.weights, p.indices))
        for tokens in (2, 3):
            got = np.array(band.switch_glu(p.x[:tokens], p.weights, p.indices[:tokens]))
            assert np.array_equal(got, want[:tokens])
