"""What the Metal kernels do not take."""

from __future__ import annotations

import struct
from typing import Any, cast

import mlx.core as mx

from ...registry import Problem
from ...weights import ExpertLayout, SharedLayout
from . import decode, route, verdicts
from .device import here
from .launch import emulated
from .matvec import Fidelity
from .plan import MAX_EXPERTS

# What a phase may come to run (see dispatch.py), as verdicts call it.
_PARTS = {
    "exact": {"empty": (), "decode": ("decode",), "band": ("band", "tiles"), "prefill": ("tiles",)},
    "fast": {"empty": (), "decode": ("decode-fast",), "band": ("band-fast", "tiles"), "prefill": ("tiles",)},
}


def elsewhere(problem: Problem) -> str | None:
    """That a problem is one of another device, or None."""
    if problem.device != here():
        return f"its kernels run on the {here()}, and MLX's default device is the {problem.device}"
    return None


def why_not(problem: Problem, fidelity: Fidelity = "exact") -> str | None:
    """Why the kernels cannot run ``problem``, or None."""
    if (reason := elsewhere(problem) or _verdict(problem, fidelity)) is not None:
        return reason
    if problem.op == "route":
        return route.why_not(problem)
    if problem.op == "moe":
        spec, layout, shared, logits, bias, scale, _ = cast(tuple[Any, ...], problem.details)
        routing = problem._replace(op="route", dtype=getattr(mx, logits), details=(spec, bias, scale))
        return route.why_not(routing) or _networks(problem.dtype, layout, shared)
    layout, top_k, *_ = cast(tuple[Any, ...], problem.details)
    return "top_k=0" if top_k == 0 else _networks(problem.dtype, layout, None)


def _verdict(problem: Problem, fidelity: Fidelity = "exact") -> str | None:
    """What a self-check on this GPU has against it."""
    if emulated():
        return None
    parts = () if problem.op == "route" else _PARTS[fidelity][problem.phase]
    routing = ("route",) if problem.op in ("route", "moe") else ()
    return next(filter(None, map(verdicts.reason_against, (*routing, *parts))), None)


def _networks(dtype: mx.Dtype, layout: ExpertLayout, shared: SharedLayout | None) -> str | None:
    if layout.num_experts > MAX_EXPERTS:
        return f"num_experts={layout.num_experts} > {MAX_EXPERTS}"
    for network in (layout, *([] if shared is None else [shared.layout])):
        if network.hidden == 0 or network.width == 0:
            return f"experts of {network.hidden} x {network.width} values"
        reason = _numbers(network.activation.parameters())
        if reason is not None:
            return reason
    return decode.why_not(dtype, layout, shared)


def _numbers(parameters: dict[str, Any]) -> str | None:
    for name, value in parameters.items():
        try:
            struct.pack("<f", value or 0.0)
        except OverflowError:
            return f"{name}={value} is too large for float32"
    return None
