"""The CPU kernels on NumPy arrays: every instruction set of this machine against the float64 oracle, the same
bits for any number of threads, and no input that crashes them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import numpy as np
import oracle
import pytest
from factories import Floats, MakeExperts, MakeProjection, MakeShared
from formats import ACTIVATIONS, BY_NAME, DTYPES, FORMATS, Format
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_kernels import as_mlx, as_numpy, held, held_experts, kernels
from strategies import router_specs

from moefast import Activation, ExpertWeights, QuantSpec, RouterSpec
from moefast.testing import assert_close, assert_same_routing, float64
from moefast.weights import dtype_name

ISAS = kernels.isas()
isas = pytest.mark.parametrize("isa", ISAS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)

HIDDEN, WIDTH = 128, 256  # groups of 128 need multiples of it
TOKENS = (0, 1, 2, 7, 33, 130)


@pytest.fixture(scope="module")
def engines() -> dict[str, Any]:
    """An engine of two threads for each instruction set."""
    return {isa: kernels.Engine(2, isa) for isa in ISAS}


# -- against the oracle ------------------------------------------------------------------------------------


def on_each(engines: dict[str, Any], check: Callable[[Any], None]) -> None:
    """One truth for all instruction sets: it takes longer to compute than they do."""
    for isa, engine in engines.items():
        try:
            check(engine)
        except AssertionError as error:
            raise AssertionError(f"on {isa}: {error}") from error


@dtypes
@pytest.mark.parametrize("format_", FORMATS, ids=lambda format_: format_.name)
def test_matmul(
    dtype: mx.Dtype, format_: Format, engines: dict[str, Any], floats: Floats, projection: MakeProjection
) -> None:
    weight = projection(96, 2 * HIDDEN, bias=True, **format_.of(dtype))
    stored = held(weight)
    for tokens in TOKENS:
        x = floats(tokens, 2 * HIDDEN, dtype=dtype)
        want = oracle.project(float64(x), weight)

        def check(engine: Any, x: mx.array = x, want: Any = want) -> None:
            y = as_mlx(engine.matmul(as_numpy(x), stored), dtype)
            assert (y.shape, y.dtype) == ((x.shape[0], 96), dtype)
            assert_close(y, want, "quantized_matmul", reductions=(2 * HIDDEN,))

        on_each(engines, check)


def run_experts(
    engine: Any, x: mx.array, weights: ExpertWeights, indices: mx.array, mix: mx.array
) -> tuple[mx.array, mx.array]:
    """The routes' outputs, and their weighted sum."""
    stacks, rows, chosen = held_experts(weights), as_numpy(x), as_numpy(indices)
    apart = engine.switch_glu(rows, stacks, chosen)
    combined = engine.experts(rows, stacks, chosen, as_numpy(mix))
    return as_mlx(apart, x.dtype), as_mlx(combined, x.dtype)


def check_experts(
    engines: dict[str, Any], x: mx.array, weights: ExpertWeights, rng: np.random.Generator, top_k: int = 3
) -> None:
    num_experts, hidden, width, *_ = weights.layout
    indices = mx.array(rng.integers(0, num_experts, (x.shape[0], top_k)).astype(np.uint32))
    mix = mx.softmax(mx.random.normal((x.shape[0], top_k)), axis=-1)
    want = oracle.switch_glu(x, weights, indices)
    total = (want * float64(mix)[..., None]).sum(axis=-2)

    def check(engine: Any) -> None:
        apart, combined = run_experts(engine, x, weights, indices, mix)
        assert_close(apart, want, "switch_glu", reductions=(hidden, width))
        assert_close(combined, total, "experts", reductions=(hidden, width), top_k=top_k)

    on_each(engines, check)


@dtypes
@pytest.mark.parametrize("format_", FORMATS, ids=lambda format_: format_.name)
def test_experts(
    dtype: mx.Dtype,
    format_: Format,
    engines: dict[str, Any],
    floats: Floats,
    expert_weights: MakeExperts,
    rng: np.random.Generator,
) -> None:
    weights = expert_weights(6, HIDDEN, WIDTH, bias=True, **format_.of(dtype))
    for tokens in TOKENS:
        check_experts(engines, floats(tokens, HIDDEN, dtype=dtype), weights, rng)


@dtypes
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_activations(
    dtype: mx.Dtype,
    activation: Activation,
    engines: dict[str, Any],
    floats: Floats,
    expert_weights: MakeExperts,
    rng: np.random.Generator,
) -> None:
    # 90: no multiple of a vector, so that the kernels' remainders compute as well.
    for width, format_ in ((90, "plain"), (64, "affine4-g32")):
        weights = expert_weights(4, 64, width, activation=activation, **BY_NAME[format_].of(dtype))
        check_experts(engines, 3 * floats(9, 64, dtype=dtype), weights, rng)


@isas
@pytest.mark.parametrize("size", [1, 3, 17, 31, 33, 65, 100, 727])
@dtypes
def test_sizes_that_divide_nothing(
    isa: str,
    size: int,
    dtype: mx.Dtype,
    engines: dict[str, Any],
    floats: Floats,
    projection: MakeProjection,
) -> None:
    for out, into in ((size, 64), (64, size), (size, size)):
        weight = projection(out, into, dtype=dtype)
        for tokens in (1, 5, 40):
            x = floats(tokens, into, dtype=dtype)
            y = as_mlx(engines[isa].matmul(as_numpy(x), held(weight)), dtype)
            want = oracle.project(float64(x), weight)
            if out == 1:  # a single value per row may have cancelled out: it is judged beside the others
                y, want = y.T, want.T
            assert_close(y, want, "quantized_matmul", reductions=(into,))


@isas
@dtypes
def test_moe(
    isa: str,
    dtype: mx.Dtype,
    engines: dict[str, Any],
    floats: Floats,
    expert_weights: MakeExperts,
    shared_expert: MakeShared,
) -> None:
    spec = RouterSpec(num_experts=12, top_k=3, score="sigmoid", renormalize=True, identity_experts=4)
    format_ = {"quant": QuantSpec(group_size=32), "dtype": dtype}
    weights = expert_weights(8, 64, 96, **format_)
    shared = shared_expert(64, 128, output_gate=True, **format_)
    for tokens in TOKENS:
        x, logits = floats(tokens, 64, dtype=dtype), floats(tokens, 12)
        y = engines[isa].moe(
            as_numpy(x),
            as_numpy(logits),
            spec,
            held_experts(weights),
            shared=held_experts(shared),
            shared_gate=held(shared.output_gate),
        )
        want = oracle.moe(x, logits, spec, weights, shared=shared)
        assert_close(as_mlx(y, dtype), want, "moe", reductions=(64, 96), top_k=3)


@isas
@given(spec=router_specs(), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_any_router(isa: str, spec: RouterSpec, seed: int) -> None:
    """Portable code routes on every instruction set: the same choices and weights, bit for bit."""
    logits = np.random.default_rng(seed).standard_normal((7, spec.num_experts)).astype(np.float32)
    mine, portable = (kernels.Engine(2, name).route(logits, spec) for name in (isa, "portable"))
    for got, want in zip(mine, portable, strict=True):
        np.testing.assert_array_equal(got, want)
    if spec.score_dtype is spec.bias_dtype is spec.weight_dtype is None and spec.weights_from == "scores":
        want = oracle.route(mx.array(logits), spec)
        assert_same_routing(mine, want[:2], spec, mx.float32, margin=want.margin)


# -- extreme values ----------------------------------------------------------------------------------------

STORED = [BY_NAME[name] for name in ("plain", "affine4-g64", "affine3-g32", "affine8-g128", "mxfp4", "nvfp4")]
stored = pytest.mark.parametrize("format_", STORED, ids=lambda format_: format_.name)


@pytest.fixture
def product(request: pytest.FixtureRequest, engines: dict[str, Any], projection: MakeProjection) -> Any:
    """``product(isa, format_, x)`` and the oracle's answer, by one and the same weight."""
    kept: dict[Any, Any] = {}

    def run(isa: str, format_: Format, x: mx.array) -> tuple[mx.array, Any]:
        weight = kept.setdefault((format_, x.dtype), projection(80, 2 * HIDDEN, **format_.of(x.dtype)))
        y = engines[isa].matmul(as_numpy(x), held(weight))
        with np.errstate(invalid="ignore"):
            return as_mlx(y, x.dtype), oracle.project(float64(x), weight)

    return run


@isas
@dtypes
@stored
@pytest.mark.parametrize("tokens", [1, 40])
def test_outliers(
    tokens: int, isa: str, dtype: mx.Dtype, format_: Format, product: Any, floats: Floats
) -> None:
    """Single values of 60 times the others' size: what coarse quantization of activations cannot hold."""
    x = floats(tokens, 2 * HIDDEN, dtype=dtype)
    x[:, 5::64] *= 60
    assert_close(*product(isa, format_, x), "quantized_matmul", reductions=(2 * HIDDEN,))


@isas
@stored
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_tiny_and_huge_rows(isa: str, format_: Format, scale: float, product: Any, floats: Floats) -> None:
    """Rows of very different sizes side by side, within the range of the dtype."""
    for dtype in (mx.float32, mx.bfloat16):
        for tokens in (1, 20):
            x = floats(tokens, 2 * HIDDEN, dtype=dtype)
            x[::2] *= scale
            assert_close(*product(isa, format_, x), "quantized_matmul", reductions=(2 * HIDDEN,))


@isas
@dtypes
@stored
def test_denormals_and_zeros(
    isa: str, dtype: mx.Dtype, format_: Format, product: Any, floats: Floats
) -> None:
    """Among ordinary values they vanish; a group or a row of nothing else gives what little it has."""
    tiny = {mx.float32: 1e-41, mx.float16: 3e-7, mx.bfloat16: 1e-40}[dtype]
    for tokens in (1, 20):
        x = floats(tokens, 2 * HIDDEN, dtype=dtype)
        x[:, ::3] = tiny
        x[:, 64:128] = 0  # a group of zeros
        x[:, 128:192] = tiny
        assert_close(*product(isa, format_, x), "quantized_matmul", reductions=(2 * HIDDEN,))
        x[0] = 0
        y, want = product(isa, format_, x)
        assert not np.array(y.astype(mx.float32))[0].any()
        assert_close(y, want, "quantized_matmul", reductions=(2 * HIDDEN,))


@isas
@dtypes
@stored
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite_stays_in_its_row(
    value: float, isa: str, dtype: mx.Dtype, format_: Format, product: Any, floats: Floats
) -> None:
    for tokens in (1, 2, 20):
        x = floats(tokens, 2 * HIDDEN, dtype=dtype)
        dirty = mx.array(x)
        dirty[tokens // 2, 77] = value
        y, want = product(isa, format_, dirty)
        got = float64(y)
        assert not np.isfinite(got[tokens // 2][~np.isfinite(want[tokens // 2])]).any()
        others = [i for i in range(tokens) if i != tokens // 2]
        want = product(isa, format_, x)[1]
        if others:
            assert_close(y[mx.array(others)], want[others], "quantized_matmul", reductions=(2 * HIDDEN,))


# -- the same bits, whatever happens around ----------------------------------------------------------------


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


# -- strides and dtypes ------------------------------------------------------------------------------------


def test_rows_may_be_any_distance_apart(floats: Floats, projection: MakeProjection) -> None:
    engine, weight = kernels.Engine(2), held(projection(48, 64))
    wide = as_numpy(floats(30, 96))
    for x in (wide[::3, 16:80], wide[5:6, :64], np.broadcast_to(wide[:1, :64], (7, 64)), wide[0, :64]):
        np.testing.assert_array_equal(engine.matmul(x, weight), engine.matmul(x.copy(), weight))
    deep = wide[:, :64].reshape(2, 15, 64)[:, :, :]
    assert engine.matmul(deep, weight).shape == (2, 15, 48)


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@dtypes
def test_output_dtype(
    dtype: mx.Dtype, out_dtype: mx.Dtype, floats: Floats, projection: MakeProjection
) -> None:
    weight, x = projection(48, 64, dtype=dtype), floats(5, 64, dtype=dtype)
    y = kernels.Engine(2).matmul(as_numpy(x), held(weight), out_dtype=dtype_name(out_dtype))
    got = as_mlx(y, out_dtype)
    assert got.dtype == out_dtype
    assert_close(got, oracle.project(float64(x), weight), "quantized_matmul", reductions=(64,))


def test_measurements_are_plausible() -> None:
    for isa in ISAS:
        engine = kernels.Engine(2, isa)
        assert engine.measure_flops(1) > 1e8
        assert engine.measure_read(2, 1 << 20) > 1e7
    assert kernels.usable_cores() >= 1
    assert ISAS[-1] == "portable"


# -- refusals ----------------------------------------------------------------------------------------------

W, X = np.ones((8, 16), np.float32), np.ones((3, 16), np.float32)
PACKED, SCALES = np.zeros((8, 4), np.uint32), np.ones((8, 1), np.float32)
QUANT = QuantSpec(group_size=32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": np.ones(8, np.float32)}, r"weight must be \[out, in\]"),
        ({"weight": np.ones((0, 16), np.float32)}, "weight must not be empty"),
        ({"weight": np.ones((8, 16))}, "weight must be float32, float16 or .*got float64"),
        ({"weight": W[:, ::2]}, "weight must be contiguous"),
        ({"weight": W.astype(">f4")}, "weight must be float32"),
        ({"weight": W, "scales": SCALES}, "an unquantized weight must have no scales"),
        ({"weight": W, "bias": np.ones(7, np.float32)}, r"bias must have shape \(8,\)"),
        ({"weight": PACKED, "quant": QUANT}, "scales must have as many dimensions"),
        ({"weight": W, "scales": SCALES, "biases": SCALES, "quant": QUANT}, "must be packed uint32"),
        ({"weight": PACKED, "scales": SCALES, "quant": QUANT}, "biases must be given exactly"),
        (
            {"weight": PACKED, "scales": SCALES, "biases": SCALES.astype(np.float16), "quant": QUANT},
            "biases must be like scales",
        ),
        (
            {"weight": PACKED, "scales": np.ones((8, 2), np.float32), "biases": SCALES, "quant": QUANT},
            r"weight.shape\[-1\] must be 8",
        ),
        (
            {"weight": PACKED, "scales": np.ones((7, 1), np.float32), "biases": SCALES, "quant": QUANT},
            r"scales must have shape \(8, 1\)",
        ),
        (
            {"weight": W, "global_scale": np.ones((), np.float32)},
            "an unquantized weight must have no scales",
        ),
        (
            {
                "weight": PACKED,
                "scales": np.ones((8, 1), np.int8),
                "quant": QuantSpec(mode="mxfp4", group_size=32),
            },
            "scales must be uint8",
        ),
    ],
)
def test_projection_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"\[Projection\] .*{message}"):
        kernels.Projection(**arguments)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (X[:, :15], r"\[matmul\] x.shape\[-1\] must equal 16"),
        (np.ones(()), r"\[matmul\] x must be float32"),
        (np.ones((), np.float32), r"\[matmul\] x.shape\[-1\] must equal 16"),
        (X.astype(np.float64), r"\[matmul\] x must be float32"),
        (X.astype(np.int32), r"\[matmul\] x must be float32"),
        (np.ones((3, 32), np.float32)[:, ::2], r"\[matmul\] x must have contiguous rows"),
        (np.ones((16, 3), np.float32).T, r"\[matmul\] x must have contiguous rows"),
        (np.frombuffer(bytes(1 + 4 * 48), np.uint8)[1:].view(np.float32).reshape(3, 16), "aligned"),
    ],
)
def test_matmul_refuses(x: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernels.Engine(1).matmul(x, kernels.Projection(W))


STACK = np.ones((4, 16, 16), np.float32)


def experts_of(stack: Any = STACK) -> Any:
    p = kernels.Projection(stack)
    return kernels.Ffn(gate=p, up=p, down=p, activation=Activation())


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (np.full((3, 2), 4), "indices must be in 0..3, got 4"),
        (np.full((3, 2), -1, np.int8), "indices must be in 0..3, got -1"),
        (np.full((3, 2), 2**32, np.int64), "got 4294967296"),
        (np.full((3, 2), 2**64 - 1, np.uint64), "got 18446744073709551615"),
        (np.zeros((3, 2)), "indices must be integers, got float64"),
        (np.zeros((2, 2), np.int32), r"indices must have shape \(3, 2\)"),
        (np.zeros((3, 0), np.int32), "indices must name at least one"),
    ],
)
def test_bad_indices(indices: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"\[switch_glu\] .*{message}"):
        kernels.Engine(1).switch_glu(X, experts_of(), indices)


def test_ffn_refuses() -> None:
    up, wide = kernels.Projection(STACK), kernels.Projection(np.ones((4, 32, 16), np.float32))
    for arguments, message in (
        ({"up": up, "down": up}, "gate must be given"),
        ({"gate": wide, "up": up, "down": up}, "gate must have up's sizes"),
        ({"gate": wide, "up": wide, "down": wide}, "down must undo up's sizes"),
    ):
        with pytest.raises(ValueError, match=rf"\[Ffn\] {message}"):
            kernels.Ffn(**arguments, activation=Activation())


def test_engine_refuses() -> None:
    with pytest.raises(ValueError, match=r"\[engine\] isa must be one .*got 'mmx'"):
        kernels.Engine(1, "mmx")
    with pytest.raises(ValueError, match=r"\[engine\] threads must be at most"):
        kernels.Engine(10_000)


# Any of these may come out as an answer or as a ValueError; nothing else, and no crash.


@st.composite
def _arrays(draw: st.DrawFn) -> Any:
    shape = draw(st.lists(st.integers(0, 20), min_size=0, max_size=3))
    kind = draw(st.sampled_from((np.float32, np.float16, np.uint16, np.uint32, np.int64, np.uint8)))
    array = (np.random.default_rng(0).standard_normal(shape) * 3).astype(kind)
    if array.ndim and draw(st.booleans()):
        array = array[..., :: draw(st.sampled_from((-1, 1, 2)))]
    return np.asarray(array.T if draw(st.booleans()) else array)


@given(weight=_arrays(), scales=_arrays() | st.none(), biases=_arrays() | st.none(), x=_arrays(),
       quant=st.sampled_from((None, QUANT, QuantSpec(mode="nvfp4", group_size=16))))  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_fuzz_matmul(weight: Any, scales: Any, biases: Any, x: Any, quant: Any) -> None:
    try:
        y = kernels.Engine(1).matmul(x, kernels.Projection(weight, scales, biases, quant=quant))
    except ValueError:
        return
    assert y.shape == (*x.shape[:-1], weight.shape[-2])


@given(
    experts=st.integers(1, 5),
    hidden=st.integers(1, 40),
    width=st.integers(1, 40),
    tokens=st.integers(0, 20),
    top_k=st.integers(0, 4),
    low=st.integers(-2, 0),
    high=st.integers(1, 7),
    isa=st.sampled_from(ISAS),
    dtype=st.sampled_from((np.float32, np.float16, np.uint16)),
)
@settings(max_examples=300, deadline=None)
def test_fuzz_experts(
    experts: int,
    hidden: int,
    width: int,
    tokens: int,
    top_k: int,
    low: int,
    high: int,
    isa: str,
    dtype: Any,
) -> None:
    rng = np.random.default_rng(0)

    def values(*shape: int) -> Any:
        return rng.standard_normal(shape).astype(np.float16).astype(dtype)

    up, down = kernels.Projection(values(experts, width, hidden)), values(experts, hidden, width)
    weights = kernels.Ffn(gate=up, up=up, down=kernels.Projection(down), activation=Activation())
    indices = rng.integers(low, high, (tokens, top_k))
    call = (values(tokens, hidden), weights, indices, values(tokens, top_k))
    if top_k == 0 or ((indices < 0) | (indices >= experts)).any():
        with pytest.raises(ValueError, match="indices must"):
            kernels.Engine(2, isa).experts(*call)
    else:
        assert kernels.Engine(2, isa).experts(*call).shape == (tokens, hidden)
