"""Every weight format, the native backend next to stock MLX: ``python -m pytest benchmarks/formats.py``.

``experts``: 4 of 16 experts a token, hidden 2048, width 1408 (Qwen1.5-MoE's sizes), beside mlx-lm's
SwitchGLU and the weighted sum its models take of it. ``quantized_matmul``: 4096 x 2048, beside MLX's own
product. Both in bfloat16 and in float32, at 1 and 8 tokens; the ratio is to stock MLX in the same dtype. Runs
take turns (stock, native, stock, native), so that a busy machine disturbs both; each takes other experts, or
another copy of the weight, than the last. Outputs are verified first, as in ops.py.

Another instruction set than the best: ``MOEFAST_ISA=avx2 python -m pytest benchmarks/formats.py``. Takes ten
minutes, most of it stock MLX in bfloat16; ``-k "experts and nvfp4"`` narrows it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import Report
from mlx_lm.models.switch_layers import SwitchGLU

import moefast
from moefast import ExpertWeights, Projection, QuantSpec, Routing, testing

pytestmark = [
    pytest.mark.timeout(0),
    pytest.mark.skipif(moefast.backends()["native"] is not None, reason=f"{moefast.backends()['native']}"),
]

HIDDEN, WIDTH, EXPERTS, TOP_K, OUT = 2048, 1408, 16, 4, 4096
_NATIVE_RUNS = 25
# Stock MLX's, and the seconds after which there are no more.
_STOCK_RUNS, _STOCK_SECONDS = 7, 6.0

FORMATS: dict[str, QuantSpec | mx.Dtype] = {
    **{f"affine{bits}-g{group}": QuantSpec(bits=bits, group_size=group)
       for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)},
    "mxfp4": QuantSpec(mode="mxfp4", bits=4, group_size=32),
    "mxfp8": QuantSpec(mode="mxfp8", bits=8, group_size=32),
    "nvfp4": QuantSpec(mode="nvfp4", bits=4, group_size=16),
    "float16": mx.float16,
    "float32": mx.float32,
    "bfloat16": mx.bfloat16,
}  # fmt: skip
SHORT = {mx.bfloat16: "bf16", mx.float32: "fp32"}

each = [
    pytest.mark.parametrize("tokens", [1, 8]),
    pytest.mark.parametrize("dtype", SHORT, ids=SHORT.values()),
    pytest.mark.parametrize("name", FORMATS),
][::-1]


@lru_cache(maxsize=4)
def stored(name: str, dtype: mx.Dtype, *shape: int) -> Projection:
    """A random weight in a format, with scales in ``dtype``."""
    key = mx.random.key(sum(shape))
    weight = (mx.random.normal(shape, key=key) * shape[-1] ** -0.5).astype(dtype)
    format_ = FORMATS[name]
    if isinstance(format_, mx.Dtype):
        p = Projection(weight.astype(format_))
    else:
        p = Projection(*mx.quantize(weight, **format_.mlx_arguments()), quant=format_)
    mx.eval([a for a in p.arrays if a is not None])
    return p


def stock_product(x: mx.array, p: Projection) -> mx.array:
    """What ``mlx.nn.QuantizedLinear`` or ``mlx.nn.Linear`` computes."""
    if p.quant is None:
        return x @ p.weight.T
    return mx.quantized_matmul(x, p.weight, p.scales, p.biases, transpose=True, **p.quant.mlx_arguments())


def stock_experts(weights: ExpertWeights) -> SwitchGLU:
    """mlx-lm's layer on the same arrays."""
    layer = SwitchGLU(128, 128, 1)  # any widths that every group size divides: the arrays are replaced
    for name in ("gate", "up", "down"):
        p, linear = getattr(weights, name), layer[f"{name}_proj"]
        if p.quant is not None:
            linear = linear.to_quantized(**p.quant.mlx_arguments())
            linear.scales = p.scales
            linear.pop("biases", None)
            if p.biases is not None:
                linear.biases = p.biases
        linear.weight = p.weight
        setattr(layer, f"{name}_proj", linear)
    return layer


class Case:
    """Verifies and times a pair of subjects in turn, and reports both."""

    def __init__(self, report: Report, op: str, name: str, dtype: mx.Dtype, tokens: int):
        self._report = report
        self._case = {"op": op, "family": f"{name} {SHORT[dtype]}", "tokens": tokens}
        self._dtype = dtype

    def __call__(
        self,
        stock: Callable[[int], mx.array],
        native: Callable[[int], mx.array],
        want: mx.array,
        limit: testing.Bound,
        moved: int,
        flops: int,
    ) -> None:
        """``stock`` and ``native`` take the number of a run; ``want`` is what run 0 should give."""
        y = native(0)
        passed, error = testing.within(y, want, limit)
        assert passed, f"{error} exceeds {limit}"
        errors = {"native": error.rms}
        seconds: dict[str, list[float]] = {"stock MLX": [], "native": []}
        refused = ""
        try:
            errors["stock MLX"] = testing.error(stock(0), want).rms
        except (ValueError, RuntimeError) as error_of_stock:
            refused = str(error_of_stock).splitlines()[0]
        for i in range(_NATIVE_RUNS):
            spent = sum(seconds["stock MLX"])
            if not refused and i < _STOCK_RUNS and (i < 2 or spent < _STOCK_SECONDS):
                seconds["stock MLX"].append(timed(stock, i))
            seconds["native"].append(timed(native, i))
        median = {subject: statistics.median(s) for subject, s in seconds.items() if s}
        if refused:
            self._report.add({**self._case, "subject": "mlx-lm", "skipped": refused})
        for subject, each_run in seconds.items():
            if each_run:
                self._add(subject, median[subject], each_run, moved, flops, errors[subject])

    def _add(
        self, subject: str, median: float, runs: list[float], moved: int, flops: int, error: float
    ) -> None:
        peak = self._report.peak
        self._report.add(
            {
                **self._case,
                "subject": "mlx-lm" if subject == "stock MLX" else subject,
                "seconds": median,
                "low": min(runs),
                "high": max(runs),
                "rounds": len(runs),
                "bytes": moved,
                "gb_s": moved / median / 1e9,
                "of_bandwidth": moved / median / 1e9 / self._report.bandwidth.roof,
                "tflop_s": flops / median / 1e12,
                "of_peak": flops / median / 1e12 / peak if peak else None,
                "error": error,
            }
        )


def timed(run: Callable[[int], mx.array], i: int) -> float:
    start = time.perf_counter()
    mx.eval(run(i))
    return time.perf_counter() - start


def apply(function: Any) -> Any:
    """Every combination, format by format."""
    for mark in each:
        function = mark(function)
    return function


@apply
def test_experts(report: Report, name: str, dtype: mx.Dtype, tokens: int) -> None:
    """``[tokens, hidden]`` through each token's experts and their weighted sum."""
    up, down = (EXPERTS, WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH)
    gate, last = stored(name, dtype, *up), stored(name, dtype, *down)
    weights = ExpertWeights(gate=gate, up=gate, down=last)
    rng = np.random.default_rng(0)
    x = mx.random.normal((tokens, HIDDEN), key=mx.random.key(1)).astype(dtype)
    routings = [
        Routing(
            mx.array(rng.permuted(np.tile(np.arange(EXPERTS), (tokens, 1)), axis=1)[:, :TOP_K].astype("u4")),
            mx.softmax(mx.array(rng.standard_normal((tokens, TOP_K)).astype("f4")), axis=-1),
        )
        for _ in range(_NATIVE_RUNS)
    ]
    mx.eval(x, routings)
    layer = stock_experts(weights)

    def stock(i: int) -> mx.array:
        y = layer(x, routings[i].indices)
        return (y * routings[i].weights[..., None]).sum(axis=-2).astype(y.dtype)

    def native(i: int) -> mx.array:
        return moefast.experts(x, weights, routings[i], backend="native")

    chosen = float(np.mean([np.unique(np.array(r.indices)).size for r in routings]))
    values = 3 * HIDDEN * WIDTH
    stack = 2 * gate.nbytes + last.nbytes
    want = moefast.experts(x.astype(mx.float32), weights, routings[0], backend="reference")
    limit = testing.bound(dtype, "experts", reductions=(HIDDEN, WIDTH), top_k=TOP_K)
    moved = int(stack * chosen / EXPERTS) + 2 * x.nbytes
    flops = 2 * tokens * TOP_K * values
    Case(report, "experts", name, dtype, tokens)(stock, native, want, limit, moved, flops)


@apply
def test_quantized_matmul(report: Report, name: str, dtype: mx.Dtype, tokens: int) -> None:
    """``[tokens, 2048]`` times a dense weight of 4096 rows, one of four by turns."""
    stack = stored(name, dtype, 4, OUT, HIDDEN)
    weights = []
    for i in range(4):
        weight, scales, biases, *_ = (a if a is None else a[i] for a in stack.arrays)
        weights.append(Projection(weight, scales, biases, quant=stack.quant))
    mx.eval([a for p in weights for a in p.arrays if a is not None])
    x = mx.random.normal((tokens, HIDDEN), key=mx.random.key(1)).astype(dtype)
    mx.eval(x)
    single = x.astype(mx.float32)
    want = moefast.quantized_matmul(single, weights[0], backend="reference")
    limit = testing.bound(dtype, "quantized_matmul", reductions=(HIDDEN,))
    moved = stack.nbytes // 4 + x.nbytes + tokens * OUT * x.itemsize
    Case(report, "quantized_matmul", name, dtype, tokens)(
        lambda i: stock_product(x, weights[i % 4]),
        lambda i: moefast.quantized_matmul(x, weights[i % 4], backend="native"),
        want,
        limit,
        moved,
        2 * tokens * OUT * HIDDEN,
    )
