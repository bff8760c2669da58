"""Whether a module of a loaded model is what its adapter expects, and what would run it: asked before
anything is changed. Nothing here evaluates an array."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn

from .. import tuning
from ..backends import backends, registry
from ..families import Block
from ..nn.projection import plain, projection_of, quantized
from ..ops.experts import _problem as experts_problem
from ..ops.moe import _problem as moe_problem
from ..ops.quantized_matmul import _problem as matmul_problem
from ..ops.route import _problem as route_problem
from ..registry import Problem, device_name
from ..weights import dtype_name, form_of
from .apart import ROUTER, apart_spec
from .block import fused_weights, is_plain, stack_size, widens
from .experts import STACKS, weights_of
from .known import why_changed, why_unlike
from .routing import part, router_logits, router_spec, selection_bias
from .stacks import GLU, MLP, why_no_activation

# One call of each phase.
TOKENS = {"decode": 1, "band": 16, "prefill": 512}

_LINEAR = ("switch_layers.SwitchLinear", "switch_layers.QuantizedSwitchLinear")
_ADAPTED = ("mlx_lm.tuner.lora", "LoRASwitchLinear")


class Verdict(NamedTuple):
    """Why not (then nothing else counts), or the backend of each phase, and what to say of it.

    ``problems``: what the module would ask a backend in each phase; ``hidden``: width of its input;
    ``tuned``: the reason is that the original is faster.
    """

    reason: str | None = None
    backends: dict[str, str] = {}  # noqa: RUF012 (never written to)
    remark: str | None = None
    problems: dict[str, Problem] = {}  # noqa: RUF012 (never written to)
    hidden: int = 0
    tuned: bool = False

    @property
    def originals(self) -> frozenset[str]:
        """Phases in which the original runs."""
        return frozenset(phase for phase, name in self.backends.items() if name == tuning.ORIGINAL)


def look_at_block(row: Block, block: Any, backend: str, dtype: mx.Dtype) -> Verdict:
    """A block of the class that ``row`` describes.

    Args:
        row: what is known of the class.
        block: the module.
        backend: that is asked for, or ``"auto"``.
        dtype: of the activations.
    """
    reason = why_changed(row.sources)
    if reason is None and row.router is not None:
        owner = row.logits.partition(".")[0]
        reason = why_unlike(part(block, owner), f"{row.module}.{row.router}")
    experts = part(block, row.experts)
    if reason is None:
        reason = why_not_stack(experts)
    if reason is not None:
        return Verdict(reason)
    try:
        problems, remark = _block_problems(row, block, experts, dtype)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        return Verdict(f"its parameters are not what its class has: {error}")
    return _ask(problems, backend)._replace(remark=remark, hidden=_hidden(row, block))


def look_at_experts(experts: Any, backend: str, dtype: mx.Dtype) -> Verdict:
    """A SwitchGLU or SwitchMLP on its own."""
    reason = why_not_stack(experts)
    if reason is not None:
        return Verdict(reason)
    try:
        weights = weights_of(experts)
        if weights is None:
            return Verdict("its projections are adapted")
        shapes = {phase: (tokens, weights.layout.hidden) for phase, tokens in TOKENS.items()}
        problems = {
            phase: experts_problem(
                "switch_glu",
                shape,
                dtype,
                weights.layout,
                ((shape[0], 1), mx.uint32),
                None,
                None,
                device_name(),
            )
            for phase, shape in shapes.items()
        }
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        return Verdict(f"its parameters are not what its class has: {error}")
    return _ask(problems, backend)._replace(hidden=weights.layout.hidden)


def look_at_router(router: Any, backend: str, dtype: mx.Dtype) -> Verdict:
    """A router on its own, :class:`.apart.AcceleratedRouter`."""
    reason = why_changed([f"{ROUTER}.__call__"])
    if reason is not None:
        return Verdict(reason)
    try:
        spec, scale = apart_spec(router), form_of(router.per_expert_scale)
        logits = router.proj(mx.zeros((1, router.scale.shape[0]), dtype))
        problems = {
            phase: route_problem((n, logits.shape[-1]), logits.dtype, spec, None, scale, device_name())
            for phase, n in TOKENS.items()
        }
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        return Verdict(f"its parameters are not what its class has: {error}")
    return _ask(problems, backend)


def look_at_dense(layer: Any, backend: str, dtype: mx.Dtype) -> Verdict:
    """A layer beside the experts. Of a linear one its product is asked about; others are native's alone."""
    try:
        weight = projection_of(layer)
        if weight is None and isinstance(layer, mlx.nn.Embedding | mlx.nn.QuantizedEmbedding):
            packed = isinstance(layer, mlx.nn.QuantizedEmbedding)
            weight = quantized(layer) if packed else plain(layer)  # as the head, where it is that, too
        if weight is None:
            details, hidden = _beside(layer)
            return _ask_native(backend, details, dtype)._replace(hidden=hidden)
        problems = {
            phase: matmul_problem(
                "quantized_matmul", (tokens, weight.layout.in_dims), dtype, (weight.layout,), device_name()
            )
            for phase, tokens in TOKENS.items()
        }
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        return Verdict(f"its parameters are not what its class has: {error}")
    return _ask(problems, backend)._replace(hidden=weight.layout.in_dims)


def _beside(layer: Any) -> tuple[tuple[Hashable, ...], int]:
    """What tells a norm, a rotation or an attention from others, and the width of its input."""
    if isinstance(layer, mlx.nn.RoPE):
        return ("RoPE", layer.dims, layer.traditional), int(layer.dims)
    if isinstance(layer, mlx.nn.RMSNorm | mlx.nn.LayerNorm):
        dims = layer.dims if isinstance(layer, mlx.nn.LayerNorm) else layer["weight"].shape[0]
        return (type(layer).__name__, dims), int(dims)
    found = [projection_of(child) for child in layer.children().values() if isinstance(child, mlx.nn.Module)]
    layouts = tuple(weight.layout for weight in found if weight is not None)
    kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
    return (kind, layouts), layouts[0].in_dims if layouts else 0


def _ask_native(backend: str, details: tuple[Hashable, ...], dtype: mx.Dtype) -> Verdict:
    """Of a layer that no other backend has. It asks for operations of its own; the problems only name it."""
    wanted = registry.default if backend == "auto" else backend
    reason = backends()["native"]
    if reason is None and (device_name() != "cpu" or wanted not in ("auto", "native")):
        reason = "only the native backend on a CPU has it"
    if reason is not None:
        return Verdict(reason)
    problems = {phase: Problem("beside", device_name(), dtype, phase, details) for phase in TOKENS}
    slower = {one.phase for one in problems.values() if tuning.choice(one) == tuning.ORIGINAL}
    stays = slower if wanted == "auto" else set()
    return _verdict(problems, {phase: tuning.ORIGINAL if phase in stays else "native" for phase in TOKENS})


def why_not_stack(experts: Any) -> str | None:
    """Why these experts are not mlx-lm's own, plain or adapted, with an activation that kernels have."""
    if experts is None:
        return "it has no stacked experts where its class has them"
    reasons = [why_unlike(experts, kind) for kind in STACKS]
    if all(reasons):
        return f"of its experts: {reasons[0]}"
    reason = why_no_activation(experts.activation)
    if reason is not None:
        return reason
    for name in GLU if reasons[0] is None else MLP:
        layer = experts.get(name)
        if layer is None:
            return f"its experts have no {name}"
        if (type(layer).__module__, type(layer).__name__) == _ADAPTED:
            continue
        unlike = [why_unlike(layer, kind) for kind in _LINEAR]
        if all(unlike):
            return f"of {name}: {unlike[0]}"
    return None


def _block_problems(
    row: Block, block: Any, experts: Any, dtype: mx.Dtype
) -> tuple[dict[str, Problem], str | None]:
    """What the block would ask a backend in each phase, and a remark. Raises whatever does not fit."""
    spec = router_spec(row, block, stack_size(experts), dtype_name(dtype))
    hidden = _hidden(row, block)
    x = mx.zeros((1, hidden), dtype)
    logits = router_logits(row, block, x)
    bias = selection_bias(row, block)
    device = device_name()
    route = {
        phase: route_problem((n, logits.shape[-1]), logits.dtype, spec, form_of(bias), None, device)
        for phase, n in TOKENS.items()
    }
    shared = None if row.shared is None else block.get(row.shared)
    gate = None if row.shared_gate is None else block[row.shared_gate]
    if row.mix is not None:
        block[row.mix]
    weights, beside = fused_weights(row, experts, shared, gate)
    if weights is None:
        return route, "its experts are adapted, and run as they are"
    combine = None if row.combine is None else getattr(mx, row.combine)
    layout = weights.layout
    plain = is_plain(row, block) and not widens(row, dtype, logits.dtype)
    if plain and (shared is None or beside is not None):
        of_shared = None if beside is None else beside.layout
        return {
            phase: moe_problem(
                (n, hidden),
                dtype,
                (n, logits.shape[-1]),
                logits.dtype,
                spec,
                layout,
                of_shared,
                form_of(bias),
                None,
                combine,
                device,
            )
            for phase, n in TOKENS.items()
        }, None
    return {
        phase: experts_problem(
            "experts",
            (n, layout.hidden),
            dtype,
            layout,
            ((n, spec.top_k), mx.uint32),
            ((n, spec.top_k), mx.float32),
            combine,
            device,
        )
        for phase, n in TOKENS.items()
    }, None


def _hidden(row: Block, block: Any) -> int:
    """Width of the block's input, which the router has whole, quantized or not."""
    router = part(block, row.logits)
    if isinstance(router, mx.array):
        return int(router.shape[-1])
    projection = projection_of(getattr(router, "linear", router))
    if projection is None:
        raise ValueError(f"its router is a {type(router).__name__}")
    return projection.layout.in_dims


def _ask(problems: dict[str, Problem], backend: str) -> Verdict:
    """Who takes these problems. With "auto" the reference is no gain: it is what the model does already; nor
    is a backend where ``moefast tune`` found the original to be faster."""
    wanted = registry.default if backend == "auto" else backend
    takers: dict[str, str] = {}
    refused: dict[str, str] = {}
    for phase, problem in problems.items():
        tuned = tuning.choice(problem) if wanted == "auto" else None
        if tuned == tuning.ORIGINAL:
            takers[phase] = tuned
            continue
        if tuned is not None and backends().get(tuned, "") is not None:  # it cannot run here any more
            tuned = None
        taker, reasons = registry.ask(problem, tuned or wanted)
        if taker is None:
            return Verdict("; ".join(f"{name}: {reason}" for name, reason in reasons.items()))
        takers[phase] = taker.name
        refused |= reasons
    if wanted == "auto" and set(takers.values()) == {"reference"}:
        return Verdict("; ".join(f"{name}: {reason}" for name, reason in refused.items()))
    return _verdict(problems, takers)


def _verdict(problems: dict[str, Problem], takers: dict[str, str]) -> Verdict:
    if set(takers.values()) == {tuning.ORIGINAL}:
        return Verdict("moefast tune found the original faster", problems=problems, tuned=True)
    return Verdict(None, takers, problems=problems)
