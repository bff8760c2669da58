"""``switch_glu`` and ``experts`` against the float64 oracle: formats, activations, shapes, refusals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import numpy as np
import oracle
import pytest
from factories import Floats, MakeExperts, MakeProjection
from formats import ACTIVATIONS, BY_NAME, DTYPES, FORMATS, Format

from moefast import Activation, ExpertWeights, Projection, Routing, experts, switch_glu
from moefast.backends.reference import matmul
from moefast.testing import assert_close

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_backend = pytest.mark.usefixtures("backend")

HIDDEN, WIDTH = 128, 256  # groups of 128 need multiples of it


def any_experts(rng: np.random.Generator, *shape: int, experts: int) -> mx.array:
    """Indices drawn with repetition: a token may name an expert twice."""
    return mx.array(rng.integers(0, experts, shape).astype(np.uint32))


def check(x: mx.array, weights: ExpertWeights, indices: mx.array, dtype: mx.Dtype | None = None) -> mx.array:
    """``switch_glu`` is as good as it should be; ``dtype``: the coarsest one inside."""
    y = switch_glu(x, weights, indices)
    _, hidden, width, *_ = weights.layout
    want = oracle.switch_glu(x, weights, indices)
    assert_close(y, want, "switch_glu", dtype=dtype or x.dtype, reductions=(hidden, width))
    return y


# -- formats and activations -------------------------------------------------------------------------------


@every_backend
@dtypes
@pytest.mark.parametrize("format_", FORMATS, ids=lambda format_: format_.name)
def test_formats(
    format_: Format, dtype: mx.Dtype, floats: Floats, expert_weights: MakeExperts, rng: np.random.Generator
) -> None:
    weights = expert_weights(5, HIDDEN, WIDTH, bias=True, **format_.of(dtype))
    y = check(floats(3, HIDDEN, dtype=dtype), weights, any_experts(rng, 3, 2, experts=5))
    stored = weights.up.layout.dtype
    assert y.dtype == (
        dtype if stored == mx.uint8 else mx.result_type(mx.zeros(1, dtype), mx.zeros(1, stored))
    )


@every_backend
@dtypes
@pytest.mark.parametrize(
    "names",
    [
        ("affine4-g64", "affine4-g64", "affine8-g64"),  # what GraniteMoE's quantization predicate makes
        ("affine3-g32", "mxfp4", "plain"),  # a stack kept unquantized
        ("nvfp4-scaled", "nvfp4", "mxfp8"),  # a global scale on one projection only
        ("plain-float32", "affine6-g128", "plain-bfloat16"),  # gate and up differ in dtype
    ],
)
def test_each_projection_has_its_own_format(
    names: tuple[str, str, str],
    dtype: mx.Dtype,
    floats: Floats,
    projection: MakeProjection,
    rng: np.random.Generator,
) -> None:
    gate, up, down = (BY_NAME[name].of(dtype) for name in names)
    weights = ExpertWeights(
        gate=projection(5, WIDTH, HIDDEN, **gate),
        up=projection(5, WIDTH, HIDDEN, **up),
        down=projection(5, HIDDEN, WIDTH, **down),
    )
    check(floats(3, HIDDEN, dtype=dtype), weights, any_experts(rng, 3, 2, experts=5), dtype)


@every_backend
@dtypes
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_activations(
    activation: Activation,
    bias: bool,
    dtype: mx.Dtype,
    floats: Floats,
    expert_weights: MakeExperts,
    rng: np.random.Generator,
) -> None:
    weights = expert_weights(4, 32, 64, activation=activation, dtype=dtype, bias=bias)
    check(floats(9, 32, dtype=dtype), weights, any_experts(rng, 9, 2, experts=4))


# -- shapes ------------------------------------------------------------------------------------------------


@every_backend
@dataclass(frozen=True)
class Case:
    why: str
    tokens: int
    num_experts: int = 8
    top_k: int = 4
    spread: Literal["even", "one", "half", "all"] = "even"

    def indices(self, rng: np.random.Generator) -> mx.array:
        shape = (self.tokens, self.top_k)
        chosen = {
            "even": lambda: rng.permuted(np.tile(np.arange(self.num_experts), (self.tokens, 1)), axis=1),
            "one": lambda: np.full(shape, 2),
            "half": lambda: rng.integers(0, self.num_experts // 2, shape) * 2,
            "all": lambda: np.tile(np.arange(self.num_experts), (self.tokens, 1)),
        }[self.spread]()[:, : self.top_k]
        return mx.array(chosen.astype(np.uint32))


CASES = [
    Case("no token", 0),
    Case("decode: a token with distinct experts", 1),
    Case("decode with few of many experts: they are taken out of the stack first", 1, num_experts=32),
    Case("few tokens", 3),
    Case("fewer tokens than a tile", 7),
    Case("routes are sorted from 64 on", 16),
    Case("no multiple of anything", 33),
    Case("prefill", 130),
    Case("long runs: more rows of an expert than a block holds", 130, num_experts=2, top_k=2),
    Case("one hot expert", 33, spread="one"),
    Case("one hot expert, below sorting", 7, spread="one"),
    Case("every other expert is empty", 33, spread="half"),
    Case("top_k = num_experts", 7, top_k=8, spread="all"),
    Case("one expert", 7, num_experts=1, top_k=1, spread="all"),
]
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
storage = pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (mx.float32, "plain"),
        (mx.bfloat16, "plain"),
        (mx.float32, "affine4-g32"),
        (mx.bfloat16, "affine4-g32"),
    ],
    ids=str,
)


@storage
@cases
def test_shapes(
    case: Case,
    dtype: mx.Dtype,
    name: str,
    floats: Floats,
    expert_weights: MakeExperts,
    rng: np.random.Generator,
) -> None:
    weights = expert_weights(case.num_experts, 32, 64, bias=True, **BY_NAME[name].of(dtype))
    x, indices = floats(case.tokens, 32, dtype=dtype), case.indices(rng)
    y = check(x, weights, indices)
    assert y.shape == (case.tokens, case.top_k, 32)

    routing = Routing(indices, mx.softmax(floats(case.tokens, case.top_k), axis=-1))
    combined = experts(x, weights, routing)
    assert (combined.shape, combined.dtype) == ((case.tokens, 32), dtype)
    want = oracle.experts(x, weights, *routing)
    assert_close(combined, want, "experts", reductions=(32, 64), top_k=case.top_k)


@every_backend
@storage
def test_leading_dimensions_are_tokens(
    dtype: mx.Dtype, name: str, floats: Floats, expert_weights: MakeExperts, rng: np.random.Generator
) -> None:
    weights = expert_weights(4, 32, 64, **BY_NAME[name].of(dtype))
    for lead in ((), (3,), (2, 3), (2, 40), (2, 1, 3)):  # 2 x 40 x 2 routes are sorted
        x, indices = floats(*lead, 32, dtype=dtype), any_experts(rng, *lead, 2, experts=4)
        y = check(x, weights, indices)
        assert y.shape == (*lead, 2, 32)
        routed = experts(x, weights, Routing(indices, mx.ones((*lead, 2))))
        assert routed.shape == (*lead, 32)


@every_backend
@storage
@pytest.mark.parametrize("tokens", [5, 40])
def test_strided_input(
    dtype: mx.Dtype,
    name: str,
    tokens: int,
    floats: Floats,
    expert_weights: MakeExperts,
    rng: np.random.Generator,
) -> None:
    weights = expert_weights(4, 32, 64, **BY_NAME[name].of(dtype))
    indices = any_experts(rng, 2 * tokens, 4, experts=4)[::2, ::2]
    check(floats(32, 2 * tokens, dtype=dtype).T[::2], weights, indices)
    check(floats(tokens, 64, dtype=dtype)[:, 1::2], weights, indices)
    check(mx.broadcast_to(floats(32, dtype=dtype), (tokens, 32)), weights, indices)


@every_backend
@dtypes
@pytest.mark.parametrize("tokens", [5, 40])
def test_transposed_stacks(dtype: mx.Dtype, tokens: int, floats: Floats, rng: np.random.Generator) -> None:
    """Stacks stored [E, in, out], as some checkpoints have them, are used through a view."""
    gate, up = (Projection(floats(4, 32, 64, dtype=dtype, scale=0.2).swapaxes(1, 2)) for _ in range(2))
    weights = ExpertWeights(gate=gate, up=up, down=Projection(floats(4, 64, 32, dtype=dtype).swapaxes(1, 2)))
    check(floats(tokens, 32, dtype=dtype), weights, any_experts(rng, tokens, 2, experts=4))


@every_backend
@pytest.mark.parametrize("kind", [mx.uint32, mx.int32, mx.int64, mx.uint8], ids=str)
def test_any_integers_are_indices(
    kind: mx.Dtype, floats: Floats, expert_weights: MakeExperts, rng: np.random.Generator
) -> None:
    weights, x = expert_weights(4, 32, 64), floats(40, 32)
    for tokens in (3, 40):
        indices = any_experts(rng, tokens, 2, experts=4)
        check(x[:tokens], weights, indices.astype(kind))


@pytest.mark.usefixtures("cpu", "reference")
def test_blocks_in_many_chunks(
    floats: Floats, expert_weights: MakeExperts, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half-precision stacks are multiplied a chunk of blocks at a time; here, one block."""
    monkeypatch.setattr(matmul, "_CHUNK_BYTES", 1)
    weights = expert_weights(4, 32, 64, dtype=mx.bfloat16)
    for tokens in (1, 33):
        check(floats(tokens, 32, dtype=mx.bfloat16), weights, any_experts(rng, tokens, 2, experts=4))


# -- combine -----------------------------------------------------------------------------------------------


@every_backend
@dtypes
@pytest.mark.parametrize("of_weights", DTYPES, ids=str)
@pytest.mark.parametrize("combine_dtype", [None, mx.float32])
def test_combine_dtypes(
    dtype: mx.Dtype,
    of_weights: mx.Dtype,
    combine_dtype: mx.Dtype | None,
    floats: Floats,
    expert_weights: MakeExperts,
    rng: np.random.Generator,
) -> None:
    """Weights in a dtype of their own; the result always has that of the outputs."""
    weights, x = expert_weights(8, 32, 64, dtype=dtype), floats(9, 32, dtype=dtype)
    routing = Routing(any_experts(rng, 9, 6, experts=8), mx.softmax(floats(9, 6), axis=-1).astype(of_weights))
    y = experts(x, weights, routing, combine_dtype=combine_dtype)
    assert y.dtype == dtype
    assert_close(y, oracle.experts(x, weights, *routing), "experts", reductions=(32, 64), top_k=6)


# -- memory ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32], ids=str)
def test_decode_copies_only_the_chosen_experts(dtype: mx.Dtype) -> None:
    """4 of 16 experts: the whole stack is never upcast (a DBRX layer in float32 is 12.7 GB)."""
    stack = mx.zeros((16, 1024, 1024), mx.bfloat16)
    weights = ExpertWeights(gate=Projection(stack), up=Projection(stack), down=Projection(stack))
    x, indices = mx.zeros((1, 1024), dtype), mx.array([[0, 5, 6, 15]], mx.uint32)
    mx.eval(stack, x, indices)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(switch_glu(x, weights, indices, backend="reference"))
    used = mx.get_peak_memory() - before
    chosen = 3 * stack.nbytes * 4 // 16
    copies = chosen if dtype == mx.bfloat16 else chosen + 2 * chosen  # as stored, then in float32
    activations = 1 << 20
    assert used <= copies + activations, f"{used >> 20} MB for {chosen >> 20} MB of weights"


@pytest.mark.usefixtures("cpu")
def test_decode_does_not_upcast_all_scales(projection: MakeProjection) -> None:
    """MLX casts the scales of a whole stack to the dtype of x: of 64 experts here, 2 are used."""
    stack = projection(64, 256, 512, **BY_NAME["affine4-g32"].of(mx.bfloat16))
    down = projection(64, 512, 256, **BY_NAME["affine4-g32"].of(mx.bfloat16))
    weights = ExpertWeights(gate=stack, up=stack, down=down)
    x, indices = mx.zeros((1, 512), mx.bfloat16), mx.array([[7, 40]], mx.uint32)
    mx.eval(*stack.arrays[:3], *down.arrays[:3], x, indices)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(switch_glu(x, weights, indices, backend="reference"))
    used = mx.get_peak_memory() - before
    upcast = 2 * 2 * stack.scales.nbytes  # scales and biases, in float32, of one projection
    assert used < upcast, f"{used >> 10} kB, {upcast >> 10} kB for the scales of a whole stack"


# -- refusals ----------------------------------------------------------------------------------------------


X, INDICES, MIX = mx.zeros((3, 32)), mx.zeros((3, 2), mx.uint32), mx.zeros((3, 2))


@pytest.mark.parametrize(
    ("x", "indices", "message"),
    [
        (X[:, :31], INDICES, r"x.shape\[-1\] must equal hidden=32, got \(3, 31\)\."),
        (X.astype(mx.int32), INDICES, r"x must be float32, float16 or bfloat16, got mlx.core.int32\."),
        (X, INDICES[:2], r"indices must be \(3, 'top_k'\) for x of shape \(3, 32\), got \(2, 2\)\."),
        (X, INDICES[0], r"indices must be \(3, 'top_k'\) for x of shape \(3, 32\), got \(2,\)\."),
        (X, MIX, r"indices must be integers, got mlx.core.float32\."),
    ],
)
def test_switch_glu_refuses(
    x: mx.array, indices: mx.array, message: str, expert_weights: MakeExperts
) -> None:
    with pytest.raises(ValueError, match=r"\[switch_glu\] " + message):
        switch_glu(x, expert_weights(4, 32, 64), indices)


@pytest.mark.parametrize(
    ("routing", "options", "message"),
    [
        (Routing(MIX, MIX), {}, r"routing.indices must be integers, got mlx.core.float32\."),
        (Routing(INDICES, INDICES), {}, r"routing.weights must be float32, .*got mlx.core.uint32\."),
        (Routing(INDICES, MIX[:, :1]), {}, r"routing.weights.shape\[-1\] must equal top_k=2, got \(3, 1\)\."),
        (Routing(INDICES, MIX[:1]), {}, r"routing.weights must be shaped like .*got \(1, 2\)\."),
        (Routing(INDICES, MIX), {"combine_dtype": mx.int32}, r"combine_dtype must be .*got mlx.core.int32\."),
        (Routing(INDICES, MIX), {"backend": "cuda"}, r"backend must be one of .*got 'cuda'\."),
    ],
)
def test_experts_refuses(
    routing: Routing, options: dict[str, Any], message: str, expert_weights: MakeExperts
) -> None:
    with pytest.raises(ValueError, match=message):
        experts(X, expert_weights(4, 32, 64), routing, **options)
