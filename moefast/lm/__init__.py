"""Language models: load a checkpoint, generate text, make random checkpoints. Needs the ``lm`` extra.

Nothing of mlx-lm is imported before it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .presets import FAMILIES, preset

if TYPE_CHECKING:
    from .checkpoint import init_model, random_parameters
    from .generate import generate, stream
    from .load import load

# name -> module that has it
_LAZY = {
    "generate": "generate",
    "init_model": "checkpoint",
    "load": "load",
    "random_parameters": "checkpoint",
    "stream": "generate",
}

__all__ = ["FAMILIES", "generate", "init_model", "load", "preset", "random_parameters", "stream"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
