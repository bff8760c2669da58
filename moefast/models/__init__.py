"""Complete model definitions with mlx-lm's ``Model`` interface.

``mlx_lm.generate``, its server, its prompt caches and its samplers run them as they run its own. Needs the
``lm`` extra (mlx-lm supplies KV caches, masks and rotary embeddings).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from ..errors import refuse

FAMILIES = ("granitemoe", "glm4_moe", "qwen2_moe", "bailing_moe", "dbrx")


def get_classes(config: Mapping[str, Any]) -> tuple[type, type]:
    """``(Model, ModelArgs)`` for the content of a config.json.

    Raises:
        ValueError: ``model_type`` is not one of :data:`FAMILIES`.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        refuse("load", f"model_type must be one of {FAMILIES}", repr(family))
    module = importlib.import_module(f"{__name__}.{family}")
    return module.Model, module.ModelArgs
