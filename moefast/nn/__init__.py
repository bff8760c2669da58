"""Layers on top of the operations: what a model definition is made of."""

from .linear import Embedding, Linear, QuantizedEmbedding, QuantizedLinear
from .mlp import MLP
from .moe import MoE, Names
from .router import Router
from .switch import QuantizedSwitchLinear, SwitchGLU, SwitchLinear

__all__ = [
    "MLP",
    "Embedding",
    "Linear",
    "MoE",
    "Names",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizedSwitchLinear",
    "Router",
    "SwitchGLU",
    "SwitchLinear",
]
