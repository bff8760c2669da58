"""A small check of the kernels on the GPU that is here, against MLX's own operations: ``moefast doctor``.

The emulator shows that decode's bits are those of MLX's kernels. Whether this GPU agrees, only it can tell.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ... import testing
from ...registry import Problem, phase_of
from ...routing import Routing
from ...specs import QuantSpec, RouterSpec
from ...weights import ExpertWeights, Projection, dtype_name
from ..reference import REFERENCE
from . import block, verdicts
from .device import here
from .dispatch import kernels_for
from .launch import emulated
from .matvec import Fidelity

# Sizes at which MLX takes its fast mat-vec for gate and up, and the other one for down.
_HIDDEN, _WIDTH, _EXPERTS, _TOP_K = 512, 320, 8, 2
# Tokens that run each part's kernels, and the order in which they add up.
_TOKENS: dict[str, tuple[int, Fidelity]] = {
    "decode": (1, "exact"),
    "band": (5, "exact"),
    "tiles": (96, "exact"),
    "decode-fast": (1, "fast"),
    "band-fast": (5, "fast"),
}
_PACKINGS: tuple[QuantSpec | None, ...] = (
    *(QuantSpec(bits=bits) for bits in (2, 3, 4, 5, 6, 8)),
    QuantSpec(bits=4, group_size=32, mode="mxfp4"),
    QuantSpec(bits=8, group_size=32, mode="mxfp8"),
    QuantSpec(bits=4, group_size=16, mode="nvfp4"),
    None,
)
_ROUTERS = (
    RouterSpec(num_experts=64, top_k=6, renormalize=True),
    RouterSpec(num_experts=64, top_k=6, score_over="selected", ties="highest"),
    RouterSpec(num_experts=64, top_k=6, score="sigmoid", num_groups=8, top_groups=4, scale=2.5),
    RouterSpec(num_experts=64, top_k=6, score="sqrtsoftplus", renormalize=True),
)
# Small scores: a logarithm near 1 that is only nearly right would choose other experts.
_LOWEST = -9.0


class Comparison(NamedTuple):
    """A kernel against MLX's operations.

    Attributes:
        part: one of ``verdicts.PARTS``.
        name: what was computed.
        error: the largest error relative to its row, and the bound on it.
        different: results whose bits differ, of how many.
        exact: whether none may.
        failure: why there was no result.
    """

    part: str
    name: str
    error: float
    bound: float
    different: int
    of: int
    exact: bool
    failure: str = ""

    @property
    def reason(self) -> str | None:
        """What is wrong, or None."""
        if self.failure:
            return f"{self.name}: {self.failure}"
        if not self.error <= self.bound:  # NaN is wrong, too
            return f"{self.name}: error {self.error:.2g} exceeds {self.bound:.2g}"
        if self.exact and self.different:
            return f"{self.name}: {self.different} of {self.of} results are not MLX's"
        return None


@dataclass(frozen=True)
class Report:
    """All comparisons, and what follows."""

    comparisons: tuple[Comparison, ...]

    @property
    def failed(self) -> dict[str, str]:
        """part -> the first reason against it."""
        reasons: dict[str, str] = {}
        for comparison in self.comparisons:
            if comparison.reason is not None:
                reasons.setdefault(comparison.part, comparison.reason)
        return reasons

    def verdict(self) -> dict[str, Any]:
        """What is kept."""
        return {
            "failed": self.failed,
            "checked": len(self.comparisons),
            "bits_equal": sum(c.different == 0 for c in self.comparisons),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }


def check() -> Report:
    """Run every comparison on the default device. Stores nothing."""
    comparisons = [
        _tried("route", f"{spec.score} of {spec.num_experts} experts", partial(_of_router, spec))
        for spec in _ROUTERS
    ]
    for part in _TOKENS:
        for quant in _PACKINGS:
            for dtype in (mx.bfloat16, mx.float16):
                packing = "unquantized" if quant is None else f"{quant.mode} {quant.bits} bits"
                name = f"{part}, {packing}, {dtype_name(dtype)}"
                comparisons.append(_tried(part, name, partial(_of_experts, part, name, quant, dtype)))
    return Report(tuple(comparisons))


def _tried(part: str, name: str, compare: Callable[[], Comparison]) -> Comparison:
    """A comparison. A kernel that does not compile, or is refused at its launch, has no error to measure."""
    try:
        return compare()
    except (RuntimeError, ValueError) as error:
        return Comparison(part, name, float("nan"), 0.0, 0, 0, False, failure=str(error).strip()[:300])


def check_and_store() -> Report:
    """:func:`check`, and keep the verdict for this and later processes."""
    report = check()
    verdicts.store(report.verdict())
    return report


def _of_router(spec: RouterSpec) -> Comparison:
    logits = _normal(64, spec.num_experts, seed=0)
    logits = mx.concatenate([logits, logits + _LOWEST])
    problem = Problem("route", here(), logits.dtype, phase_of(logits.shape), (spec, None, None))
    run = block.bind(problem).run
    got, want = (f(logits, spec, None, None) for f in (run, REFERENCE.kernels["route"].run))
    in_order = [np.argsort(np.array(routing.indices), axis=-1) for routing in (got, want)]
    indices, weights = (
        [np.take_along_axis(testing.float64(r[i]), o, -1) for r, o in zip((got, want), in_order, strict=True)]
        for i in (0, 1)
    )
    same = (indices[0] == indices[1]).all(axis=-1)
    error = float("inf") if not same.all() else testing.error(*weights).max
    bound = testing.routing_bound(spec, logits.dtype).weights
    different = int((weights[0] != weights[1]).sum())
    name = f"{spec.score} of {spec.num_experts} experts"
    return Comparison("route", name, error, bound, different, weights[0].size, False)


def _of_experts(part: str, name: str, quant: QuantSpec | None, dtype: mx.Dtype) -> Comparison:
    tokens, fidelity = _TOKENS[part]
    assert kernels_for(tokens, _TOP_K, _EXPERTS, generation=0) == part.removesuffix("-fast")
    x = _normal(tokens, _HIDDEN, seed=1).astype(dtype)
    weights = ExpertWeights(
        gate=_projection(_WIDTH, _HIDDEN, quant, dtype, 2),
        up=_projection(_WIDTH, _HIDDEN, quant, dtype, 3),
        down=_projection(_HIDDEN, _WIDTH, quant, dtype, 4),
    )
    rng = np.random.default_rng(5)
    chosen = np.stack([rng.permutation(_EXPERTS)[:_TOP_K] for _ in range(tokens)])
    mix = mx.softmax(_normal(tokens, _TOP_K, seed=6), axis=-1)
    routing = Routing(mx.array(chosen.astype(np.uint32)), mix)
    details = (weights.layout, _TOP_K, dtype_name(mix.dtype), None)
    problem = Problem("experts", here(), dtype, phase_of(x.shape), details)
    got = block.bind(problem, fidelity).run(x, weights, routing, None)
    want = REFERENCE.kernels["experts"].run(x, weights, routing, None)
    limit = testing.bound(dtype, "experts", reductions=(_HIDDEN, _WIDTH), top_k=_TOP_K)
    figures = testing.error(got, testing.float64(want))
    different = int((testing.float64(got) != testing.float64(want)).sum())
    # On a CPU the reference adds up in float32, in another order.
    affine = quant is not None and quant.mode == "affine"
    exact = part == "decode" and affine and not emulated()
    return Comparison(
        part,
        name,
        figures.max,
        2 * limit.max,  # both err
        different,
        got.size,
        exact,
    )


def _normal(*shape: int, seed: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def _projection(
    out_dims: int, in_dims: int, quant: QuantSpec | None, dtype: mx.Dtype, seed: int
) -> Projection:
    weight = (_normal(_EXPERTS, out_dims, in_dims, seed=seed) * in_dims**-0.5).astype(dtype)
    if quant is None:
        return Projection(weight)
    packed = mx.quantize(weight, quant.group_size, quant.bits, mode=quant.mode)
    return Projection(*packed, quant=quant)
