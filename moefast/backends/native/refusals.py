"""What the CPU kernels do not take."""

from __future__ import annotations

import struct
from typing import Any

from ...registry import Problem
from ...specs import RouterSpec
from ...weights import ExpertLayout, Layout, SharedLayout, dtype_name
from .. import dtypes
from .loading import bindings
from .plans import BESIDE_EXPERTS

_MOST_PRODUCTS = 8  # kMostProducts of csrc/mlx/plan.h


def why_not(problem: Problem) -> str | None:
    """Why the kernels cannot run ``problem``, or None."""
    if problem.device != "cpu":
        return "its kernels run on a CPU, and MLX's default device is the GPU"
    if problem.op in BESIDE_EXPERTS and problem.op != "attention" and not bindings().native:
        return f"it runs through NumPy here, which has no {problem.op}"
    for detail in problem.details:
        if isinstance(detail, RouterSpec):
            reason = _router(detail)
        elif isinstance(detail, SharedLayout):
            reason = _network(detail.layout)
        elif isinstance(detail, ExpertLayout):
            reason = _network(detail)
        else:
            reason = _projection(detail) if isinstance(detail, Layout) else None
        if reason is not None:
            return reason
    if problem.op == "quantized_matmuls":
        return _together(dtype_name(problem.dtype), problem.details)
    if problem.op in ("switch_glu", "experts") and problem.details[1] == 0:
        return "top_k=0"
    return None


def _network(layout: ExpertLayout) -> str | None:
    for projection in (layout.gate, layout.up, layout.down):
        if projection is not None and (reason := _projection(projection)):
            return reason
    return _numbers(layout.activation.parameters())


def _projection(layout: Layout) -> str | None:
    if layout.out_dims == 0 or layout.in_dims == 0:
        return f"a weight of {layout.out_dims} x {layout.in_dims} values"
    return None


def _together(x: str, layouts: tuple[Any, ...]) -> str | None:
    if not 1 <= len(layouts) <= _MOST_PRODUCTS:
        return f"{len(layouts)} weights, not 1..{_MOST_PRODUCTS}"
    out = sorted({dtypes.product(x, layout) for layout in layouts})
    return f"products of dtypes {', '.join(out)}" if len(out) > 1 else None


def _router(spec: RouterSpec) -> str | None:
    names = ("softcap", "temperature", "renormalize_eps", "scale")
    return _numbers({name: getattr(spec, name) for name in names})


def _numbers(values: dict[str, float | None]) -> str | None:
    """The kernels' numbers are float32; what has no such value is left to the reference."""
    for name, value in values.items():
        if value is None:
            continue
        try:
            (rounded,) = struct.unpack("<f", struct.pack("<f", value))
        except OverflowError:
            return f"{name}={value} is too large for float32"
        if value > 0 and rounded == 0:
            return f"{name}={value} is too small for float32"
    return None
