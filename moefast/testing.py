"""How close is close enough: every numeric tolerance of moefast, and where it comes from.

Tests and benchmarks compare with a float64 oracle through this module and state no number of their own.
An output passes when its error is at most twice that of a correct implementation in the same dtype: one
that accumulates in float32 and rounds where mlx-lm rounds on a GPU (after gate, up, activation, down and
combine).

**The model.** Let ``u`` be the unit roundoff of the dtype (2^-24 float32, 2^-11 float16, 2^-8 bfloat16).

- One rounding has a relative error uniform in ``[-u, u]``, at most ``u / sqrt(3)`` in RMS. Roundings are
  independent, so ``R`` of them on the way to an output give ``u sqrt(R / 3)``. A sum of many terms with
  independent errors keeps their relative RMS, so roundings before a dot product count like those after.
- Adding up ``K`` terms of either sign one after another in float32, the partial sums grow like ``sqrt(k)``,
  and their roundings add up to ``u32 sqrt(K / 6)`` relative to the result: the growth with ``sqrt(K)``.
- An ``exp`` or ``tanh`` in float32 is a few ulp off in RMS (on MLX's CPU less, but 16 at worst).

The three are added in quadrature, and twice their sum bounds the RMS error. The largest single error is
taken relative to the largest magnitude of its row. Both are tails of near-Gaussian samples, that of the
errors being the larger sample: it gets twice the RMS bound, once more. On random data a correct
implementation comes to 0.2-0.6 of either bound; accumulating in bfloat16 exceeds them several times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from .specs import RouterSpec

Float64 = npt.NDArray[np.float64]

_UNIT_ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
_U32 = _UNIT_ROUNDOFF["float32"]

# "At most twice the error of a correct implementation."
_SLACK = 2.0
# The largest error over the row's largest magnitude, in RMS errors.
_PEAK = 2.0
# RMS error of one exp or tanh, in units of float32's roundoff.
_FUNCTION_ROUNDOFFS = 4.0
_SCORE_ULPS = 32.0
# Of a score, bias, key, sum, quotient and scale in half precision, on both sides of the cut.
_SCORE_ROUNDINGS = 8.0
# Plain (not precise) softmax in half precision rounds x - max, exp, sum and quotient: measured 12.6 u.
_PLAIN_SOFTMAX_ROUNDINGS = 16.0


class Error(NamedTuple):
    """How far an output is from the truth.

    Attributes:
        max: largest absolute error over the largest magnitude of its row.
        rms: root mean square, over the rows, of each row's RMS error over its RMS value.
    """

    max: float
    rms: float


class Bound(NamedTuple):
    """The largest :class:`Error` that passes."""

    max: float
    rms: float

    def admits(self, error: Error) -> bool:
        """Whether both figures are within the bound. NaN is not."""
        return error.max <= self.max and error.rms <= self.rms


def unit_roundoff(dtype: mx.Dtype | str) -> float:
    """Half the distance from 1 to the next larger number of ``dtype``."""
    return _UNIT_ROUNDOFF[str(dtype).removeprefix("mlx.core.")]


def float64(array: Any) -> Float64:
    """The exact values of an ``mx.array`` (or of anything NumPy takes) in float64."""
    if isinstance(array, mx.array) and array.dtype == mx.bfloat16:  # NumPy has no bfloat16
        array = array.astype(mx.float32)
    return np.asarray(array).astype(np.float64)


def error(got: Any, want: Any) -> Error:
    """The error of ``got`` against the float64 truth ``want``, both ``[..., row]``.

    Anything that is not finite in ``got`` and finite in ``want`` is an infinite error.
    """
    got, want = float64(got), float64(want)
    if got.shape != want.shape:
        raise AssertionError(f"[error] shapes must be equal, got {got.shape} and {want.shape}.")
    if not want.size:
        return Error(0.0, 0.0)
    got, want = np.atleast_1d(got), np.atleast_1d(want)
    finite = np.isfinite(want)
    with np.errstate(invalid="ignore"):
        wrong = np.abs(got - want)
    wrong = np.where(finite, np.where(np.isnan(wrong), np.inf, wrong), np.where(got == want, 0.0, np.inf))
    size = np.abs(np.where(finite, want, 0.0))
    largest = _quotient(wrong.max(axis=-1), size.max(axis=-1))
    with np.errstate(over="ignore", invalid="ignore"):
        squares = _quotient((wrong**2).mean(axis=-1), (size**2).mean(axis=-1))
    return Error(float(largest.max()), float(np.sqrt(squares.mean())))


def _quotient(wrong: Float64, size: Float64) -> Float64:
    """``wrong / size``; of a row of zeros, nothing but zeros is right."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(wrong == 0, 0.0, wrong / size)


def roundings(op: str, top_k: int = 1) -> float:
    """How often an output of ``op`` is rounded to its dtype on the way (``u^2 / 3`` of variance each).

    ``dequantize``: product and offset, which may cancel half of it. ``route``: score, sum, quotient, scale.
    ``quantized_matmul``: its result. ``switch_glu``: gate, up, the activation's three steps (sigmoid,
    product, product), down. ``experts``: also the product with the weight, and a sum of ``top_k`` terms,
    half of which are rounded into it on average. ``moe``: the routed and the shared output, their gate
    and the final sum, and the routing weights themselves. ``attention``: score, exponential, sum,
    quotient, product, output. ``logsumexp``: exponential, output. ``norm``: mean, quotient, product with the
    weight, bias. ``rope``: sine and cosine, two products, their sum; where angles are rounded to float32,
    ``reductions`` has the square of the largest position.
    """
    combine = 1 + top_k / 2
    counts = {
        "dequantize": 4.0,
        "route": 4.0,
        "quantized_matmul": 1.0,
        "attention": 6.0,
        "norm": 4.0,
        "logsumexp": 2.0,
        "rope": 5.0,
        "switch_glu": 6.0,
        "experts": 6.0 + combine,
        "moe": 2 * 6.0 + combine + 4,
    }
    return counts[op]


def bound(
    dtype: mx.Dtype | str,
    op: str,
    *,
    reductions: Sequence[int] = (),
    top_k: int = 1,
    gradient: bool = False,
    logits: float = 0.0,
) -> Bound:
    """The bound on an operation's error; the model is in the module's docstring.

    Args:
        dtype: the coarsest dtype that intermediate results are rounded to: normally the output's.
        op: see :func:`roundings`.
        reductions: lengths of the dot products one after another, such as ``(hidden, width)``.
        top_k: terms of the combine.
        gradient: of the operation; it recomputes the forward pass and has as many steps again, twice.
        logits: where the router's layer is part of it, its logits' largest magnitude. They are a dot product
            over ``reductions[0]``, rounded once, and an absolute error of theirs is a relative one of the
            weights.
    """
    passes = 3 if gradient else 1
    u = unit_roundoff(dtype)
    functions = 0 if op in ("quantized_matmul", "dequantize") else 1
    router = logits**2 * (u**2 / 3 + reductions[0] * _U32**2 / 6) if logits else 0.0
    variance = (
        roundings(op, top_k) * u**2 / 3
        + sum(reductions) * _U32**2 / 6
        + functions * (_FUNCTION_ROUNDOFFS * _U32) ** 2
        + router
    )
    rms = max(_SLACK * float(np.sqrt(passes * variance)), u)
    return Bound(max=_PEAK * rms, rms=rms)


def bound_of_two(first: Bound, second: Bound) -> Bound:
    """On the difference of two outputs, each within its bound of the truth."""
    return Bound(max=first.max + second.max, rms=first.rms + second.rms)


def within(got: Any, want: Any, limit: Bound) -> tuple[bool, Error]:
    """Whether ``got`` is within ``limit`` of the truth, and its error: for benchmarks, which print it."""
    figures = error(got, want)
    return limit.admits(figures), figures


def assert_close(
    got: Any,
    want: Any,
    op: str,
    *,
    dtype: mx.Dtype | str | None = None,
    reductions: Sequence[int] = (),
    top_k: int = 1,
    gradient: bool = False,
) -> None:
    """Assert that ``got`` is as close to the float64 truth ``want`` as :func:`bound` asks.

    ``dtype`` defaults to that of ``got``; the other arguments are those of :func:`bound`.
    """
    limit = bound(dtype or got.dtype, op, reductions=reductions, top_k=top_k, gradient=gradient)
    passed, figures = within(got, want, limit)
    assert passed, f"{op} {got.dtype} {got.shape}: {figures} exceeds {limit}"


def score_bound(dtype: mx.Dtype | str = "float32", *, precise: bool = True) -> float:
    """The relative error of routing scores computed in ``dtype``, and of the weights made of them.

    32 float32 ulp: a sigmoid of MLX's CPU is up to 8 (for large arguments 16) off, a softmax up to 23, and
    another device's differ from it by as much again. In half precision results are rounded as well: the
    score, the bias, the key, the sum, the quotient, the scale; with ``precise=False`` also the steps within
    a softmax.
    """
    limit = _SCORE_ULPS * 2 * _U32
    u = unit_roundoff(dtype)
    if u > _U32:
        limit += (_SCORE_ROUNDINGS + (0.0 if precise else _PLAIN_SOFTMAX_ROUNDINGS)) * u
    return limit


class RoutingBound(NamedTuple):
    """What two implementations of one router may differ by.

    Attributes:
        gap: where float64 keys at the cut are closer than this, relative to what they are made of, experts
            may change places: ``exp`` is not the same function on two devices.
        weights: the largest difference of weights, relative to the largest weight of the token.
    """

    gap: float
    weights: float


def routing_bound(spec: RouterSpec, logits_dtype: mx.Dtype | str) -> RoutingBound:
    """The :func:`score_bound` of a spec on logits of a dtype: of the coarsest dtype on the way."""
    logits = str(logits_dtype).removeprefix("mlx.core.")
    scores = spec.score_dtype or logits
    keys = spec.bias_dtype if spec.bias_dtype not in (None, "scores") else scores
    weights = logits if spec.weight_dtype == "logits" else spec.weight_dtype or scores
    limits = {d: score_bound(d, precise=spec.precise or spec.score != "softmax") for d in _UNIT_ROUNDOFF}
    return RoutingBound(
        gap=max(limits[scores], limits[keys or scores]), weights=max(limits[scores], limits[weights])
    )


def assert_same_routing(
    got: tuple[Any, Any],
    want: tuple[Any, Any],
    spec: RouterSpec,
    logits_dtype: mx.Dtype | str,
    *,
    margin: Any = None,
) -> float:
    """Assert that two results ``(indices, weights)`` of a router agree, in whatever order of the experts.

    Args:
        got, want: indices and weights, both ``[..., top_k]``.
        spec: what was asked for.
        logits_dtype: dtype of the logits.
        margin: per token, the relative gap of the float64 keys at the cut; where it is within
            :func:`routing_bound` the sets may differ. By default they may not.

    Returns:
        The share of tokens whose sets had to be equal: a test of random logits asserts that it is not 0.
    """
    limit = routing_bound(spec, logits_dtype)
    (mine, my_weights), (theirs, their_weights) = _by_expert(*got), _by_expert(*want)
    same = (mine == theirs).all(axis=-1)
    judged = np.ones_like(same) if margin is None else np.asarray(margin) > limit.gap
    bad = np.argwhere(judged & ~same)
    assert not bad.size, (
        f"{len(bad)} of {same.size} tokens have other experts; token {tuple(bad[0])}: "
        f"{mine[tuple(bad[0])]} instead of {theirs[tuple(bad[0])]}, by {spec}"
    )
    figures = error(my_weights[same], their_weights[same])
    assert figures.max <= limit.weights, f"weights differ by {figures.max} > {limit.weights}, by {spec}"
    return float(judged.mean()) if judged.size else 1.0


def _by_expert(indices: Any, weights: Any) -> tuple[npt.NDArray[np.int64], Float64]:
    indices, weights = np.asarray(indices).astype(np.int64), float64(weights)
    order = np.argsort(indices, axis=-1)
    return np.take_along_axis(indices, order, axis=-1), np.take_along_axis(weights, order, axis=-1)


def logits_bound(
    dtype: mx.Dtype | str = "float32", *, layers: int, hidden: int, length: int = 1, gradient: bool = False
) -> Bound:
    """The bound on whole-model logits: of two implementations of one model in ``dtype``.

    A layer adds to the residual stream the error of two blocks, attention and MoE, each with about eight
    roundings, dot products over ``hidden`` and a function (softmax, silu); layers add in quadrature. Holds
    while both route every token alike. The rotary angle of position p may have been rounded to float32, by
    p u / sqrt(3) where it is largest; positions are spread over ``length`` (a third of its square), and the
    angles of an eighth of the pairs are that large. A gradient has the forward pass in it and as many steps
    again, twice.
    """
    passes = 3 if gradient else 1
    u = unit_roundoff(dtype)
    angles = (length * _U32) ** 2 / 3 / 3 / 8
    block = 8 * u**2 / 3 + 3 * hidden * _U32**2 / 6 + (_FUNCTION_ROUNDOFFS * _U32) ** 2 + angles
    rms = _SLACK * float(np.sqrt(2 * passes * (2 * layers + 1) * block))  # 2: both models err
    return Bound(max=_PEAK * rms, rms=rms)


def assert_logits_close(
    got: mx.array, want: Any, *, layers: int, hidden: int, dtype: mx.Dtype | str = "float32"
) -> None:
    """Assert that two models' logits ``[..., vocabulary]`` agree to :func:`logits_bound`."""
    limit = logits_bound(dtype, layers=layers, hidden=hidden, length=got.shape[-2])
    passed, figures = within(got, want, limit)
    assert passed, f"logits {got.shape}: {figures} exceeds {limit}"


def assert_gradients_close(
    got: Mapping[str, mx.array],
    want: Mapping[str, Any],
    *,
    layers: int,
    hidden: int,
    dtype: mx.Dtype | str = "float32",
) -> None:
    """Assert that two models' gradients of one loss, by parameter path, agree to :func:`logits_bound`.

    A parameter is one row: an entry of its gradient is a sum over all tokens, and what is left of one that
    nearly cancels out is as wrong, absolutely, as its neighbours are.
    """
    assert got.keys() == want.keys(), sorted(got.keys() ^ want.keys())
    limit = logits_bound(dtype, layers=layers, hidden=hidden, gradient=True)
    for path, gradient in got.items():
        passed, figures = within(gradient.reshape(1, -1), float64(want[path]).reshape(1, -1), limit)
        assert passed, f"gradient of {path} {gradient.shape}: {figures} exceeds {limit}"
