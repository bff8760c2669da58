"""Each operation at the layer shapes of the five models, against this machine's memory: ``make bench-ops``.

One MoE layer of each family, random weights in 4 bits as its checkpoints have them, and every backend next
to mlx-lm's SwitchGLU and MLX's QuantizedLinear. An output is verified before it is timed: at up to
``_ROWS`` tokens, since tokens do not depend on one another, against the reference in float32.

**Bytes moved** are what the operation cannot avoid: every weight that takes part read once (the stacks of
the experts that at least one token chose; packed words, scales and offsets), activations, indices and
routing weights read once, the output written once. Nothing between the projections is counted. GB/s is that
over the median time, the roof the bandwidth measured in the same run. The native backend with a few tokens is
bound by memory: there the roof is measured again before and after every run, by as many threads, and what
is shown is the median of all runs' parts. Weights come from memory: each run takes the next of several
copies, which together are larger than the caches (as a model's layers are), and other experts than the last.
They are in the pages of memory where ``moefast.load`` puts them.

**As in a model**, several layers are one evaluation, each after the one before it, and the next evaluation is
built while one runs, as mlx-lm does when it generates: ``_LAYERS``, fewer where those would take longer than
``_STEP_SECONDS`` (what an evaluation costs by itself does not count then). Figures are for one layer.

**Operations** are two for each weight that a row is multiplied with; TFLOP/s and their part of the measured
peak say how good a prefill is, which is bound by arithmetic rather than by memory.

Options (conftest.py): ``--case-seconds`` skips what would take longer, by the time of the last smaller
case; ``--full`` runs everything and verifies every token.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle
from typing import Any

import mlx.core as mx
import mlx.nn
import numpy as np
import pytest
from conftest import Report
from mlx_lm.models.switch_layers import SwitchGLU

import moefast
from moefast import ExpertWeights, Projection, RouterSpec, Routing, testing
from moefast.lm.bench.models import build
from moefast.lm.presets import FAMILIES, preset
from moefast.lm.random_weights import random_parameters
from moefast.nn import MoE, Router
from moefast.nn.projection import projection_of

# The budget limits what runs, not the clock of the test suite.
pytestmark = pytest.mark.timeout(0)

_SEED = 0
_ROWS = 8
_ROUNDS = 20
# What runs go through before they meet the same weight again: more than a processor's caches hold.
_COLD_BYTES = 1 << 30
_STOCK = ("mlx-lm bf16", "mlx-lm fp32")
_BACKENDS = tuple(name for name, reason in moefast.backends().items() if reason is None)
# A decoded token, a small batch, a band that fills tiles, a prefill.
_TOKENS = (1, 8, 64, 512)
# So few tokens are bound by memory.
_FEW = 8
# Layers of an evaluation, unless they take longer than so many seconds.
_LAYERS = 8
_STEP_SECONDS = 0.1
# Evaluations before one that is timed: threads have slept or read other memory, and take a while to find the
# cores they keep.
_LEAD = 3

Run = Callable[[mx.array], Any]


@dataclass(frozen=True, eq=False)
class Layer:
    """What is measured of a layer.

    Attributes:
        family: whose layer it is.
        spec, selection_bias: of the router.
        experts: the stacks, by dtype of their scales: ``bfloat16`` and, with the same words, ``float32``.
        dense: the largest projection of the attention, likewise.
    """

    family: str
    spec: RouterSpec
    selection_bias: mx.array | None
    experts: dict[mx.Dtype, ExpertWeights]
    dense: dict[mx.Dtype, Projection]

    def routing(self, tokens: int, seed: int = _SEED) -> Routing:
        """What the reference makes of random logits."""
        logits = normal(tokens, self.spec.num_experts, seed)
        routing = moefast.route(logits, self.spec, selection_bias=self.selection_bias, backend="reference")
        mx.eval(routing)
        return routing


@pytest.fixture(scope="module", params=FAMILIES)  # of the module: cases come family by family
def layer(request: pytest.FixtureRequest) -> Layer:
    """The first layer of a family that has experts, with random weights."""
    model = build(preset(request.param, "layers=2"), bits=4)
    sparse, block = next((x, m) for x in model.layers for m in x.modules() if isinstance(m, MoE))
    random_parameters(sparse, seed=_SEED, dtype="bfloat16")
    mx.eval(sparse.parameters())
    router = block[block.names.router]
    experts = block[block.names.experts].expert_weights()
    inside = {id(m) for m in block.modules()}
    outside = [m for m in sparse.modules() if isinstance(m, mlx.nn.QuantizedLinear) and id(m) not in inside]
    dense = projection_of(max(outside, key=lambda m: m.weight.size))
    single = {name: in_float32(getattr(experts, name)) for name in ("gate", "up", "down")}
    return Layer(
        request.param,
        block.spec,
        router.selection_bias if isinstance(router, Router) else None,
        {mx.bfloat16: experts, mx.float32: ExpertWeights(**single, activation=experts.activation)},
        {mx.bfloat16: dense, mx.float32: in_float32(dense)},
    )


def in_float32(p: Projection) -> Projection:
    """The same packed words with scales, offsets and bias in float32."""
    scales, biases, bias = (a if a is None else a.astype(mx.float32) for a in (p.scales, p.biases, p.bias))
    mx.eval(scales, biases)
    return Projection(p.weight, scales, biases, bias=bias, quant=p.quant)


def copies_of(weight: Projection | ExpertWeights) -> list[Any]:
    """The weight and as many copies of it as make _COLD_BYTES together, in the pages where a model's are."""
    size = sum(p.nbytes for p in projections_of(weight))
    copies = [weight, *(copied(weight) for _ in range(_COLD_BYTES // size))]
    moefast.huge_pages(a for copy in copies for p in projections_of(copy) for a in p.arrays if a is not None)
    return copies


def copied(weight: Any) -> Any:
    """The same values in other memory."""
    if isinstance(weight, ExpertWeights):
        parts = {name: copied(getattr(weight, name)) for name in ("gate", "up", "down")}
        return ExpertWeights(**parts, activation=weight.activation)
    arrays = [
        None if a is None else mx.array(np.array(a.view(mx.uint8))).view(a.dtype) for a in weight.arrays
    ]
    mx.eval([a for a in arrays if a is not None])
    packed, scales, biases, bias, global_scale = arrays
    return Projection(packed, scales, biases, bias=bias, global_scale=global_scale, quant=weight.quant)


def projections_of(weight: Projection | ExpertWeights) -> tuple[Projection, ...]:
    """The parts of a weight."""
    return (weight,) if isinstance(weight, Projection) else tuple(weight.projections)


def normal(tokens: int, features: int, seed: int = _SEED) -> mx.array:
    """Random ``[tokens, features]`` in bfloat16."""
    x = mx.random.normal((tokens, features), key=mx.random.key(seed)).astype(mx.bfloat16)
    mx.eval(x)
    return x


def dtype_of(subject: str) -> mx.Dtype:
    """Backends run in bfloat16; of mlx-lm both are measured, since neither is the faster everywhere."""
    return mx.float32 if subject == "mlx-lm fp32" else mx.bfloat16


def rows_of(tokens: int, full: bool) -> mx.array:
    """The tokens to verify: the first, the last and some between."""
    count = tokens if full else min(tokens, _ROWS)
    return mx.array(np.linspace(0, tokens - 1, count).astype(np.uint32))


def stock_layer(layer: Any, p: Projection) -> Any:
    """A quantized layer of mlx or mlx-lm, with a projection's arrays for its own."""
    layer.weight, layer.scales, layer.biases = p.weight, p.scales, p.biases
    layer.bits, layer.group_size = p.quant.bits, p.quant.group_size
    if p.bias is not None:
        layer.bias = p.bias
    return layer


def stock_experts(w: ExpertWeights, routing: Routing) -> Run:
    """mlx-lm's SwitchGLU and the weighted sum that its models take of it."""
    switch = SwitchGLU(64, 64, 1)
    for name, p in (("gate_proj", w.gate), ("up_proj", w.up), ("down_proj", w.down)):
        setattr(switch, name, stock_layer(getattr(switch, name).to_quantized(), p))

    def run(x: mx.array) -> mx.array:
        y = switch(x, routing.indices)
        return (y * routing.weights[..., None]).sum(axis=-2).astype(y.dtype)

    return run


def nbytes(*arrays: mx.array | None) -> int:
    """Bytes of all arrays."""
    return sum(a.nbytes for a in arrays if a is not None)


class Steps:
    """Evaluations of so many runs each, in turn, as mlx-lm generates: each is built while the last one runs.
    Of a single run, which is long, that would show nothing: those are one after the other."""

    def __init__(self, runs: list[Run], x: mx.array, layers: int):
        self._turns = cycle(runs)
        self._x = x
        self._layers = layers
        self._running: Any = None

    def next(self) -> None:
        """Begin another evaluation and wait for the one before: once one runs, this takes as long."""
        out = next(self._turns)(self._x)
        if self._layers == 1:
            mx.eval(out)
            return
        for _ in range(self._layers - 1):  # each layer needs the one before it
            out = next(self._turns)(mx.depends(self._x, list(out) if isinstance(out, tuple) else out))
        mx.async_eval(out)
        self.finish()
        self._running = out

    def finish(self) -> None:
        """Wait for what has begun."""
        if self._running is not None:
            mx.eval(self._running)
            self._running = None


class Bench:
    """Verifies and times one case, unless it would take too long."""

    def __init__(self, benchmark: Any, report: Report, op: str, family: str, tokens: int, subject: str):
        self._benchmark = benchmark
        self._report = report
        self._case = {"op": op, "family": family, "tokens": tokens, "subject": subject}
        self._before = (op, family, subject)
        expected = report.expected(self._before, tokens)
        if expected > report.case_seconds:
            self._skip(f"would take about {expected:.0f} s")

    def __call__(
        self, runs: list[Run], x: mx.array, verify: Callable[[Any], float], moved: int, flops: int = 0
    ) -> None:
        """Time ``runs`` of ``x`` in turn, each of which returns arrays; ``verify`` raises AssertionError or
        returns the error of the first's."""
        try:
            start = time.perf_counter()
            output = runs[0](x)
            mx.eval(output)
            seconds = time.perf_counter() - start
        except ValueError as refusal:
            self._skip(str(refusal))
        self._report.took(self._before, self._case["tokens"], seconds)
        error = verify(output)
        if self._benchmark.disabled:
            return
        layers = max(1, min(_LAYERS, int(_STEP_SECONDS / seconds)))
        rounds = max(1, min(_ROUNDS, int(self._report.case_seconds / 2 / (layers * seconds))))
        steps = Steps(runs, x, layers)
        roofs: list[float] = []
        read = self._reader()

        def measure_roof() -> None:
            steps.finish()
            roofs.append(self._report.bandwidth.roof if read is None else read())

        def ready() -> None:
            measure_roof()
            for _ in range(_LEAD if layers > 1 else 0):
                steps.next()

        self._benchmark.pedantic(steps.next, setup=ready, rounds=rounds, warmup_rounds=rounds > 1)
        measure_roof()
        times = np.array(self._benchmark.stats.stats.data) / layers
        median = float(np.median(times))
        figures = {
            "seconds": median,
            "low": float(times.min()),
            "high": float(times.max()),
            "rounds": rounds,
            "layers": layers,
        }
        # Of each run what was measured just before and just after it.
        around = np.array(roofs[-rounds - 1 :])
        roof = float(np.median(moved / times / 1e9 / (around[:-1] + around[1:]) * 2))
        gb_s, tflop_s = moved / median / 1e9, flops / median / 1e12
        extra = {
            **self._case,
            "bytes": moved,
            "gb_s": gb_s,
            "of_bandwidth": roof,
            "tflop_s": tflop_s,
            "of_peak": tflop_s / self._report.peak if self._report.peak else None,
            "error": error,
        }
        self._benchmark.extra_info.update(extra)
        self._report.add({**extra, **figures})

    def _reader(self) -> Callable[[], float] | None:
        """What measures memory around each run, for what it bounds: the native backend with a few tokens."""
        bound = self._case["subject"] == "native" and self._case["tokens"] <= _FEW
        return self._report.read if bound else None

    def _skip(self, reason: str) -> None:
        self._report.add({**self._case, "skipped": reason})
        pytest.skip(reason)


@pytest.mark.parametrize("subject", _BACKENDS)
@pytest.mark.parametrize("tokens", [1, 64, 512])
def test_route(benchmark: Any, report: Report, layer: Layer, tokens: int, subject: str) -> None:
    """Logits ``[tokens, num_experts]`` to indices and weights ``[tokens, top_k]``."""
    bench = Bench(benchmark, report, "route", layer.family, tokens, subject)
    logits, bias, want = normal(tokens, layer.spec.num_experts), layer.selection_bias, layer.routing(tokens)

    def verify(got: Routing) -> float:
        testing.assert_same_routing(got, want, layer.spec, logits.dtype)
        order = [mx.argsort(r.indices, axis=-1) for r in (got, want)]
        weights = [mx.take_along_axis(r.weights, o, axis=-1) for r, o in zip((got, want), order, strict=True)]
        return testing.error(*weights).rms

    bench(
        [lambda x: moefast.route(x, layer.spec, selection_bias=bias, backend=subject)],
        logits,
        verify,
        nbytes(logits, bias, *want),
    )


@pytest.mark.parametrize("subject", [*_STOCK, *_BACKENDS])
@pytest.mark.parametrize("tokens", _TOKENS)
def test_experts(benchmark: Any, report: Report, layer: Layer, tokens: int, subject: str) -> None:
    """``[tokens, hidden]`` through each token's experts and their weighted sum."""
    bench = Bench(benchmark, report, "experts", layer.family, tokens, subject)
    dtype = dtype_of(subject)
    w, routing = layer.experts[dtype], layer.routing(tokens)
    x = normal(tokens, w.layout.hidden).astype(dtype)
    routings = [routing, *(layer.routing(tokens, _SEED + i) for i in range(1, _ROUNDS))]
    stack = nbytes(*(a for p in w.projections for a in p.arrays))
    chosen = float(np.mean([np.unique(np.asarray(r.indices)).size for r in routings]))
    moved = int(stack * chosen / w.layout.num_experts) + 2 * x.nbytes + nbytes(*routing)

    def verify(got: mx.array) -> float:
        rows = rows_of(tokens, report.full)
        want = expected_experts(layer, tokens, report.full)
        sizes = (w.layout.hidden, w.layout.width)
        limit = testing.bound(dtype, "experts", reductions=sizes, top_k=layer.spec.top_k)
        return judged(got[rows], want, limit, subject)

    def run_of(w: ExpertWeights, r: Routing) -> Run:
        if subject in _STOCK:
            return stock_experts(w, r)
        return lambda x: moefast.experts(x, w, r, backend=subject)

    copies = cold(w)
    runs = [run_of(copies[i % len(copies)], r) for i, r in enumerate(routings)]
    weights = sum(p.layout.out_dims * p.layout.in_dims for p in w.projections)
    bench(runs, x, verify, moved, 2 * tokens * layer.spec.top_k * weights)


@pytest.mark.parametrize("subject", [*_STOCK, *_BACKENDS])
@pytest.mark.parametrize("tokens", _TOKENS)
def test_quantized_matmul(benchmark: Any, report: Report, layer: Layer, tokens: int, subject: str) -> None:
    """``[tokens, in]`` times the largest projection of the attention."""
    bench = Bench(benchmark, report, "quantized_matmul", layer.family, tokens, subject)
    dtype = dtype_of(subject)
    p = layer.dense[dtype]
    x = normal(tokens, p.layout.in_dims).astype(dtype)
    rows = rows_of(tokens, report.full)

    def verify(got: mx.array) -> float:
        single = layer.dense[mx.float32]
        want = moefast.quantized_matmul(x[rows].astype(mx.float32), single, backend="reference")
        limit = testing.bound(dtype, "quantized_matmul", reductions=(p.layout.in_dims,))
        return judged(got[rows], want, limit, subject)

    def run_of(p: Projection) -> Run:
        if subject in _STOCK:
            return stock_layer(mlx.nn.Linear(64, 64, bias=False).to_quantized(), p)  # type: ignore[no-any-return]
        return lambda x: moefast.quantized_matmul(x, p, backend=subject)

    moved = p.nbytes + x.nbytes + x.itemsize * tokens * p.layout.out_dims
    bench([run_of(w) for w in cold(p)], x, verify, moved, 2 * tokens * p.layout.out_dims * p.layout.in_dims)


@lru_cache(maxsize=1)  # shared by the cases of a weight that follow one another
def cold(weight: Any) -> list[Any]:
    """See :func:`copies_of`."""
    return copies_of(weight)


@lru_cache(maxsize=1)  # shared by the subjects of a case, which follow one another
def expected_experts(layer: Layer, tokens: int, full: bool) -> mx.array:
    """The reference in float32 at the tokens to verify."""
    rows = rows_of(tokens, full)
    w, routing = layer.experts[mx.float32], layer.routing(tokens)
    x = normal(tokens, w.layout.hidden)[rows].astype(mx.float32)
    chosen = Routing(routing.indices[rows], routing.weights[rows].astype(mx.float32))
    y = moefast.experts(x, w, chosen, backend="reference")
    mx.eval(y)
    return y


def judged(got: mx.array, want: mx.array, limit: testing.Bound, subject: str) -> float:
    """The RMS error. MLX's CPU sums bfloat16 products in bfloat16: that baseline is not judged."""
    passed, error = testing.within(got, want, limit)
    assert passed or subject == "mlx-lm bf16", f"{error} exceeds {limit}"
    return error.rms
