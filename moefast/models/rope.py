"""Rotary position embeddings: mlx-lm's, with every setting it would ignore refused by name.

Su et al., "RoFormer" (arXiv:2104.09864). Scaling: linear (Chen et al. 2023), dynamic NTK, YaRN (Peng et
al., arXiv:2309.00071), Llama 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import mlx.nn as nn
from mlx_lm.models.rope_utils import initialize_rope

from ..errors import refuse

_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
_NEEDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}


def make_rope(
    family: str,
    dims: int,
    theta: float,
    scaling: Mapping[str, Any] | None,
    max_position_embeddings: int | None,
    traditional: bool = False,
) -> nn.Module:
    """The rotation of the first ``dims`` dimensions of each head.

    Args:
        family: for errors.
        dims: rotated dimensions, even.
        theta: base of the wavelengths.
        scaling: ``rope_scaling`` of the configuration.
        max_position_embeddings: context length of the training; dynamic scaling starts there.
        traditional: rotate neighbouring pairs instead of halves.

    Raises:
        ValueError: a rope type that is not implemented, or one of its numbers is missing.
    """
    scaling = dict(scaling) if scaling else {}
    rope_type = scaling.get("rope_type") or scaling.get("type") or "default"
    if rope_type not in _TYPES:
        # mlx-lm would run longrope with the long factors only, and mrope without its sections.
        refuse(family, f"rope_scaling type must be one of {_TYPES}", repr(rope_type))
    missing = [name for name in _NEEDS.get(rope_type, ()) if scaling.get(name) is None]
    if missing:
        refuse(family, f"rope_scaling of type {rope_type!r} must set {missing}", scaling)
    if rope_type in ("dynamic", "llama3") and max_position_embeddings is None:
        refuse(family, f"rope type {rope_type!r} needs max_position_embeddings", None)
    if rope_type == "yarn":
        _check_yarn(family, scaling)
    if dims <= 0 or dims % 2:
        refuse(family, "the rotated dimensions must be a positive even number", dims)
    rope: nn.Module = initialize_rope(
        dims, theta, traditional, {**scaling, "type": rope_type}, max_position_embeddings
    )
    return rope


def _check_yarn(family: str, scaling: Mapping[str, Any]) -> None:
    """mlx-lm derives the attention factor from the other numbers and truncates the ramp's ends."""
    factor = float(scaling["factor"])
    attention_factor = scaling.get("attention_factor")
    derived = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    if attention_factor is not None and not math.isclose(attention_factor, derived, rel_tol=1e-6):
        refuse(family, f"yarn's attention_factor must be the derived {derived:.6g}", attention_factor)
    if scaling.get("truncate") is False:
        refuse(family, "yarn's truncate must be true", False)
