"""``moe`` of one token, worked out once for all calls of a kind: what is left for Python is to put arrays
into lists, three or four times.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from ...registry import Problem
from ...weights import ExpertLayout, Layout, Shape, SharedLayout
from . import decode_kernels as kernels
from . import route
from .dispatch import thresholds
from .matvec import Variant
from .operands import operand_of

Run = Callable[[tuple[mx.array, ...]], mx.array]


def bind(problem: Problem, variant: Variant) -> Run:
    """``moe`` on the flat list of its arrays (see :mod:`moefast.backends.flat`), for a problem of one token.

    The shared expert's first half is a launch beside the routed experts', or part of it where the device's
    thresholds say so (``merged``).
    """
    details: tuple[Any, ...] = problem.details
    spec, layout, shared, logits, bias, scale, combine_dtype = details
    dtype, top_k, width = problem.dtype, spec.top_k, layout.width
    router = route.router_of(problem._replace(dtype=getattr(mx, logits), details=(spec, bias, scale)))
    kind = kernels.CombineKind(
        router.weights,
        router.weights if combine_dtype is None else getattr(mx, combine_dtype),
        spec.identity_experts > 0,
        spec.scale if spec.scale_place == "output" else 1.0,
    )
    identity = kind.identity
    parts = _Parts(2 + (bias is not None) + (scale is not None), layout, shared)
    chosen: list[Shape] = [(1, top_k), (1, top_k)]
    inners: list[Shape] = [(1, top_k, width)]

    choose = router.prepare(1)
    combine = kernels.down_combine(layout, shared, top_k, dtype, kind, variant).prepare(1, [dtype])
    if shared is None:
        first = kernels.gate_up(layout, top_k, dtype, variant).prepare(top_k, [dtype])

        def alone(flat: tuple[mx.array, ...]) -> mx.array:
            x = flat[0]
            indices, mix = choose(flat[parts.router], chosen)
            (inner,) = first([x, indices, *flat[parts.gate_up]], inners)
            last = [x] if identity else ()
            return combine([inner, indices, mix, *flat[parts.down], *last], [x.shape])[0]

        return alone

    besides: list[Shape] = [(1, shared.layout.width)]
    if shared.output_gate is not None:
        besides.append((1,))
    dtypes = [dtype] * len(besides)
    merged = thresholds().merged
    if merged:
        both = kernels.gate_up_with_shared(layout, shared, top_k, dtype, variant).prepare(
            top_k + 1, [dtype, *dtypes]
        )
    else:
        beside = kernels.shared_gate_up(shared, dtype, variant).prepare(1, dtypes)
        first = kernels.gate_up(layout, top_k, dtype, variant).prepare(top_k, [dtype])

    def with_shared(flat: tuple[mx.array, ...]) -> mx.array:
        x = flat[0]
        indices, mix = choose(flat[parts.router], chosen)
        of_shared = flat[parts.shared_gate_up] + flat[parts.output_gate]
        if merged:
            inner, *left = both([x, indices, *flat[parts.gate_up], *of_shared], inners + besides)
        else:
            left = beside([x, *of_shared], besides)
            (inner,) = first([x, indices, *flat[parts.gate_up]], inners)
        inputs = [inner, indices, mix, *flat[parts.down], left[0], *flat[parts.shared_down], *left[1:]]
        if identity:
            inputs.append(x)
        return combine(inputs, [x.shape])[0]

    return with_shared


class _Parts:
    """Where in the flat list what stands."""

    def __init__(self, own: int, layout: ExpertLayout, shared: SharedLayout | None):
        self.router = slice(1, own)  # logits, selection bias, expert scale
        self.gate_up, self.down, end = _network(own, layout)
        if shared is not None:
            self.shared_gate_up, self.shared_down, end = _network(end, shared.layout)
            self.output_gate = slice(end, end + _arrays(shared.output_gate))


def _network(start: int, layout: ExpertLayout) -> tuple[slice, slice, int]:
    middle = start + _arrays(layout.gate) + _arrays(layout.up)
    end = middle + _arrays(layout.down)
    return slice(start, middle), slice(middle, end), end


def _arrays(layout: Layout | None) -> int:
    return 0 if layout is None else len(operand_of("", layout).names)
