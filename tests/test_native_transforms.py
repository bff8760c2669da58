"""The native backend under MLX's transformations, streams and threads, through either of its bindings: MLX
primitives, and NumPy where those were built for another MLX."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn
import numpy as np
import pytest
from factories import Floats, MakeExperts, MakeShared
from formats import BY_NAME
from marks import needs_native

from moefast import (
    ExpertWeights,
    Projection,
    RouterSpec,
    Routing,
    SharedExpert,
    experts,
    moe,
    nn,
    quantized_matmul,
    route,
    switch_glu,
    use_backend,
)
from moefast.backends import native, registry
from moefast.backends.native import loading
from moefast.ops import attention
from moefast.registry import Backend
from moefast.testing import assert_close, assert_gradients_close, float64

pytestmark = [
    needs_native,
    pytest.mark.usefixtures("cpu"),
]

SPEC = RouterSpec(num_experts=6, top_k=2, score="sigmoid", renormalize=True)
TOKENS, HIDDEN, WIDTH = 5, 32, 64


def bind(name: str, patch: pytest.MonkeyPatch) -> None:
    """Run through primitives or through NumPy, whatever the build would take."""
    found = loading.bindings()
    if name == "primitives":
        if not found.native:
            pytest.skip(found.reason)
        return
    kernels = pytest.importorskip("moefast._kernels")
    patch.setattr(loading, "_found", loading.Bindings(None, kernels, "pretended"))
    patch.setattr(registry, "_choices", {})


@pytest.fixture(params=["primitives", "numpy"])
def binding(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either of them."""
    bind(request.param, monkeypatch)


@pytest.fixture
def primitives(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what only they can."""
    bind("primitives", monkeypatch)


@pytest.fixture
def through_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what is said there."""
    bind("numpy", monkeypatch)


class Layer:
    """The arguments of every operation, and the operations as functions of what may vary."""

    def __init__(self, floats: Floats, weights: ExpertWeights, shared: SharedExpert, dtype: mx.Dtype):
        self.weights, self.shared, self.dtype = weights, shared, dtype
        self.x, self.logits = floats(TOKENS, HIDDEN, dtype=dtype), floats(TOKENS, 6)
        self.bias = floats(6, scale=0.1)
        self.indices = mx.array([[0, 1], [5, 2], [3, 3], [4, 0], [1, 2]])
        self.mix = mx.softmax(floats(TOKENS, 2), axis=-1)
        self.heads = (floats(2, 4, TOKENS, 16), floats(2, 2, 7, 16), floats(2, 2, 7, 24))

    def arrays(self) -> list[mx.array]:
        """Of all weights."""
        projections = [*self.weights.projections, self.shared.gate, self.shared.up, self.shared.down]
        return [a for p in (*projections, self.shared.output_gate) for a in p.arrays if a is not None]

    def operations(self, backend: str) -> dict[str, tuple[Callable[..., mx.array], tuple[mx.array, ...]]]:
        """name -> a function of arrays, and the arrays."""
        by_expert = mx.arange(6) * 0.5 + 1

        def routed(logits: mx.array, bias: mx.array) -> mx.array:
            found = route(logits, SPEC, selection_bias=bias, backend=backend)
            return (found.weights * by_expert[found.indices]).sum(axis=-1)  # whatever the order of experts

        return {
            "quantized_matmul": (
                lambda x: quantized_matmul(x, self.shared.up, backend=backend),
                (self.x,),
            ),
            "switch_glu": (
                lambda x: switch_glu(x, self.weights, self.indices, backend=backend),
                (self.x,),
            ),
            "experts": (
                lambda x, mix: experts(x, self.weights, Routing(self.indices, mix), backend=backend),
                (self.x, self.mix),
            ),
            "route": (routed, (self.logits, self.bias)),
            "moe": (
                lambda x, logits, bias: moe(
                    x,
                    logits,
                    SPEC,
                    self.weights,
                    selection_bias=bias,
                    shared=self.shared,
                    backend=backend,
                ),
                (self.x, self.logits, self.bias),
            ),
            "attention": (
                lambda *heads: attention(*heads, scale=0.25, causal=True, backend=backend),
                self.heads,
            ),
        }


@pytest.fixture(params=["plain", "affine4-g32", "mxfp4"])
def layer(
    request: pytest.FixtureRequest, floats: Floats, expert_weights: MakeExperts, shared_expert: MakeShared
) -> Layer:
    format_ = BY_NAME[request.param].of(mx.float32)
    weights = expert_weights(6, HIDDEN, WIDTH, bias=True, **format_)
    made = Layer(floats, weights, shared_expert(HIDDEN, WIDTH, output_gate=True, **format_), mx.float32)
    # MLX evaluates nothing on one thread that was begun on another.
    mx.eval(made.arrays(), made.x, made.logits, made.bias, made.indices, made.mix, made.heads)
    return made


ops = pytest.mark.parametrize(
    "op", ["quantized_matmul", "switch_glu", "experts", "route", "moe", "attention"]
)
CLOSE = {"reductions": (HIDDEN, WIDTH), "top_k": 2, "gradient": True}


def scalar(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """The square sum: its derivative needs the value as well."""
    return lambda *arrays: (function(*arrays).astype(mx.float32) ** 2).sum()


def every(arrays: tuple[mx.array, ...]) -> tuple[int, ...]:
    return tuple(range(len(arrays)))


def check_alike(got: Any, want: Any) -> None:
    for mine, theirs in zip(got, want, strict=True):
        assert mine.dtype == theirs.dtype
        assert_close(mine.reshape(1, -1), float64(theirs).reshape(1, -1), "moe", **CLOSE)


# -- derivatives -------------------------------------------------------------------------------------------


@ops
@pytest.mark.usefixtures("binding")
def test_gradients_are_the_references(op: str, layer: Layer) -> None:
    (run, arrays), (reference, _) = (layer.operations(b)[op] for b in ("native", "reference"))
    value, got = mx.value_and_grad(scalar(run), argnums=every(arrays))(*arrays)
    expected, want = mx.value_and_grad(scalar(reference), argnums=every(arrays))(*arrays)
    check_alike([value, *got], [expected, *want])


@ops
@pytest.mark.usefixtures("binding")
def test_gradients_of_a_part_of_the_arguments(op: str, layer: Layer) -> None:
    """Only what is asked for is differentiated."""
    (run, arrays), (reference, _) = (layer.operations(b)[op] for b in ("native", "reference"))
    for i in every(arrays):
        got, want = (mx.grad(scalar(f), argnums=i)(*arrays) for f in (run, reference))
        check_alike([got], [want])


@ops
@pytest.mark.usefixtures("binding")
def test_checkpointed(op: str, layer: Layer) -> None:
    run, arrays = layer.operations("native")[op]
    got, want = (mx.grad(scalar(f), argnums=every(arrays))(*arrays) for f in (mx.checkpoint(run), run))
    for mine, same in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.array(mine), np.array(same))


@ops
@pytest.mark.usefixtures("primitives")
def test_directional_derivatives(op: str, layer: Layer, floats: Floats) -> None:
    (run, arrays), (reference, _) = (layer.operations(b)[op] for b in ("native", "reference"))
    tangents = [floats(*a.shape) for a in arrays]
    try:
        want = mx.jvp(reference, arrays, tangents)
    except (RuntimeError, ValueError) as error:
        pytest.skip(f"MLX has no such derivative of the reference: {error}")
    check_alike(mx.jvp(run, arrays, tangents)[1], want[1])


@ops
@pytest.mark.usefixtures("primitives")
def test_second_derivatives(op: str, layer: Layer) -> None:
    """The reference's vjp is itself made of differentiable operations."""
    (run, arrays), (reference, _) = (layer.operations(b)[op] for b in ("native", "reference"))

    def curvature(function: Callable[..., mx.array]) -> mx.array:
        return mx.grad(lambda *a: (mx.grad(scalar(function))(*a) ** 2).sum())(*arrays)

    try:
        want = curvature(reference)
    except (RuntimeError, ValueError) as error:
        pytest.skip(f"MLX has no such derivative of the reference: {error}")
    check_alike([curvature(run)], [want])


@pytest.mark.usefixtures("binding")
def test_every_parameter_of_a_block(floats: Floats) -> None:
    """Outside of training the kernels run; their derivatives reach all parameters, stacks included."""
    block = nn.MoE(SPEC, HIDDEN, WIDTH, shared_width=WIDTH, shared_gate=True, bias=True)
    x, slopes = floats(2, TOKENS, HIDDEN), floats(2, TOKENS, HIDDEN)

    def gradients() -> dict[str, mx.array]:
        _, found = mlx.nn.value_and_grad(block, lambda: (block(x) * slopes).sum())()
        return dict(mlx.utils.tree_flatten(found))

    block.train()
    want = gradients()
    block.eval()
    with use_backend("native"):
        got = gradients()
    assert_gradients_close(got, want, layers=1, hidden=HIDDEN)


# -- compilation -------------------------------------------------------------------------------------------


@ops
@pytest.mark.usefixtures("primitives")
@pytest.mark.parametrize("shapeless", [False, True])
def test_compiled(op: str, shapeless: bool, layer: Layer) -> None:
    run, arrays = layer.operations("native")[op]
    traces = []

    def traced(*arrays: mx.array) -> mx.array:
        traces.append(arrays[0].shape)
        return run(*arrays) + 1

    compiled = mx.compile(traced, shapeless=shapeless)
    for tokens in (TOKENS, 2, TOKENS):
        call = [a[:tokens] if a.shape[0] == TOKENS else a for a in arrays]
        if op in ("switch_glu", "experts") and tokens != TOKENS:
            continue  # the indices are a constant of the trace
        got, want = compiled(*call), run(*call) + 1
        np.testing.assert_array_equal(np.array(got), np.array(want))
    assert len(traces) <= (1 if shapeless else 2)


@ops
@pytest.mark.usefixtures("primitives")
def test_compiled_gradient(op: str, layer: Layer) -> None:
    run, arrays = layer.operations("native")[op]
    plain = mx.value_and_grad(scalar(run), argnums=every(arrays))
    (value, got), (expected, want) = mx.compile(plain)(*arrays), plain(*arrays)
    check_alike([value, *got], [expected, *want])


@pytest.mark.usefixtures("primitives")
def test_shapeless_with_other_weights(floats: Floats) -> None:
    """Shapes are checked again when they are known: a compiled function cannot smuggle in others."""
    compiled = mx.compile(lambda x, w: quantized_matmul(x, Projection(w), backend="native"), shapeless=True)
    x = floats(3, 32)
    assert compiled(x, floats(16, 32)).shape == (3, 16)
    with pytest.raises(ValueError, match="weight must have the shape and dtype this call was made for"):
        mx.eval(compiled(x, floats(8, 32)))


@pytest.mark.usefixtures("primitives")
def test_equal_operations_are_computed_once(layer: Layer, tmp_path: Path) -> None:
    run, arrays = layer.operations("native")["moe"]
    compiled = mx.compile(lambda *a: run(*a) + run(*a))
    assert mx.array_equal(compiled(*arrays), 2 * run(*arrays))
    file = tmp_path / "graph.dot"
    mx.export_to_dot(str(file), run(*arrays))
    assert file.read_text().count("moefast_moe") == 1


@ops
@pytest.mark.usefixtures("through_numpy")
def test_numpy_says_that_it_cannot_be_compiled(op: str, layer: Layer) -> None:
    run, arrays = layer.operations("native")[op]
    with pytest.raises(ValueError, match=rf"\[{op}\] .*compile and vmap with use_backend\('reference'\)"):
        mx.compile(run)(*arrays)
    assert mx.isfinite(run(*arrays)).all()


@pytest.mark.usefixtures("primitives")
def test_export_needs_the_reference(layer: Layer, tmp_path: Path) -> None:
    """MLX exports the primitives it knows; the reference consists of those."""
    run, arrays = layer.operations("native")["quantized_matmul"]
    with pytest.raises(ValueError, match="Unable to serialize primitive moefast_quantized_matmul"):
        mx.export_function(str(tmp_path / "f.mlxfn"), run, *arrays)
    with use_backend("reference"):
        mx.export_function(str(tmp_path / "g.mlxfn"), lambda x: quantized_matmul(x, layer.shared.up), *arrays)
    (got,) = mx.import_function(str(tmp_path / "g.mlxfn"))(*arrays)
    assert_close(got, float64(run(*arrays)), "moe", **CLOSE)


# -- vmap --------------------------------------------------------------------------------------------------


@ops
@pytest.mark.usefixtures("primitives")
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_vmap_over_tokens(op: str, axis: int, layer: Layer) -> None:
    """One more leading dimension, wherever it stood, and whether the others have it or not."""
    run, (first, *others) = layer.operations("native")[op]
    batch = mx.stack([first, 2 * first, -first])
    moved = mx.moveaxis(batch, 0, axis)
    got = mx.vmap(run, in_axes=(axis, *[None] * len(others)))(moved, *others)
    want = mx.stack([run(one, *others) for one in batch])
    assert_close(got, float64(want), "moe", **CLOSE)


@pytest.mark.usefixtures("primitives")
def test_vmap_over_weights(floats: Floats) -> None:
    """Several weights at once is what the reference is for."""
    x, stack = floats(3, 32), floats(4, 16, 32)
    got = mx.vmap(lambda w: quantized_matmul(x, Projection(w), backend="native"))(stack)
    assert_close(got, float64(x) @ float64(stack).swapaxes(1, 2), "moe", **CLOSE)


# -- laziness, streams, threads ----------------------------------------------------------------------------


@ops
@pytest.mark.usefixtures("primitives")
def test_nothing_runs_before_it_is_needed(op: str, layer: Layer) -> None:
    """The inputs cannot be evaluated; whoever tries, raises."""
    run, arrays = layer.operations("native")[op]
    never = mx.array([0, 7])
    poison = switch_glu(mx.zeros((1, HIDDEN)), layer.weights, never[None], backend="native").sum()
    y = run(*(a + poison for a in arrays))
    with pytest.raises(ValueError, match="indices must be in"):
        mx.eval(y)
    assert mx.isfinite(run(*arrays)).all()


@ops
@pytest.mark.usefixtures("binding")
def test_on_any_stream(op: str, layer: Layer) -> None:
    run, arrays = layer.operations("native")[op]
    want = run(*arrays)
    streams = [mx.new_stream(mx.cpu) for _ in range(3)]
    results = []
    for i in range(12):  # each reads what another stream made
        with mx.stream(streams[i % 3]):
            results.append(run(*(a + 0 for a in arrays)))
    with mx.stream(streams[0]):
        total = sum(results[1:], results[0])
    assert_close(total, 12 * float64(want), "moe", **CLOSE)


@ops
@pytest.mark.usefixtures("binding")
def test_derivatives_stay_on_the_operations_stream(op: str, layer: Layer) -> None:
    run, arrays = layer.operations("native")[op]
    want = mx.grad(scalar(run))(*arrays)
    stream = mx.new_stream(mx.cpu)

    def on_stream(*arrays: mx.array) -> mx.array:
        with mx.stream(stream):
            return run(*arrays)

    check_alike([mx.grad(scalar(on_stream))(*arrays)], [want])
    assert mx.default_device() == mx.cpu


@ops
@pytest.mark.usefixtures("binding")
def test_in_many_threads_at_once(op: str, layer: Layer) -> None:
    """Values, derivatives and errors in each thread, on a stream of its own."""
    run, arrays = layer.operations("native")[op]
    want, slope = np.array(run(*arrays)), np.array(mx.grad(scalar(run))(*arrays))
    mx.eval(arrays)
    bad, zeros = mx.array([[0, 6]]), mx.zeros((1, HIDDEN))
    mx.eval(bad, zeros)
    together = threading.Barrier(4)

    def work(_: int) -> int:
        together.wait()
        wrong = 0
        with mx.stream(mx.new_stream(mx.cpu)):
            for i in range(20):
                got = run(*arrays)
                wrong += not np.array_equal(np.array(got), want)
                if i % 5 == 0:
                    wrong += not np.array_equal(np.array(mx.grad(scalar(run))(*arrays)), slope)
                    with pytest.raises(ValueError, match="indices must be in"):
                        mx.eval(switch_glu(mx.flatten(arrays[0])[:1] + zeros, layer.weights, bad))
        return wrong

    with ThreadPoolExecutor(4) as pool, use_backend("native"):
        assert sum(pool.map(work, range(4))) == 0


@pytest.mark.usefixtures("primitives")
@pytest.mark.parametrize("inside", ["compile", "grad", "vmap", "thread"])
def test_the_first_call_may_be_anywhere(inside: str, floats: Floats, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe evaluates something of its own, even while a function is being traced."""
    monkeypatch.setattr(loading, "_found", None)
    renewed = Backend(native.NATIVE.name, native.NATIVE.kernels, native.NATIVE.probe)
    backends = tuple(renewed if b.name == "native" else b for b in registry.backends)
    monkeypatch.setattr(registry, "backends", backends)
    monkeypatch.setattr(registry, "_choices", {})
    weight, x = Projection(mx.ones((4, 8))), floats(3, 8)
    mx.eval(weight.weight, x)

    def run(x: mx.array) -> mx.array:
        return quantized_matmul(x, weight, backend="native")

    want = x.sum(axis=-1, keepdims=True) + mx.zeros((3, 4))
    if inside == "compile":
        got = mx.compile(run)(x)
    elif inside == "grad":
        got, want = mx.grad(lambda x: run(x).sum())(x), mx.full((3, 8), 4.0)
    elif inside == "vmap":
        got = mx.vmap(run)(x[:, None])[:, 0]
    else:
        with ThreadPoolExecutor(1) as pool:
            got = mx.array(pool.submit(lambda: np.array(run(x))).result())
    assert loading._found is not None
    assert loading._found.native is not None
    assert_close(got, float64(want), "moe", **CLOSE)
