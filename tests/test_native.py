"""The native backend: what it answers (dtypes, errors), what it refuses, and which binding it finds."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import oracle
import pytest
from factories import Floats, MakeExperts, MakeProjection, MakeShared
from formats import ACTIVATIONS, BY_NAME, DTYPES

import moefast
from moefast import (
    Activation,
    ExpertWeights,
    Projection,
    RouterSpec,
    Routing,
    SharedExpert,
    doctor,
    experts,
    moe,
    quantized_matmul,
    route,
    switch_glu,
)
from moefast.backends import registry
from moefast.backends.native import dtypes, loading
from moefast.registry import Problem
from moefast.testing import assert_close
from moefast.weights import ExpertLayout, Layout, dtype_name

pytestmark = pytest.mark.skipif(
    moefast.backends()["native"] is not None, reason=f"native: {moefast.backends()['native']}"
)

ROOT = Path(__file__).resolve().parents[1]

# -- dtypes ------------------------------------------------------------------------------------------------

NAMES = ("plain", "plain-float32", "plain-bfloat16", "affine4-g64", "affine4-bfloat16", "mxfp4")
stored = pytest.mark.parametrize("name", NAMES)
x_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def make(name: str, dtype: mx.Dtype, *shape: int, bias: mx.Dtype | None = None) -> Projection:
    """A weight of zeros: nothing but its dtypes matters."""
    format_ = BY_NAME[name].of(dtype)
    weight = mx.zeros(shape, format_["dtype"])
    offset = None if bias is None else mx.zeros(shape[:-1], bias)
    if format_["quant"] is None:
        return Projection(weight, bias=offset)
    quant: Any = format_["quant"]
    return Projection(*mx.quantize(weight, **quant.mlx_arguments()), bias=offset, quant=quant)


def same_dtype(run: Any) -> None:
    """Both backends answer in one dtype, and what was promised is what is computed."""
    found = {}
    for backend in ("native", "reference"):
        y = run(backend)
        mx.eval(y)
        found[backend] = y.dtype
    assert found["native"] == found["reference"]


@x_dtypes
@stored
@pytest.mark.parametrize("bias", [None, *DTYPES], ids=str)
def test_dtype_of_a_product(dtype: mx.Dtype, name: str, bias: mx.Dtype | None) -> None:
    weight, x = make(name, dtype, 32, 64, bias=bias), mx.zeros((2, 64), dtype)
    same_dtype(lambda backend: quantized_matmul(x, weight, backend=backend))


@x_dtypes
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_dtype_of_experts(dtype: mx.Dtype, activation: Activation) -> None:
    """Gate, up and down of every mixture of formats, biases on top."""
    x, indices = mx.zeros((2, 64), dtype), mx.zeros((2, 2), mx.uint32)
    few = ("plain", "plain-float32", "affine4-bfloat16", "mxfp4")
    for gate, up, down, bias in itertools.product(few, few, few, (None, mx.float32)):
        weights = ExpertWeights(
            gate=make(gate, dtype, 4, 64, 64) if activation.gated else None,
            up=make(up, dtype, 4, 64, 64, bias=bias),
            down=make(down, dtype, 4, 64, 64),
            activation=activation,
        )
        got = dtypes.feed_forward(dtype_name(dtype), weights.layout)
        want = switch_glu(x, weights, indices, backend="reference").dtype
        assert got == dtype_name(want), weights
        assert switch_glu(x, weights, indices, backend="native").dtype == want


@x_dtypes
@pytest.mark.parametrize("mix", DTYPES, ids=str)
@pytest.mark.parametrize("combine", [None, *DTYPES], ids=str)
def test_dtype_and_value_of_a_combine(
    dtype: mx.Dtype, mix: mx.Dtype, combine: mx.Dtype | None, floats: Floats, expert_weights: MakeExperts
) -> None:
    weights, x = expert_weights(4, 32, 64, dtype=dtype), floats(3, 32, dtype=dtype)
    routing = Routing(mx.array([[0, 1], [2, 3], [3, 3]]), mx.softmax(floats(3, 2), axis=-1).astype(mix))
    run = {b: experts(x, weights, routing, combine_dtype=combine, backend=b) for b in ("native", "reference")}
    assert run["native"].dtype == run["reference"].dtype == dtype
    rounded = routing.weights if combine is None else routing.weights.astype(combine)
    want = oracle.experts(x, weights, routing.indices, rounded)
    assert_close(run["native"], want, "experts", reductions=(32, 64), top_k=2)


@x_dtypes
@pytest.mark.parametrize("logits", DTYPES, ids=str)
@pytest.mark.parametrize("shared", [None, "plain", "plain-float32", "mxfp4"])
def test_dtype_of_a_block(dtype: mx.Dtype, logits: mx.Dtype, shared: str | None) -> None:
    spec, scores = RouterSpec(num_experts=4, top_k=2), mx.zeros((2, 4), logits)
    stack, x = make("affine4-g64", dtype, 4, 64, 64), mx.zeros((2, 64), dtype)
    weights = ExpertWeights(gate=stack, up=stack, down=stack)
    for gate in (None, "plain-float32", "mxfp4"):
        expert = None
        if shared is not None:
            dense = make(shared, dtype, 64, 64)
            output_gate = None if gate is None else make(gate, dtype, 1, 64)
            expert = SharedExpert(gate=dense, up=dense, down=dense, output_gate=output_gate)
        same_dtype(
            lambda backend, expert=expert: moe(x, scores, spec, weights, shared=expert, backend=backend)
        )


@pytest.mark.parametrize("score_dtype", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("bias_dtype", [None, "scores", "float32", "float16"])
@pytest.mark.parametrize("weight_dtype", [None, "logits", "float16"])
@pytest.mark.parametrize("masked", [False, True])
@x_dtypes
def test_dtype_of_routing_weights(
    dtype: mx.Dtype, score_dtype: Any, bias_dtype: Any, weight_dtype: Any, masked: bool
) -> None:
    groups = {"num_groups": 2, "weights_from": "masked"} if masked else {}
    spec = RouterSpec(
        num_experts=8,
        top_k=2,
        score_dtype=score_dtype,
        bias_dtype=bias_dtype,
        weight_dtype=weight_dtype,
        **groups,
    )
    logits = mx.zeros((2, 8), dtype)
    for bias, scale in itertools.product((None, mx.float32, mx.bfloat16), (None, mx.float32, mx.bfloat16)):
        vectors = {
            "selection_bias": None if bias is None else mx.zeros(8, bias),
            "expert_scale": None if scale is None else mx.ones(8, scale),
        }
        same_dtype(lambda backend, vectors=vectors: route(logits, spec, **vectors, backend=backend).weights)


def test_promotion_is_mlxs() -> None:
    for a, b in itertools.product(DTYPES, DTYPES):
        want = mx.result_type(mx.zeros(1, a), mx.zeros(1, b))
        assert dtypes.promoted(dtype_name(a), dtype_name(b)) == dtype_name(want)


# -- values it was not made for ----------------------------------------------------------------------------


@pytest.fixture
def weights(expert_weights: MakeExperts) -> ExpertWeights:
    return expert_weights(4, 32, 64)


@pytest.mark.parametrize(
    "kind", [mx.int8, mx.uint8, mx.int16, mx.uint16, mx.int32, mx.uint32, mx.int64, mx.uint64], ids=str
)
def test_indices_of_any_dtype(kind: mx.Dtype, weights: ExpertWeights, floats: Floats) -> None:
    x, indices = floats(5, 32), mx.array([[0, 1], [3, 3], [2, 0], [1, 2], [3, 0]])
    got = switch_glu(x, weights, indices.astype(kind), backend="native")
    assert mx.array_equal(got, switch_glu(x, weights, indices, backend="native"))


@pytest.mark.parametrize(
    ("kind", "index"),
    [
        (mx.int32, 4),
        (mx.int32, -1),
        (mx.int8, -128),
        (mx.uint32, 2**32 - 1),
        (mx.int64, 2**32 + 1),  # 1, if only its lower half were looked at
        (mx.int64, -(2**32) + 1),
        (mx.uint64, 2**64 - 1),
    ],
    ids=str,
)
def test_an_index_out_of_range_is_a_value_error_when_evaluated(
    kind: mx.Dtype, index: int, weights: ExpertWeights, floats: Floats
) -> None:
    """The stream, and whatever comes later, is not affected; and it is one every time."""
    x, good = floats(3, 32), mx.array([[0, 1], [2, 3], [1, 1]])
    bad = mx.array(np.where(np.arange(6).reshape(3, 2) == 3, index, 0).astype(dtype_name(kind)))
    want = switch_glu(x, weights, good, backend="native")
    mix = mx.ones((3, 2))
    for _ in range(3):
        for op, run in (
            ("switch_glu", lambda: switch_glu(x, weights, bad, backend="native")),
            ("experts", lambda: experts(x, weights, Routing(bad, mix), backend="native")),
        ):
            y = run()  # nothing is evaluated yet
            with pytest.raises(ValueError, match=rf"^\[{op}\] indices must be in 0\.\.3, got {index}\.$"):
                mx.eval(y + 1)
        assert mx.array_equal(switch_glu(x, weights, good, backend="native"), want)


def test_what_failed_holds_no_plausible_numbers(weights: ExpertWeights, floats: Floats) -> None:
    """MLX may take it for evaluated all the same, depending on when the exception reached it. NumPy, for one,
    asks a second time, and then gets the memory as it is."""
    for dtype in DTYPES:
        stacks = ExpertWeights(
            **{n: Projection(getattr(weights, n).weight.astype(dtype)) for n in ("gate", "up", "down")}
        )
        y = switch_glu(floats(1, 32, dtype=dtype), stacks, mx.array([[0, 9]]), backend="native")
        with pytest.raises(ValueError, match="indices must be"):
            mx.eval(y)
        with contextlib.suppress(ValueError):  # as before
            assert mx.isnan(y).all()


def test_no_tokens(weights: ExpertWeights, shared_expert: MakeShared) -> None:
    spec = RouterSpec(num_experts=4, top_k=2)
    for lead in ((0,), (2, 0), (0, 3)):
        x, logits, indices = mx.zeros((*lead, 32)), mx.zeros((*lead, 4)), mx.zeros((*lead, 2), mx.uint32)
        assert switch_glu(x, weights, indices, backend="native").tolist() == x[..., None, :].tolist()
        for y in (
            experts(x, weights, Routing(indices, mx.zeros((*lead, 2))), backend="native"),
            moe(x, logits, spec, weights, shared=shared_expert(32, 64), backend="native"),
            quantized_matmul(x, Projection(mx.zeros((32, 32))), backend="native"),
        ):
            assert (y.shape, y.size) == ((*lead, 32), 0)
            mx.eval(y)


@x_dtypes
def test_any_strides(dtype: mx.Dtype, floats: Floats, projection: MakeProjection) -> None:
    """Rows a constant distance apart are read where they lie; anything else is copied first."""
    weight, wide = projection(48, 32, dtype=dtype), floats(6, 4, 80, dtype=dtype)
    for x in (
        wide[..., :32],
        wide[::2, :, 16:48],
        wide[:, ::2, 3:35],
        wide[:, :, ::2][..., :32],
        wide.transpose(1, 0, 2)[..., 40:72],
        mx.broadcast_to(wide[0, 0, :32], (7, 32)),
        mx.broadcast_to(wide[:1, :, :32], (3, 4, 32)),
        wide[::-1, :, :32],
        wide[:, :, 31::-1],
        wide[0, 0, :32],
    ):
        copied = mx.array(np.array(x.astype(mx.float32))).astype(dtype)
        got, want = (quantized_matmul(a, weight, backend="native") for a in (x, copied))
        assert mx.array_equal(got, want)


def test_weights_of_any_strides(floats: Floats, expert_weights: MakeExperts) -> None:
    plain = expert_weights(4, 32, 64, **BY_NAME["affine4-g32"].of(mx.float32), bias=True)
    x, indices = floats(5, 32), mx.array([[0, 1], [3, 3], [2, 0], [1, 2], [3, 0]])

    def strided(p: Projection) -> Projection:
        def spread(array: mx.array) -> mx.array:
            return mx.stack([array, array])[:, ::1].swapaxes(0, 1)[:, 1]

        weight, scales, biases, bias, _ = (None if a is None else spread(a) for a in p.arrays)
        return Projection(weight, scales, biases, bias=bias, quant=p.quant)

    apart = ExpertWeights(gate=strided(plain.gate), up=strided(plain.up), down=strided(plain.down))
    got, want = (switch_glu(x, w, indices, backend="native") for w in (apart, plain))
    assert mx.array_equal(got, want)


def test_arrays_changed_in_place_are_seen(floats: Floats) -> None:
    """The handle that is kept for the next call holds Python's arrays, not what they once stood for."""
    weight, x = floats(16, 32), floats(3, 32)
    p = Projection(weight)
    before = quantized_matmul(x, p, backend="native")
    weight[:] = 2 * weight
    assert mx.array_equal(quantized_matmul(x, p, backend="native"), 2 * before)


# -- refusals ----------------------------------------------------------------------------------------------

LAYOUT = Layout(4, 64, 64, mx.float32, None, None, False)
DENSE = LAYOUT._replace(num_experts=0)
STACKS = ExpertLayout(4, 64, 64, LAYOUT, LAYOUT, LAYOUT, Activation())
HUGE = Activation(name="swiglu_clipped", limit=1e39)


@pytest.mark.parametrize(
    ("op", "details", "reason"),
    [
        ("quantized_matmul", (DENSE,), None),
        ("quantized_matmul", (DENSE._replace(out_dims=0),), "a weight of 0 x 64 values"),
        ("switch_glu", (STACKS, 2, None, None), None),
        ("switch_glu", (STACKS, 0, None, None), "top_k=0"),
        ("switch_glu", (STACKS._replace(down=LAYOUT._replace(in_dims=0)), 2, None, None), "64 x 0 values"),
        ("experts", (STACKS._replace(activation=HUGE), 2, "float32", None), "limit=1e.39 is too large"),
        ("route", (RouterSpec(num_experts=4, top_k=2, scale=1e39), None, None), "scale=1e.39 is too large"),
        ("route", (RouterSpec(num_experts=4, top_k=2, temperature=1e-50), None, None), "is too small"),
    ],
)
def test_refusals(op: str, details: tuple[Any, ...], reason: str | None) -> None:
    found = registry.ask(Problem(op, "cpu", mx.float32, "decode", details), "native")
    if reason is None:
        assert found[0] is not None, found
    else:
        assert found[0] is None
        assert found[1]["native"] is not None
        assert any(word in found[1]["native"] for word in (reason, reason.replace("e.39", "e+39")))


def test_a_gpu_is_refused_with_its_reason() -> None:
    _, refused = registry.ask(Problem("quantized_matmul", "gpu", mx.float32, "decode", (DENSE,)), "native")
    assert "GPU" in refused["native"]


# -- bindings, settings, doctor ----------------------------------------------------------------------------


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])} | environment,
        capture_output=True,
        text=True,
        timeout=110,
    )


DIGEST = """
import hashlib, mlx.core as mx, numpy as np
from moefast import *
from moefast.backends import native
mx.set_default_device(mx.cpu)
mx.random.seed(0)
digest = hashlib.sha256()
quant = QuantSpec(group_size=32)
def stack(*shape, dtype):
    weight = (mx.random.normal(shape) * shape[-1] ** -0.5).astype(dtype)
    return Projection(*mx.quantize(weight, **quant.mlx_arguments()), quant=quant)
spec = RouterSpec(num_experts=8, top_k=3, renormalize=True)
for dtype in (mx.float32, mx.float16, mx.bfloat16):
    weights = ExpertWeights(up=stack(8, 96, 64, dtype=dtype), gate=stack(8, 96, 64, dtype=dtype),
                            down=stack(8, 64, 96, dtype=dtype))
    for tokens in (1, 5, 150):
        x, logits = mx.random.normal((tokens, 64)).astype(dtype), mx.random.normal((tokens, 8))
        y = moe(x, logits, spec, weights, backend="native")
        digest.update(np.array(y.astype(mx.float32)).tobytes())
found = native.describe()
print(found["isa"], found["threads"], digest.hexdigest())
"""


@pytest.mark.parametrize("isa", loading.bindings().native.isas() if loading.bindings().native else [])
def test_settings_are_obeyed_and_threads_change_nothing(isa: str) -> None:
    answers = []
    for threads in ("1", "3"):
        done = run(DIGEST, MOEFAST_ISA=isa, MOEFAST_THREADS=threads)
        assert done.returncode == 0, done.stderr
        named, counted, digest = done.stdout.split()
        assert (named, counted) == (isa, threads)
        answers.append(digest)
    assert len(set(answers)) == 1


def test_an_instruction_set_that_does_not_run_here_is_a_reason() -> None:
    program = "import moefast; print(moefast.backends()['native'])"
    absent = next(isa for isa in ("neon", "amx", "avx512") if isa not in kernels_isas())
    done = run(program, MOEFAST_ISA=absent)
    assert f"[engine] isa must be one that runs here ({', '.join(kernels_isas())}), got '{absent}'." in (
        done.stdout
    )


def kernels_isas() -> list[str]:
    found = loading.bindings()
    names: list[str] = (found.native or found.kernels).isas()
    return names


def test_doctor_tells_what_runs() -> None:
    found = doctor.examine()["native"]
    assert json.loads(json.dumps(found)) == found
    assert found["isa"] in found["isas"]
    assert found["threads"] >= 1
    assert "runs through" in doctor.as_text(doctor.examine())


OTHER_MLX = """
import sys, types, warnings
import moefast._build_info as info
info.BUILT_FOR_MLX = "0.31.0"
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import moefast
    assert moefast.backends()["native"] is None, moefast.backends()
    moefast.backends()
assert "moefast._native" not in sys.modules, "it may end the process"
print(len(caught), caught[0].message)
"""


def test_another_mlx_gets_the_kernels_through_numpy_and_one_warning() -> None:
    done = run(OTHER_MLX)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 moefast's CPU kernels run through NumPy")
    assert f"built for MLX 0.31.0, and this is MLX {mx.__version__}" in done.stdout
    assert "pip install mlx==0.31.0, or rebuild: pip install --no-build-isolation" in done.stdout


NOTHING_BUILT = """
import sys
import moefast._build_info as info
info.NO_NATIVE = info.NO_KERNELS = "no C++ compiler was found"
import moefast
print(moefast.backends()["native"])
import mlx.core as mx
print(moefast.quantized_matmul(mx.ones((1, 4)), moefast.Projection(mx.ones((3, 4)))).tolist())
"""


def test_without_a_compiler_the_reference_runs_and_the_reason_is_known() -> None:
    done = run(NOTHING_BUILT)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    reason, answer = done.stdout.splitlines()
    assert reason.startswith("moefast._native was not built (no C++ compiler was found)")
    assert answer == "[[4.0, 4.0, 4.0]]"


# -- a long life -------------------------------------------------------------------------------------------


def test_ten_thousand_calls_leave_nothing_behind(
    floats: Floats, expert_weights: MakeExperts, shared_expert: MakeShared
) -> None:
    spec, weights, shared = (
        RouterSpec(num_experts=4, top_k=2),
        expert_weights(4, 64, 64),
        shared_expert(64, 64),
    )
    x, logits = floats(3, 64), floats(3, 4)

    def many(times: int) -> int:
        for _ in range(times):
            mx.eval(moe(x, logits, spec, weights, shared=shared, backend="native"))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before = many(1000)
    grown = many(10_000) - before
    unit = 1 if sys.platform == "darwin" else 1024
    assert grown * unit < 1 << 20, f"{grown * unit >> 10} kB"


FORK = """
import multiprocessing, sys
import mlx.core as mx
import moefast
from moefast import Projection, quantized_matmul

mx.set_default_device(mx.cpu)

def child(answers):
    y = quantized_matmul(mx.ones((3, 64)), Projection(mx.ones((32, 64))), backend="native")
    answers.put(y.tolist())

if __name__ == "__main__":
    assert moefast.backends()["native"] is None  # loaded, and probed
    context = multiprocessing.get_context(sys.argv[1])
    answers = context.Queue()
    process = context.Process(target=child, args=(answers,))
    process.start()
    print(answers.get(timeout=60) == [[64.0] * 32] * 3)
    process.join()
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_multiprocessing(method: str, tmp_path: Path) -> None:
    """By fork alone it does not work, and cannot: MLX's own stream threads do not survive one."""
    program = tmp_path / "program.py"
    program.write_text(FORK)
    done = subprocess.run(
        [sys.executable, str(program), method],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.stdout == "True\n", done.stderr
