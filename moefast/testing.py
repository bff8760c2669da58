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
- ``exp`` and ``tanh`` are good to a few float32 ulp only, on MLX's CPU to about 20.

The three are added in quadrature, and twice their sum bounds the RMS error. The largest single error,
taken relative to the largest magnitude of its row, is larger than the RMS but so is that magnitude: both
are the tails of near-Gaussian samples, the errors' sample being the larger one; it gets three times the RMS.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]

_UNIT_ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
_U32 = _UNIT_ROUNDOFF["float32"]

# "At most twice the error of a correct implementation."
_SLACK = 2.0
# The largest error of a row over the row's largest magnitude, in RMS errors.
_PEAK = 3.0
# float32 error of one exp or tanh, in ulp: half of what score_bound grants a whole softmax.
_FUNCTION_ULPS = 16.0
_SCORE_ULPS = 32.0
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

    ``quantized_matmul``: its result. ``switch_glu``: gate, up, the activation's three steps (sigmoid,
    product, product), down. ``experts``: also the product with the weight, and a sum of ``top_k`` terms,
    half of which are rounded into it on average. ``moe``: the routed and the shared output, their gate
    and the final sum, and the routing weights themselves.
    """
    combine = 1 + top_k / 2
    counts = {
        "quantized_matmul": 1.0,
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
) -> Bound:
    """The bound on an operation's error; the model is in the module's docstring.

    Args:
        dtype: the coarsest dtype that intermediate results are rounded to: normally the output's.
        op: see :func:`roundings`.
        reductions: lengths of the dot products one after another, such as ``(hidden, width)``.
        top_k: terms of the combine.
        gradient: of the operation; it recomputes the forward pass and has as many steps again, twice.
    """
    passes = 3 if gradient else 1
    u = unit_roundoff(dtype)
    functions = 0 if op == "quantized_matmul" else 1
    variance = (
        roundings(op, top_k) * u**2 / 3
        + sum(reductions) * _U32**2 / 6
        + functions * (_FUNCTION_ULPS * _U32) ** 2
    )
    rms = max(_SLACK * float(np.sqrt(passes * variance)), u)
    return Bound(max=_PEAK * rms, rms=rms)


def within(got: Any, want: Any, limit: Bound) -> tuple[bool, Error]:
    """Whether ``got`` is within ``limit`` of the truth, and its error: for benchmarks, which print it."""
    figures = error(got, want)
    return limit.admits(figures), figures


def assert_close(
    got: mx.array,
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
    """The relative error of a routing score, and of the weight made of it, computed in ``dtype``.

    32 float32 ulp: a sigmoid of MLX's CPU is up to 8 (large arguments 16) off, a softmax up to 23, and
    another device's differ from it by as much again. In half precision the result and each step of the
    renormalisation (sum, quotient, scale) are rounded as well; ``precise=False``: so are the steps within
    a softmax.

    Two experts whose keys, in float64, differ by less than this (relative to key and score) may change
    places at the cut: ``exp`` is not the same function on two devices.
    """
    bound = _SCORE_ULPS * 2 * _U32
    u = unit_roundoff(dtype)
    if u > _U32:
        bound += (4.0 + (0.0 if precise else _PLAIN_SOFTMAX_ROUNDINGS)) * u
    return bound


def assert_same_experts(
    got: mx.array, want: Any, *, margin: Any = None, limit: float = 0.0
) -> npt.NDArray[np.bool_]:
    """Assert that two choices ``[..., top_k]`` are the same sets of experts, whatever their order.

    Args:
        got, want: indices.
        margin: per token, the relative gap of the float64 keys at the cut; where it is at most ``limit``
            (a :func:`score_bound`) the sets may differ. By default they may not.
        limit: see ``margin``.

    Returns:
        For each token whether its sets are the same; tokens whose sets need not be are marked by fact.
    """
    mine, theirs = np.sort(np.asarray(got), axis=-1), np.sort(np.asarray(want), axis=-1)
    same: npt.NDArray[np.bool_] = (mine == theirs).all(axis=-1)
    excused = np.zeros_like(same) if margin is None else np.asarray(margin) <= limit
    bad = np.argwhere(~(same | excused))
    assert not bad.size, (
        f"{len(bad)} of {same.size} tokens chose other experts; token {tuple(bad[0])}: "
        f"{mine[tuple(bad[0])]} instead of {theirs[tuple(bad[0])]}"
    )
    return same


def assert_same_weights(
    got: tuple[Any, Any], want: tuple[Any, Any], limit: float, *, tokens: Any = True
) -> None:
    """Assert that routing weights agree, expert by expert, to a relative ``limit`` (a :func:`score_bound`).

    Args:
        got, want: ``(indices, weights)``, both ``[..., top_k]``, in any order of the experts.
        limit: relative to each weight.
        tokens: which tokens to compare, those with the same experts: :func:`assert_same_experts` says.
    """
    (mine, mine_by), (theirs, theirs_by) = _by_expert(*got), _by_expert(*want)
    chosen = np.broadcast_to(np.asarray(tokens), mine.shape[:-1])
    assert (mine == theirs)[chosen].all(), "weights of different experts cannot be compared"
    wrong = _quotient(np.abs(mine_by - theirs_by), np.abs(theirs_by))[chosen]
    assert not wrong.size or wrong.max() <= limit, f"weights differ by {wrong.max()} > {limit}, relatively"


def _by_expert(indices: Any, weights: Any) -> tuple[npt.NDArray[Any], Float64]:
    indices, weights = np.asarray(indices), float64(weights)
    order = np.argsort(indices, axis=-1)
    return np.take_along_axis(indices, order, axis=-1), np.take_along_axis(weights, order, axis=-1)


def logits_bound(dtype: mx.Dtype | str = "float32", *, layers: int, hidden: int) -> Bound:
    """The bound on whole-model logits: of two implementations of one model in ``dtype``.

    A layer adds to the residual stream the error of two blocks, attention and MoE, each with about eight
    roundings, dot products over ``hidden`` and a function (softmax, silu); layers add in quadrature. Holds while both
    route every token alike.
    """
    u = unit_roundoff(dtype)
    block = 8 * u**2 / 3 + 3 * hidden * _U32**2 / 6 + (_FUNCTION_ULPS * _U32) ** 2
    rms = _SLACK * float(np.sqrt(2 * (2 * layers + 1) * block))  # 2: both models err
    return Bound(max=_PEAK * rms, rms=rms)


def assert_logits_close(
    got: mx.array, want: Any, *, layers: int, hidden: int, dtype: mx.Dtype | str = "float32"
) -> None:
    """Assert that two models' logits ``[..., vocabulary]`` agree to :func:`logits_bound`."""
    limit = logits_bound(dtype, layers=layers, hidden=hidden)
    passed, figures = within(got, want, limit)
    assert passed, f"logits {got.shape}: {figures} exceeds {limit}"
