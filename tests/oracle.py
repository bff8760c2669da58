"""The truth in float64 NumPy, written from the papers and the format specifications, one token at a time.

It shares no code with moefast: weights are unpacked by hand from their packed words, choices are made by
sorting. Slow and plain on purpose. Arrays come in as ``mx.array`` and leave as float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from moefast import Activation, ExpertWeights, Projection, QuantSpec, RouterSpec, SharedExpert
from moefast.testing import Float64, float64

# -- weights -----------------------------------------------------------------------------------------------


def minifloat(code: np.ndarray, exponent_bits: int, mantissa_bits: int) -> Float64:
    """Values of sign-exponent-mantissa codes: IEEE's bias and subnormals, no infinities (OCP FP4, FP8)."""
    bias = 2 ** (exponent_bits - 1) - 1
    mantissa = (code & (2**mantissa_bits - 1)) / 2.0**mantissa_bits
    exponent = (code >> mantissa_bits).astype(np.int64) & (2**exponent_bits - 1)
    sign = np.where(code >> (mantissa_bits + exponent_bits) & 1, -1.0, 1.0)
    subnormal = mantissa * 2.0 ** (1 - bias)
    return sign * np.where(exponent == 0, subnormal, (1 + mantissa) * 2.0 ** (exponent - bias))


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """Integers of ``bits`` bits out of uint32 words ``[..., W]`` -> ``[..., 32 W / bits]``.

    A row is one stream of bits, least significant first; 3-, 5- and 6-bit values straddle bytes and words.
    """
    stream = np.unpackbits(words.astype("<u4").view(np.uint8), axis=-1, bitorder="little")
    digits = stream.reshape(*words.shape[:-1], -1, bits).astype(np.int64)
    return digits @ (1 << np.arange(bits))


def dequantize(projection: Projection, expert: int | None = None) -> Float64:
    """The weight a projection stands for, ``[(E,) out, in]``, or one expert's ``[out, in]``."""
    p, quant = projection, projection.quant
    if quant is None:
        return float64(_of(p.weight, expert))
    codes = unpack(np.array(_of(p.weight, expert)), quant.bits)
    grouped = codes.reshape(*codes.shape[:-1], -1, quant.group_size)
    if quant.mode == "affine":
        scales, biases = (float64(_of(a, expert)) for a in (p.scales, p.biases))
        values = grouped * scales[..., None] + biases[..., None]
    else:
        values = _elements(grouped, quant) * _scales(np.array(_of(p.scales, expert)), quant)[..., None]
    values = values.reshape(codes.shape)
    if p.global_scale is not None:
        values *= float64(_of(p.global_scale, expert))[..., None, None] / (448 * 6)
    return values


def _elements(codes: np.ndarray, quant: QuantSpec) -> Float64:
    return minifloat(codes, 4, 3) if quant.bits == 8 else minifloat(codes, 2, 1)


def _scales(codes: np.ndarray, quant: QuantSpec) -> Float64:
    if quant.mode == "nvfp4":
        return minifloat(codes, 4, 3)
    return 2.0 ** (codes.astype(np.float64) - 127)  # e8m0: nothing but an exponent


def project(x: Float64, projection: Projection, expert: int | None = None) -> Float64:
    """``x @ w.T + bias``, of one expert of a stack."""
    y = x @ dequantize(projection, expert).T
    if projection.bias is None:
        return y
    return y + float64(_of(projection.bias, expert))


def _of(array: mx.array, expert: int | None) -> mx.array:
    return array if expert is None else array[expert]


# -- activations -------------------------------------------------------------------------------------------


def sigmoid(x: Float64) -> Float64:
    return np.exp(-np.logaddexp(0.0, -x))


def silu(x: Float64) -> Float64:
    return x * sigmoid(x)


def gelu_tanh(x: Float64) -> Float64:
    """Hendrycks and Gimpel 2016, the approximation by tanh."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def activate(activation: Activation, gate: Float64, up: Float64) -> Float64:
    """The table of :class:`moefast.Activation`; ``gate`` is ignored where there is none."""
    a, limit = activation, activation.limit
    clipped = np.clip(up, -limit, limit)
    gated: dict[str, Callable[[], Float64]] = {
        "swiglu": lambda: silu(gate) * up,
        "swiglu_oai": lambda: (
            (clipped + 1) * np.minimum(gate, limit) * sigmoid(a.alpha * np.minimum(gate, limit))
        ),
        "swiglu_clipped": lambda: np.minimum(silu(gate), limit) * clipped,
        "swiglu_clamped": lambda: silu(np.minimum(gate, limit)) * clipped,
        "geglu_tanh": lambda: gelu_tanh(gate) * up,
        "situ": lambda: (
            a.beta * np.tanh(gate / a.beta) * sigmoid(gate)
            * (up if a.linear_beta is None else a.linear_beta * np.tanh(up / a.linear_beta))
        ),
        "gelu_tanh": lambda: gelu_tanh(up),
        "relu2": lambda: np.maximum(up, 0) ** 2,
    }  # fmt: skip
    return gated[a.name]()


# -- routing -----------------------------------------------------------------------------------------------


class Routed(NamedTuple):
    """Indices and weights ``[T, top_k]``, best key first, and for each token the relative ``margin``:
    how far, in units of the keys and scores at hand, the choice is from another one."""

    indices: np.ndarray
    weights: Float64
    margin: Float64


def route(
    logits: mx.array,
    spec: RouterSpec,
    selection_bias: mx.array | None = None,
    expert_scale: mx.array | None = None,
) -> Routed:
    """Route tokens ``[T, num_experts]`` as :class:`moefast.RouterSpec` says."""
    bias = np.zeros(spec.num_experts) if selection_bias is None else float64(selection_bias)
    factors = np.ones(spec.num_experts) if expert_scale is None else float64(expert_scale)
    tokens = [_route_token(row, spec, bias, factors) for row in float64(logits)]
    empty = (np.zeros((0, spec.top_k), np.int64), np.zeros((0, spec.top_k)), np.zeros(0))
    return Routed(*(np.stack(column) for column in zip(*tokens, strict=True))) if tokens else Routed(*empty)


def _route_token(
    x: Float64, spec: RouterSpec, bias: Float64, factors: Float64
) -> tuple[np.ndarray, Float64, float]:
    if spec.softcap:
        x = spec.softcap * np.tanh(x / spec.softcap)
    x = x / spec.temperature
    scores = x if spec.score_over == "selected" else score(x, spec.score)
    key, size = scores + bias, np.abs(scores) + np.abs(bias)
    margin = np.inf
    if spec.drops_groups:
        dropped, margin = dropped_groups(key, size, spec)
        fill = 0.0 if spec.dropped_fill == "zero" else -np.inf
        lost = np.repeat(dropped, spec.num_experts // spec.num_groups)
        key, size = np.where(lost, fill, key), np.where(lost, 0.0, size)
    order = best_first(key, spec.ties)
    chosen, rejected = order[: spec.top_k], order[spec.top_k :]
    if rejected.size:
        margin = min(margin, _gap(key, size, chosen[-1], rejected[0]))
    weights = (key if spec.weights_from == "masked" and spec.drops_groups else scores)[chosen]
    if spec.score_over == "selected":
        weights = score(weights, spec.score)
    if spec.renormalize:
        total, eps = weights.sum(), spec.renormalize_eps
        weights = weights / (max(total, eps) if spec.eps_form == "max" else total + eps)
    weights = weights * factors[chosen]
    if spec.scale_place == "weights":
        weights = weights * spec.scale
    return chosen, weights, margin


def score(x: Float64, name: str) -> Float64:
    if name == "sigmoid":
        return sigmoid(x)
    if name == "sqrtsoftplus":
        return np.sqrt(np.logaddexp(0.0, x))
    powers = np.exp(x - x.max())
    return powers / powers.sum()


def best_first(key: Float64, ties: str) -> np.ndarray:
    """Experts by descending key; of equal keys the lowest (or highest) index first."""
    index = np.arange(key.size)
    return np.lexsort((index if ties == "lowest" else -index, -key))


def dropped_groups(key: Float64, size: Float64, spec: RouterSpec) -> tuple[np.ndarray, float]:
    """Which groups lose, and by what margin: the lowest scores, of equal ones the lowest index."""
    best = 1 if spec.group_score == "max" else 2
    scores, sizes = (
        np.sort(of.reshape(spec.num_groups, -1), axis=-1)[:, -best:].sum(axis=-1) for of in (key, size)
    )
    worst = np.lexsort((np.arange(spec.num_groups), scores))
    drop = spec.num_groups - spec.top_groups
    dropped = np.zeros(spec.num_groups, bool)
    dropped[worst[:drop]] = True
    return dropped, _gap(scores, sizes, worst[drop - 1], worst[drop])


def _gap(key: Float64, size: Float64, a: int, b: int) -> float:
    """The distance of two keys relative to what they were computed from."""
    if key[a] == key[b]:
        return 0.0
    return float(abs(key[a] - key[b]) / max(size[a], size[b], np.finfo(float).tiny))


# -- experts -----------------------------------------------------------------------------------------------


def switch_glu(x: mx.array, weights: ExpertWeights, indices: mx.array) -> Float64:
    """Every route's output: x ``[..., hidden]``, indices ``[..., top_k]`` -> ``[..., top_k, hidden]``."""
    return _feed(float64(x), weights, np.array(indices).astype(np.int64))


def _feed(x: Float64, weights: ExpertWeights, indices: np.ndarray) -> Float64:
    y = np.empty((*indices.shape, x.shape[-1]))
    rows = np.broadcast_to(x[..., None, :], y.shape)
    for expert in np.unique(indices):
        here = indices == expert
        y[here] = _one_expert(rows[here], weights, int(expert))
    return y


def _one_expert(x: Float64, weights: ExpertWeights | SharedExpert, expert: int | None) -> Float64:
    up = project(x, weights.up, expert)
    gate = up if weights.gate is None else project(x, weights.gate, expert)
    return project(activate(weights.activation, gate, up), weights.down, expert)


def experts(x: mx.array, weights: ExpertWeights, indices: mx.array, route_weights: mx.array) -> Float64:
    """The weighted sum of each token's experts, ``[..., hidden]``."""
    return (switch_glu(x, weights, indices) * float64(route_weights)[..., None]).sum(axis=-2)


def shared_expert(x: mx.array, shared: SharedExpert) -> Float64:
    y = _one_expert(float64(x), shared, None)
    return y if shared.output_gate is None else sigmoid(project(float64(x), shared.output_gate)) * y


def moe(
    x: mx.array,
    logits: mx.array,
    spec: RouterSpec,
    weights: ExpertWeights,
    *,
    selection_bias: mx.array | None = None,
    expert_scale: mx.array | None = None,
    shared: SharedExpert | None = None,
) -> Float64:
    """A whole block on tokens ``[T, hidden]``. Experts beyond the stack return their input."""
    routed = route(logits, spec, selection_bias, expert_scale)
    rows = float64(x)
    identity = routed.indices >= weights.layout.num_experts
    y = _feed(rows, weights, np.where(identity, 0, routed.indices))
    y = np.where(identity[..., None], rows[:, None, :], y)
    y = (y * routed.weights[..., None]).sum(axis=-2)
    if spec.scale_place == "output":
        y = y * spec.scale
    return y if shared is None else y + shared_expert(x, shared)


# -- attention ---------------------------------------------------------------------------------------------


def attention(queries: mx.array, keys: mx.array, values: mx.array, scale: float, causal: bool) -> Float64:
    """Head by head, as the formula says: ``[batch, heads, length, dims]`` to ``[batch, length, ...]``."""
    q, k, v = (float64(a) for a in (queries, keys, values))
    batch, heads, length, _ = q.shape
    share = heads // k.shape[1]
    out = np.zeros((batch, length, heads, v.shape[-1]))
    seen = np.tril(np.ones((length, k.shape[2])), k.shape[2] - length) if causal else 1.0
    for b in range(batch):
        for h in range(heads):
            scores = scale * q[b, h] @ k[b, h // share].T
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True)) * seen
            out[b, :, h] = weights / weights.sum(axis=-1, keepdims=True) @ v[b, h // share]
    return out.reshape(batch, length, -1)


# -- derivatives -------------------------------------------------------------------------------------------


def gradient(function: Callable[[Float64], float], at: mx.array) -> Float64:
    """The derivative of a float64 function of one array, by central differences, entry by entry."""
    point = float64(at)
    slope = np.zeros_like(point)
    step = np.cbrt(np.finfo(float).eps)  # balances truncation (h^2) and cancellation (eps / h)
    for index in np.ndindex(point.shape):
        ahead, behind = point.copy(), point.copy()
        ahead[index] += step
        behind[index] -= step
        slope[index] = (function(ahead) - function(behind)) / (2 * step)
    return slope
