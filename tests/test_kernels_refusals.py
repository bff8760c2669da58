"""What the CPU kernels refuse on NumPy arrays, and that nothing else is refused and nothing crashes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_kernels import ISAS, kernels
from strategies import quant_specs

from moefast import Activation, QuantSpec, RouterSpec

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


def shifted(array: Any) -> Any:
    """The same values one byte off any alignment."""
    moved = np.empty(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)
    moved[...] = array
    assert not moved.flags.aligned
    return moved


HEADS = np.ones((1, 2, 3, 8), np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": HEADS[0]}, r"queries must be \[batch, heads, length, dims\], got float32 \(2, 3, 8\)"),
        ({"keys": HEADS[..., ::2]}, r"keys must have contiguous rows"),
        ({"values": HEADS.astype(np.float64)}, r"values must be float32"),
        ({"keys": HEADS[..., :7].copy()}, r"keys.dims must equal queries.dims=8, got 7"),
        ({"keys": np.ones((1, 2, 0, 8), np.float32)}, r"values.length must equal keys.length=0, got 3"),
        ({"keys": np.ones((2, 2, 3, 8), np.float32)}, r"keys.batch must equal queries.batch=1, got 2"),
        ({"queries": np.ones((1, 3, 3, 8), np.float32)}, r"queries.heads must be a multiple of keys.heads=2"),
        ({"queries": np.ones((1, 2, 4, 8), np.float32)}, r"keys.length must be at least queries.length=4"),
        ({"values": np.ones((1, 2, 3, 0), np.float32)}, r"values must have .* dims >= 1, got 1, 3, 2 and 0"),
    ],
)
def test_attention_refuses(change: dict[str, Any], message: str) -> None:
    heads = {"queries": HEADS, "keys": HEADS, "values": HEADS} | change
    with pytest.raises(ValueError, match=rf"\[attention\] {message}"):
        kernels.Engine(1).attention(**heads, scale=1.0, causal=True)


STACK = np.ones((4, 16, 16), np.float32)
NVFP4 = {
    "weight": np.zeros((2, 8, 2), np.uint32),
    "scales": np.ones((2, 8, 1), np.uint8),
    "quant": QuantSpec(mode="nvfp4", bits=4, group_size=16),
}
ROUTER = RouterSpec(num_experts=16, top_k=2)
CHOICE, MIX = np.array([[0, 1], [2, 3], [1, 1]]), np.ones((3, 2), np.float32)


@pytest.mark.parametrize(
    "call",
    [
        lambda on: on.matmul(shifted(X), kernels.Projection(W)),
        lambda on: on.switch_glu(shifted(X), experts_of(), CHOICE),
        lambda on: on.experts(shifted(X), experts_of(), CHOICE, MIX),
        lambda on: on.experts(X, experts_of(), CHOICE, shifted(MIX)),
        lambda on: on.route(shifted(X), ROUTER),
        lambda on: on.route(X, ROUTER, selection_bias=shifted(np.ones(16, np.float16))),
        lambda on: on.route(X, ROUTER, expert_scale=shifted(np.ones(16, np.uint16))),
        lambda on: on.moe(shifted(X), X[:, :4].copy(), RouterSpec(num_experts=4, top_k=2), experts_of()),
        lambda on: on.moe(X, shifted(X[:, :4]), RouterSpec(num_experts=4, top_k=2), experts_of()),
        lambda on: on.attention(HEADS, HEADS, shifted(HEADS), scale=1.0, causal=False),
        lambda on: kernels.Projection(shifted(W)),
        lambda on: kernels.Projection(W, bias=shifted(np.ones(8, np.float32))),
        lambda on: kernels.Projection(shifted(PACKED), SCALES, SCALES, quant=QUANT),
        lambda on: kernels.Projection(PACKED, shifted(SCALES), SCALES, quant=QUANT),
        lambda on: kernels.Projection(PACKED, SCALES, shifted(SCALES), quant=QUANT),
        lambda on: kernels.Projection(**NVFP4, global_scale=shifted(np.ones(2, np.float32))),
    ],
)
def test_misaligned_arrays_are_refused(call: Callable[[Any], Any]) -> None:
    with pytest.raises(ValueError, match=r"^\[\w+\] .* must (be|have) contiguous .*aligned, got "):
        call(kernels.Engine(1))


@pytest.mark.parametrize("kind", [np.int16, np.uint32, np.int64, np.uint64])
def test_misaligned_indices_are_copied(kind: Any) -> None:
    """As integers of any width are."""
    indices = CHOICE.astype(kind)
    got, want = (kernels.Engine(1).switch_glu(X, experts_of(), i) for i in (shifted(indices), indices))
    np.testing.assert_array_equal(got, want)


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


# -- fuzzing ---------------------------------------------------------------------------------------------

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
    quant=quant_specs(),
    groups=st.integers(1, 9),
    out=st.integers(1, 40),
    tokens=st.integers(0, 20),
    isa=st.sampled_from(ISAS),
    dtypes=st.lists(st.sampled_from((np.float32, np.float16, np.uint16)), min_size=2, max_size=2),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=300, deadline=None)
def test_fuzz_bits(
    quant: QuantSpec, groups: int, out: int, tokens: int, isa: str, dtypes: list[Any], seed: int
) -> None:
    """Codes, scales and activations of any bits, NaN and infinity among them: the same from any threads."""
    rng = np.random.default_rng(seed)
    values = groups * max(32, quant.group_size)

    def bits(*shape: int, dtype: Any) -> Any:
        return rng.integers(0, 256, (*shape[:-1], shape[-1] * np.dtype(dtype).itemsize), np.uint8).view(dtype)

    affine = quant.mode == "affine"
    stored, shape = dtypes[0] if affine else np.uint8, (out, values // quant.group_size)
    packed = bits(out, values * quant.bits // 32, dtype=np.uint32)
    scales, biases = bits(*shape, dtype=stored), bits(*shape, dtype=stored) if affine else None
    weight, x = kernels.Projection(packed, scales, biases, quant=quant), bits(tokens, values, dtype=dtypes[1])
    y, same = (kernels.Engine(threads, isa).matmul(x, weight) for threads in (1, 3))
    assert y.shape == (tokens, out)
    np.testing.assert_array_equal(y.view(np.uint8), same.view(np.uint8))


@given(
    sizes=st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 70)),
    length=st.integers(0, 40),
    keys=st.integers(1, 90),
    steps=st.tuples(st.sampled_from((-1, 1, 2)), st.sampled_from((-1, 1, 3))),
    causal=st.booleans(),
    isa=st.sampled_from(ISAS),
    dtype=st.sampled_from((np.float32, np.float16, np.uint16)),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=200, deadline=None)
def test_fuzz_attention(
    sizes: tuple[int, int, int, int],
    length: int,
    keys: int,
    steps: tuple[int, int],
    causal: bool,
    isa: str,
    dtype: Any,
    seed: int,
) -> None:
    """Rows that run backwards and apart, any bits: an answer, the same from any threads, or a ValueError."""
    batch, kv_heads, group, dims = sizes
    rng = np.random.default_rng(seed)

    def heads(count: int, rows: int, step: int) -> Any:
        shape = (batch, count, rows * abs(step), dims * np.dtype(dtype).itemsize)
        return rng.integers(0, 256, shape, np.uint8).view(dtype)[:, :, ::step]

    q, k = heads(kv_heads * group, length, steps[0]), heads(kv_heads, keys, steps[1])
    v = heads(kv_heads, keys, 1)
    run = [kernels.Engine(threads, isa).attention for threads in (1, 3)]
    if causal and keys < length:
        with pytest.raises(ValueError, match=r"keys\.length must be at least"):
            run[0](q, k, v, scale=0.1, causal=causal)
        return
    y, same = (attention(q, k, v, scale=0.1, causal=causal) for attention in run)
    assert y.shape == (batch, length, kv_heads * group * dims)
    np.testing.assert_array_equal(y.view(np.uint8), same.view(np.uint8))


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
