"""From a layer to the :class:`moefast.Projection` an operation takes: references, no copies."""

from __future__ import annotations

from functools import lru_cache

import mlx.nn

from ..specs import MODE_DEFAULTS, QuantSpec
from ..weights import Projection

# Layers whose arrays say everything. Anything else that stands in a projection's place (a LoRA layer, a
# subclass with a forward pass of its own) has to be called.
_PLAIN = {
    ("mlx.nn.layers.linear", "Linear"),
    ("mlx_lm.models.switch_layers", "SwitchLinear"),
    ("moefast.nn.linear", "Embedding"),
    ("moefast.nn.linear", "Linear"),
    ("moefast.nn.switch", "SwitchLinear"),
}
_QUANTIZED = {
    ("mlx.nn.layers.quantized", "QuantizedLinear"),
    ("mlx_lm.models.switch_layers", "QuantizedSwitchLinear"),
    ("moefast.nn.linear", "QuantizedEmbedding"),
    ("moefast.nn.linear", "QuantizedLinear"),
    ("moefast.nn.switch", "QuantizedSwitchLinear"),
}


@lru_cache(maxsize=256)
def _quant_spec(bits: int | None, group_size: int | None, mode: str) -> QuantSpec:
    # mlx-lm's stacks keep the None that stands for the mode's default.
    default_bits, default_group_size = MODE_DEFAULTS[mode]
    return QuantSpec(bits=bits or default_bits, group_size=group_size or default_group_size, mode=mode)


def plain(layer: mlx.nn.Module) -> Projection:
    """The weight of a layer that is not quantized."""
    return Projection(layer["weight"], bias=layer.get("bias"))


def quantized(layer: mlx.nn.Module) -> Projection:
    """The weight of a quantized layer."""
    return Projection(
        layer["weight"],
        layer["scales"],
        layer.get("biases"),
        bias=layer.get("bias"),
        global_scale=layer.get("global_scale"),
        quant=_quant_spec(layer.bits, layer.group_size, layer.mode),
    )


def projection_of(layer: mlx.nn.Module) -> Projection | None:
    """The weight of a linear layer (dense or stacked, quantized or not), or None for any other layer."""
    kind = (type(layer).__module__, type(layer).__name__)
    if kind in _PLAIN:
        return plain(layer)
    return quantized(layer) if kind in _QUANTIZED else None
