"""The end of an MoE block: a token's experts combined, and what is added to them."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from .launch import Function

# kernels/combine.metal: columns of a thread; and threads of a threadgroup.
_COLUMNS = 4
_THREADS = 256


class Extras(NamedTuple):
    """What follows the sum, in this order.

    Attributes:
        identity: experts of which those beyond the stack return their input, or 0 where there are none.
        scale: a factor, 1 for none.
        shared: whether there is the output of a shared expert,
        gate: and its gate.
    """

    identity: int = 0
    scale: float = 1.0
    shared: bool = False
    gate: bool = False


@lru_cache(maxsize=256)
def _function(extras: Extras) -> Function:
    inputs = ["y", "weights"]
    steps = ["auto sum = moefast::combined<TOP_K, HIDDEN, T, C, P>(y, weights, token, column);"]
    if extras.identity:
        inputs += ["x", "indices"]
        steps.append(
            "sum = moefast::add_identity<TOP_K, EXPERTS, HIDDEN, P_OF_WEIGHTS, T, W>("
            "sum, x, weights, indices, token, column);"
        )
    if extras.scale != 1.0:
        factor = float(np.float32(extras.scale))
        steps.append(f"sum = moefast::scale(sum, {factor!r}f);")
    if extras.shared:
        inputs += ["shared", *(["gate"] if extras.gate else [])]
        steps.append(
            f"sum = moefast::add_shared<HIDDEN>(sum, shared{', gate' if extras.gate else ''}, token, column);"
        )
    body = "\n  ".join([*steps, "moefast::store<HIDDEN>(sum, out, token, column);"])
    return Function(
        name="combine",
        file="combine.metal",
        inputs=tuple(inputs),
        outputs=("out",),
        body=f"""const uint token = thread_position_in_grid.y;
const uint column = thread_position_in_grid.x * moefast::kCombineColumns;
if (column < HIDDEN) {{
  {body}
}}""",
    )


def combine(
    y: mx.array,
    weights: mx.array,
    combine_dtype: mx.Dtype | None = None,
    *,
    identity: tuple[mx.array, mx.array, int] | None = None,
    scale: float = 1.0,
    shared: mx.array | None = None,
    shared_gate: mx.array | None = None,
) -> mx.array:
    """``sum_k weights_k * y_k``, and what a block adds to it, in one launch.

    Args:
        y: ``[tokens, top_k, hidden]``.
        weights: ``[tokens, top_k]`` in any float dtype.
        combine_dtype: dtype the weights are cast to before they multiply.
        identity: x ``[tokens, hidden]``, indices ``[tokens, top_k]``, any integers, and the number of experts
            that have weights: those beyond return x.
        scale: factor on the sum of the routed experts.
        shared: ``[tokens, hidden]``: a shared expert's output, added.
        shared_gate: ``[tokens, 1]``: the shared output is multiplied by its sigmoid.

    x, shared and shared_gate have y's dtype.

    Returns:
        ``[tokens, hidden]`` in y's dtype.
    """
    tokens, top_k, hidden = y.shape
    if tokens == 0:
        return mx.zeros((0, hidden), y.dtype)
    inputs = [y, weights]
    num_experts = 0
    if identity is not None:
        x, indices, num_experts = identity
        inputs += [x, indices]
    if shared is not None:
        inputs.append(shared)
        if shared_gate is not None:
            inputs.append(shared_gate)
    extras = Extras(num_experts, scale, shared is not None, shared_gate is not None)
    template = _template(y.dtype, weights.dtype, combine_dtype or weights.dtype, top_k, hidden, num_experts)
    columns = -(-hidden // _COLUMNS)
    threads = min(_THREADS, -(-columns // 32) * 32)
    (out,) = _function(extras)(
        inputs,
        template=template,
        grid=(-(-columns // threads) * threads, tokens, 1),
        threadgroup=(threads, 1, 1),
        outputs=[((tokens, hidden), y.dtype)],
    )
    return out


@lru_cache(maxsize=256)
def _template(
    dtype: mx.Dtype, weights: mx.Dtype, cast: mx.Dtype, top_k: int, hidden: int, num_experts: int
) -> tuple[tuple[str, int | mx.Dtype], ...]:
    identity = (
        ("W", weights),
        ("P_OF_WEIGHTS", promoted(dtype, weights)),
        ("EXPERTS", num_experts),
    )
    return (
        ("T", dtype),
        ("C", cast),
        ("P", promoted(dtype, cast)),
        ("TOP_K", top_k),
        ("HIDDEN", hidden),
        *(identity if num_experts else ()),
    )


def promoted(a: mx.Dtype, b: mx.Dtype) -> mx.Dtype:
    """The dtype of a product of both, of floats."""
    return a if a == b else mx.float32
