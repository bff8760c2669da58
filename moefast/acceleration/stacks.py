"""From mlx-lm's stacked experts and dense networks to what operations take: references, no copies."""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache, lru_cache
from typing import Any

import mlx.nn

from ..nn.projection import projection_of
from ..specs import Activation
from ..weights import ExpertWeights, Projection, SharedExpert
from .known import PACKAGE, why_changed

# The largest float32: a limit that limits nothing.
_NO_LIMIT = 3.4028234663852886e38

# Class of an activation module -> name, and parameter -> attribute.
_ACTIVATIONS: dict[str, tuple[str, dict[str, str]]] = {
    "switch_layers.SwiGLU": ("swiglu", {}),
    "activations.SwigluOAI": ("swiglu_oai", {"alpha": "_alpha", "limit": "_limit"}),
    "step3p5.ClampedSwiGLU": ("swiglu_clipped", {"limit": "limit"}),
    "deepseek_v41.DeepseekV41SwiGLU": ("swiglu_clamped", {"limit": "limit"}),
    "gemma4_text.GeGLU": ("geglu_tanh", {}),
    "kimi_k3.SiTU": ("situ", {"beta": "beta", "linear_beta": "linear_beta"}),
    "muse_spark.PreciseSwiGLU": ("swiglu_clamped", {}),  # float32, never clamped
    "mlx.nn.layers.activations.ReLU2": ("relu2", {}),
    "mlx.nn.layers.activations.GELU": ("gelu_tanh", {"approx": "_approx"}),
}

# What the __call__ of these calls, of mlx-lm's own.
_CALLED = {
    "switch_layers.SwiGLU": "activations.swiglu",
    "activations.SwigluOAI": "activations.swiglu_oai",
    "step3p5.ClampedSwiGLU": "step3p5.clamped_swiglu",
    "deepseek_v41.DeepseekV41SwiGLU": "activations.swiglu",
    "gemma4_text.GeGLU": "gemma4_text.geglu",
    "kimi_k3.SiTU": "kimi_k3._situ",
    "muse_spark.PreciseSwiGLU": "activations.precise_swiglu",
}

GLU, MLP = ("gate_proj", "up_proj", "down_proj"), ("fc1", "fc2")


def activation_of(module: Any) -> Activation | None:
    """What stands between the projections, or None for an activation that no kernel has."""
    kind: Any = type(module)
    row = _row(kind)
    if row is None:
        return None
    name, attributes = row
    if not attributes:
        return _activation(name, ())
    if name == "gelu_tanh":
        return _activation(name, ()) if module._approx in ("precise", "tanh") else None
    return _activation(name, tuple([(p, getattr(module, attribute)) for p, attribute in attributes.items()]))


@cache
def _row(kind: Any) -> tuple[str, dict[str, str]] | None:
    return _ACTIVATIONS.get(f"{kind.__module__.removeprefix(PACKAGE + '.')}.{kind.__qualname__}")


def activation_facts(module: Any) -> Hashable:
    """Equal for activations that compute the same: all that one without parameters has is its class."""
    kind: Any = type(module)
    row = _row(kind)
    return kind if row is None or not row[1] else activation_of(module)


def shared_facts(network: Any) -> Hashable:
    """The same of a shared expert."""
    own = network.get("activation")
    return network.__dict__.get("limit") if own is None else activation_facts(own)


def why_no_activation(module: Any) -> str | None:
    """Why no kernel has this activation, or mlx-lm's is not the one that was read; or None."""
    if activation_of(module) is None:
        return f"its activation {type(module).__name__} has no kernel"
    kind = f"{type(module).__module__.removeprefix(PACKAGE + '.')}.{type(module).__qualname__}"
    return why_changed([f"{kind}.__call__", _CALLED[kind]]) if kind in _CALLED else None


@lru_cache(maxsize=64)
def _activation(name: str, parameters: tuple[tuple[str, Any], ...]) -> Activation:
    values = dict(parameters)
    if name == "swiglu_clamped" and values.get("limit", 0) <= 0:
        values["limit"] = _NO_LIMIT
    return Activation(name=name, **values)


def expert_weights(experts: mlx.nn.Module, activation: Activation) -> ExpertWeights | None:
    """The stacks of a SwitchGLU or SwitchMLP; None while a projection is adapted (LoRA) and has to be
    called.

    Raises:
        ValueError: the projections do not fit one another or the activation.
    """
    found = _projections(experts, GLU if "gate_proj" in experts else MLP)
    if found is None:
        return None
    *gate, up, down = found
    return ExpertWeights(gate=gate[0] if gate else None, up=up, down=down, activation=activation)


def shared_expert(
    network: mlx.nn.Module, activation: Activation, output_gate: mlx.nn.Module | None
) -> SharedExpert | None:
    """A dense gated network as an operation takes it; None while a layer has to be called.

    Raises:
        ValueError: the layers do not fit one another.
    """
    found = _projections(network, GLU)
    gating = None if output_gate is None else projection_of(output_gate)
    if found is None or (output_gate is not None and gating is None):
        return None
    gate, up, down = found
    return SharedExpert(gate=gate, up=up, down=down, activation=activation, output_gate=gating)


def shared_activation(network: Any) -> Activation | None:
    """The activation of a shared expert of a class that a row names."""
    own = network.get("activation")
    if own is not None:
        return activation_of(own)
    limit = getattr(network, "limit", None)
    return Activation() if limit is None else Activation(name="swiglu_clipped", limit=limit)


def _projections(owner: mlx.nn.Module, names: tuple[str, ...]) -> list[Projection] | None:
    found = [projection_of(owner[name]) for name in names]
    present = [projection for projection in found if projection is not None]
    return present if len(present) == len(found) else None
