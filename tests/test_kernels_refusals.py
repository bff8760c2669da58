"""What the CPU kernels refuse on NumPy arrays, and that nothing else is refused and nothing crashes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_kernels import ISAS, kernels

from moefast import Activation, QuantSpec

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
