"""Language models: load a checkpoint, generate text, make random checkpoints. Needs the ``lm`` extra.

Importing this package is cheap: mlx-lm (and with it transformers) is imported by the first call that
needs it.
"""

from .checkpoint import Checkpoint, init_model, random_parameters
from .generate import generate, stream
from .load import load
from .presets import FAMILIES, preset

__all__ = [
    "FAMILIES",
    "Checkpoint",
    "generate",
    "init_model",
    "load",
    "preset",
    "random_parameters",
    "stream",
]
