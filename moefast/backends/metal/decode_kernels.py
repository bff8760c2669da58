"""The launches of decode: Metal text, buffers and template arguments of each, made once for each kind of
weights. What they compute, :mod:`.decode` says.

The inputs of each are the operation's own arrays, then those of its projections in the order in which they
are named here.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx

from ...weights import ExpertLayout, SharedLayout
from .activations import functor, literal
from .launch import Function
from .matvec import GROUP, LANE, ROUTE, SIMDGROUPS, Launcher, Operands, Variant, cover, launcher


class CombineKind(NamedTuple):
    """How ``down_combine`` ends.

    Attributes:
        weights: dtype of the routing weights.
        combine: what they are cast to.
        identity: experts past the end of the stack return x.
        scale: on everything but the shared expert.
    """

    weights: mx.Dtype
    combine: mx.Dtype
    identity: bool = False
    scale: float = 1.0


@lru_cache(maxsize=256)
def gate_up(layout: ExpertLayout, top_k: int, dtype: mx.Dtype, variant: Variant) -> Launcher:
    """``(x, indices, gate, up) -> inner`` for so many experts per token and x of ``dtype``, by routes."""
    operands = Operands(variant.fidelity, gate=layout.gate, up=layout.up)
    function = Function(
        name="gate_up",
        file="gate_up.metal",
        inputs=("x", "indices", *operands.names),
        outputs=("inner",),
        body=_routed(layout, operands, ROUTE),
    )
    numbers = _routed_numbers(layout, top_k)
    threadgroups = cover(layout.width, variant.rows * SIMDGROUPS)
    return launcher(function, {"T": dtype}, numbers, [operands], threadgroups, rows=variant.rows)


def _routed(layout: ExpertLayout, operands: Operands, route: str) -> str:
    return f"""
  moefast::gate_up<T, ROWS, K, N, E, TOP_K, GATE_FAST, UP_FAST>(
      x, indices, {operands.stacks["gate"]}, {operands.stacks["up"]}, {functor(layout.activation)}, inner,
      {GROUP}, {route}, {LANE});
"""


def _routed_numbers(layout: ExpertLayout, top_k: int) -> dict[str, int]:
    return {"K": layout.hidden, "N": layout.width, "E": layout.num_experts, "TOP_K": top_k}


class _Shared:
    """The shared expert's part of a launch of gate_up.metal."""

    def __init__(self, shared: SharedLayout, variant: Variant):
        layout = shared.layout
        self.gated = shared.output_gate is not None
        self.activation = functor(layout.activation)
        self.operands = Operands(
            variant.fidelity,
            shared_gate=layout.gate,
            shared_up=layout.up,
            shared_output_gate=shared.output_gate,
        )
        self.outputs = ("shared_inner", "shared_logits") if self.gated else ("shared_inner",)
        # One simdgroup more than the rows need computes the output gate.
        self.threadgroups = cover(cover(layout.width, variant.rows) + self.gated, SIMDGROUPS)

    def body(self, token: str) -> str:
        stacks = self.operands.stacks
        return f"""
  moefast::shared_gate_up<T, ROWS, K, SHARED_N, SHARED_GATE_FAST, SHARED_UP_FAST, SHARED_OUTPUT_GATE_FAST>(
      x, {stacks["shared_gate"]}, {stacks["shared_up"]}, {self.activation}, {stacks["shared_output_gate"]},
      shared_inner, {"shared_logits" if self.gated else "moefast::None{}"},
      {GROUP}, {token}, {LANE});
"""


@lru_cache(maxsize=256)
def shared_gate_up(shared: SharedLayout, dtype: mx.Dtype, variant: Variant) -> Launcher:
    """``(x, gate, up, output gate if any) -> inner, logits if there is an output gate``, by tokens."""
    part = _Shared(shared, variant)
    function = Function(
        name="shared_gate_up",
        file="gate_up.metal",
        inputs=("x", *part.operands.names),
        outputs=part.outputs,
        body=part.body(ROUTE),
    )
    numbers = {"K": shared.layout.hidden, "SHARED_N": shared.layout.width}
    return launcher(function, {"T": dtype}, numbers, [part.operands], part.threadgroups, rows=variant.rows)


@lru_cache(maxsize=256)
def gate_up_with_shared(
    layout: ExpertLayout, shared: SharedLayout, top_k: int, dtype: mx.Dtype, variant: Variant
) -> Launcher:
    """:func:`gate_up` and :func:`shared_gate_up` in one launch, by routes and tokens: ``(x, indices, gate,
    up, shared gate, shared up, output gate) -> inner, shared inner, logits``."""
    operands = Operands(variant.fidelity, gate=layout.gate, up=layout.up)
    part = _Shared(shared, variant)
    function = Function(
        name="gate_up_with_shared",
        file="gate_up.metal",
        inputs=("x", "indices", *operands.names, *part.operands.names),
        outputs=("inner", *part.outputs),
        body=f"""
  const uint token = {ROUTE} / (TOP_K + 1), slot = {ROUTE} % (TOP_K + 1);
  if (slot < uint(TOP_K)) {{{_routed(layout, operands, "token * TOP_K + slot")}  }} else {{
    {part.body("token")}  }}
""",
    )
    numbers = {**_routed_numbers(layout, top_k), "SHARED_N": shared.layout.width}
    threadgroups = max(cover(layout.width, variant.rows * SIMDGROUPS), part.threadgroups)
    return launcher(
        function, {"T": dtype}, numbers, [operands, part.operands], threadgroups, rows=variant.rows
    )


@lru_cache(maxsize=256)
def down(layout: ExpertLayout, dtype: mx.Dtype, variant: Variant) -> Launcher:
    """``(inner, indices, down) -> out`` for inner activations of ``dtype``, by routes."""
    operands = Operands(variant.fidelity, down=layout.down)
    function = Function(
        name="down",
        file="down.metal",
        inputs=("inner", "indices", *operands.names),
        outputs=("out",),
        body=f"""
  moefast::down<T, ROWS, K, N, E, DOWN_FAST>(
      inner, indices, {operands.stacks["down"]}, out, {GROUP}, {ROUTE}, {LANE});
""",
    )
    numbers = {"K": layout.width, "N": layout.hidden, "E": layout.num_experts}
    threadgroups = cover(layout.hidden, variant.rows * SIMDGROUPS)
    return launcher(function, {"T": dtype}, numbers, [operands], threadgroups, rows=variant.rows)


@lru_cache(maxsize=256)
def down_combine(
    layout: ExpertLayout,
    shared: SharedLayout | None,
    top_k: int,
    dtype: mx.Dtype,
    kind: CombineKind,
    variant: Variant,
) -> Launcher:
    """``(inner, indices, weights, down [, shared inner, shared down [, shared logits]] [, x]) -> out``, by
    tokens."""
    operands = [Operands(variant.fidelity, down=layout.down)]
    names = ["inner", "indices", "weights", *operands[0].names]
    numbers = {"K": layout.width, "N": layout.hidden, "E": layout.num_experts, "TOP_K": top_k}
    tasks, shared_text = 0, "moefast::NoSharedDown{}"
    if shared is not None:
        tasks = 1
        operands.append(Operands(variant.fidelity, shared_down=shared.layout.down))
        gated = shared.output_gate is not None
        names += ["shared_inner", *operands[1].names, *(["shared_logits"] if gated else [])]
        numbers |= {"SHARED_K": shared.layout.width, "SHARED_TASKS": tasks}
        shared_text = (
            "moefast::shared_down<SHARED_DOWN_FAST, SHARED_K, SHARED_TASKS>(shared_inner, "
            f"{operands[1].stacks['shared_down']}, {'shared_logits' if gated else 'moefast::None{}'})"
        )
    if kind.identity:
        names.append("x")
    function = Function(
        name="down_combine",
        file="down.metal",
        inputs=tuple(names),
        outputs=("out",),
        body=f"""
  threadgroup T slots[(TOP_K + 1) * ROWS];
  moefast::down_combine<C, A, I, ROWS, SIMDGROUPS, K, N, E, TOP_K, DOWN_FAST>(
      inner, indices, weights, {operands[0].stacks["down"]},
      {shared_text}, {"x" if kind.identity else "moefast::None{}"}, {literal(kind.scale)}, out, slots,
      int(threadgroup_position_in_grid.y), {ROUTE}, int(simdgroup_index_in_threadgroup), {LANE});
""",
    )
    types = {
        "T": dtype,
        "C": kind.combine,
        "A": _promoted(dtype, kind.combine),
        "I": _promoted(dtype, kind.weights),
    }
    simdgroups = min(top_k + tasks, 12)  # 384 threads: as many as any GPU has of a kernel full of registers
    threadgroups = cover(layout.hidden, variant.rows)
    return launcher(function, types, numbers, operands, threadgroups, simdgroups, variant.rows)


def _promoted(a: mx.Dtype, b: mx.Dtype) -> mx.Dtype:
    return a if a == b else mx.float32  # of two float dtypes
