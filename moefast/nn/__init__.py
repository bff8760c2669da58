"""Layers on top of the operations: what a model definition is made of."""

from .linear import Embedding, Linear, QuantizedEmbedding, QuantizedLinear
from .mlp import MLP
from .moe import MoE, Names
from .norm import LayerNorm, RMSNorm
from .rope import Rope
from .router import Router
from .switch import QuantizedSwitchLinear, SwitchGLU, SwitchLinear

__all__ = [
    "MLP",
    "Embedding",
    "LayerNorm",
    "Linear",
    "MoE",
    "Names",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizedSwitchLinear",
    "RMSNorm",
    "Rope",
    "Router",
    "SwitchGLU",
    "SwitchLinear",
]
