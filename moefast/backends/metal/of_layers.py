"""``moe`` on the layers that hold the arrays: what a block that was called before costs in Python.

See :class:`moefast.registry.Bound`. Arrays are taken from the layers as they are now; where one is of another
shape, dtype or kind than the problem says, the call is described and chosen anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import mlx.core as mx

from ...registry import Declined, Problem
from ...weights import ExpertLayout, Layout, Shape

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class _Expected(NamedTuple):
    """An array of a layer: its key, and shape and dtype, or None where there must be none."""

    key: str
    form: tuple[Shape, mx.Dtype] | None


def of_layers(problem: Problem, run: Callable[..., list[mx.array]]) -> Callable[..., mx.array | None]:
    """``run``, which takes the flat list of a call of ``moe``, as a function of layers."""
    details: tuple[Any, ...] = problem.details
    _, layout, shared, logits_name, bias_name, _, _ = details
    logits_dtype = getattr(mx, logits_name)
    bias_dtype = None if bias_name is None else getattr(mx, bias_name)
    expected = [_arrays_of(each) for each in _layouts(layout)]
    if shared is not None:
        expected += [_arrays_of(each) for each in _layouts(shared.layout)]
        if shared.output_gate is not None:
            expected.append(_arrays_of(shared.output_gate))
    dtype, hidden = problem.dtype, layout.hidden

    def call(
        x: mx.array,
        logits: mx.array,
        bias: mx.array | None,
        experts: Mapping[str, Any],
        shared_layers: Mapping[str, Any] | None,
        shared_gate: Mapping[str, Any] | None,
        types: tuple[type, ...],
        low: int,
        high: int,
    ) -> mx.array | None:
        if x.dtype != dtype or x.shape[-1] != hidden or not low * hidden <= x.size <= high * hidden:
            return None
        if logits.dtype != logits_dtype or (None if bias is None else bias.dtype) != bias_dtype:
            return None
        layers: list[Mapping[str, Any]] = [experts[name] for name in _PROJECTIONS]
        if shared_layers is not None:
            layers += [shared_layers[name] for name in _PROJECTIONS]
        if shared_gate is not None:
            layers.append(shared_gate)
        arrays = [x, logits] if bias is None else [x, logits, bias]
        for layer, kind, wanted in zip(layers, types, expected, strict=True):
            if type(layer) is not kind or not _append(layer, wanted, arrays):
                return None
        try:
            return run(*arrays)[0]
        except Declined:  # the full call says so, and finds another backend
            return None

    return call


def _append(layer: Mapping[str, Any], expected: list[_Expected], arrays: list[mx.array]) -> bool:
    """Appends the arrays of a layer, or finds that they are others."""
    for key, form in expected:
        array = layer.get(key)
        if array is None or form is None:
            if array is not None or form is not None:
                return False
            continue
        if array.dtype != form[1] or array.shape != form[0]:
            return False
        arrays.append(array)
    return True


def _layouts(layout: ExpertLayout) -> list[Layout]:
    assert layout.gate is not None  # layers recall gated experts only
    return [layout.gate, layout.up, layout.down]


def _arrays_of(layout: Layout) -> list[_Expected]:
    stack = (layout.num_experts,) if layout.num_experts else ()
    rows = (*stack, layout.out_dims)
    quant = layout.quant
    if quant is None:
        weight, scales = ((*rows, layout.in_dims), layout.dtype), None
    else:
        weight = ((*rows, layout.in_dims * quant.bits // 32), mx.uint32)
        scales = ((*rows, layout.in_dims // quant.group_size), layout.dtype)
    biases = scales if quant is not None and quant.mode == "affine" else None
    bias = None if layout.bias is None else (rows, getattr(mx, layout.bias))
    global_scale = (stack, mx.float32) if layout.global_scale else None
    keys = ("weight", "scales", "biases", "bias", "global_scale")
    forms = (weight, scales, biases, bias, global_scale)
    return [_Expected(key, form) for key, form in zip(keys, forms, strict=True)]
