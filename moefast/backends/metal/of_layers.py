"""``moe`` on the layers that hold the arrays: what a block that was called before costs in Python.

See :class:`moefast.registry.Bound`. ``moefast._native`` takes the arrays out of the layers as they are now,
and looks whether the call is still one that the problem describes, nothing is being differentiated or
compiled, and every weight lies row by row in memory. Then kernels are launched and nothing else is made: no
``mx.custom_function``, which costs more than all of it. In any other case the call is made in full.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from ...registry import Problem
from ..native import bindings
from ..native.plans import operator_of
from .device import here


def of_layers(
    problem: Problem, run: Callable[[tuple[mx.array, ...]], mx.array]
) -> Callable[..., mx.array | None] | None:
    """``run``, which takes the flat list of a call of ``moe``, as a function of layers. None where the
    extension cannot be used: only C++ sees that a gradient is being traced."""
    details: tuple[Any, ...] = problem.details
    if not bindings().native or details[1].gate is None:  # layers have gated experts only
        return None
    inputs_of = operator_of(problem).moe_inputs_of
    device = mx.gpu if here() == "gpu" else mx.cpu

    def call(
        x: mx.array,
        logits: mx.array,
        bias: mx.array | None,
        experts: Any,
        shared: Any,
        shared_gate: Any,
        types: tuple[type, ...],
        low: int,
        high: int,
    ) -> mx.array | None:
        flat = inputs_of(device, x, logits, bias, experts, shared, shared_gate, types, low, high)
        return None if flat is None else run(flat)

    return call
