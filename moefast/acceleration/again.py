"""A block that was called before, called again: what is left to do when nothing has changed.

Everything is still looked up in each call; only where to look is worked out once for a row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import mlx.core as mx

from ..families import Block
from ..nn.block import recalled
from .routing import reader_of, selection_bias
from .stacks import activation_facts, shared_facts

Facts = tuple[Any, ...]


@cache
def facts_of(row: Block) -> Callable[[Any, Any, Any], Facts]:
    """``(block, experts, shared)`` -> what a call of ``moe`` depends on beside arrays and layers."""
    said = reader_of(row)

    def facts(block: Any, experts: Any, shared: Any) -> Facts:
        return (
            block.__dict__["_moefast_backend"],
            said(block),
            activation_facts(experts["activation"]),
            None if shared is None else shared_facts(shared),
        )

    return facts


@cache
def again_of(row: Block) -> Callable[[Any, mx.array], tuple[mx.array | None, mx.array | None]]:
    """``(block, x)`` -> its output by the kernels of its last call, or None where this call is of another
    kind; and the router's logits, if that is what told."""
    if row.mix is not None or row.sum_float32 or row.latent is not None or "." in row.experts:
        return lambda block, x: (None, None)
    facts, name, shared_name, gate_name = facts_of(row), row.experts, row.shared, row.shared_gate

    def again(block: Any, x: mx.array) -> tuple[mx.array | None, mx.array | None]:
        own = block.__dict__
        if (
            own.get("_recall") is None
            or own["_training"]
            or own.get("sharding_group") is not None
            or "_moefast_originals" in own
        ):
            return None, None
        experts = block[name]
        shared = None if shared_name is None else block.get(shared_name)
        gate = None if gate_name is None else block[gate_name]
        bias = None if row.bias is None else selection_bias(row, block)
        logits = block.moefast_logits(x)
        said = facts(block, experts, shared)
        return recalled(block, x, logits, bias, experts, shared, gate, said), logits

    return again
