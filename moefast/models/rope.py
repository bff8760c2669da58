"""Rotary position embeddings: mlx-lm's, with the settings it would misread set right or refused by name.

Su et al., "RoFormer" (arXiv:2104.09864). Scaling: linear (Chen et al., arXiv:2306.15595), dynamic NTK, YaRN
(Peng et al., arXiv:2309.00071), Llama 3 (arXiv:2407.21783).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.rope_utils import DynamicNTKScalingRoPE, initialize_rope

from .. import ops
from ..errors import refuse
from ..nn import Rope
from ..nn.recall import training_backend

_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
_NEEDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    # mlx-lm would take 4096 for the last one, transformers max_position_embeddings.
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
    # A null says "the default", which mlx-lm would take for a number.
    scaling = {name: value for name, value in (scaling or {}).items() if value is not None}
    rope_type = scaling.get("rope_type") or scaling.get("type") or "default"
    if rope_type not in _TYPES:
        # mlx-lm would run longrope with the long factors only, and mrope without its sections.
        refuse(family, f"rope_scaling type must be one of {_TYPES}", repr(rope_type))
    missing = [name for name in _NEEDS.get(rope_type, ()) if name not in scaling]
    if missing:
        refuse(family, f"rope_scaling of type {rope_type!r} must set {missing}", scaling)
    if dims <= 0 or dims % 2:
        refuse(family, "the rotated dimensions must be a positive even number", dims)
    if rope_type == "dynamic":
        if max_position_embeddings is None:
            refuse(family, "rope type 'dynamic' needs max_position_embeddings", None)
        return _DynamicRope(dims, max_position_embeddings, traditional, theta, scaling["factor"])
    rope = initialize_rope(dims, theta, traditional, {**scaling, "type": rope_type}, max_position_embeddings)
    if isinstance(rope, nn.RoPE):
        return Rope(dims, traditional=traditional, base=theta, scale=rope.scale)
    factor = _attention_factor(family, scaling) if rope_type == "yarn" else 1.0
    return Rope(dims, traditional=traditional, freqs=rope._freqs, factor=factor)


class _DynamicRope(DynamicNTKScalingRoPE):
    """mlx-lm's, which cannot batch: here the longest row of a padded batch decides, as in transformers."""

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        """x: ``[batch, heads, length, head_dim]``, offset: of all rows or ``[batch]`` -> the shape of x."""
        settings: dict[str, Any] = {"traditional": self.traditional, "backend": training_backend(self)}
        turn = partial(ops.rope, x, self.dims, offset=offset, **settings)
        if not isinstance(offset, mx.array):
            return turn(base=self._base(max(x.shape[-2] + offset, self.max_position_embeddings)))
        base = self._base(mx.maximum(offset.max() + x.shape[-2], self.max_position_embeddings))
        return turn(freqs=base ** (mx.arange(0, self.dims, 2) / self.dims))

    def _base(self, length: Any) -> Any:
        stretch = self.factor * length / self.max_position_embeddings - (self.factor - 1)
        return self.base * stretch ** (self.dims / (self.dims - 2))


def _attention_factor(family: str, scaling: Mapping[str, Any]) -> float:
    """YaRN's factor on rotated queries and keys, as transformers defines it; mlx-lm does not know
    ``attention_factor``, nor the blunt edges of the ramp that ``truncate`` = false asks for."""
    if scaling.get("truncate") is False:
        refuse(family, "yarn's truncate must be true", False)
    if "attention_factor" in scaling:
        return float(scaling["attention_factor"])
    factor = float(scaling["factor"])
    mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and all_dim:
        return _mscale(factor, mscale) / _mscale(factor, all_dim)
    if (mscale or 1.0) != 1.0 or all_dim:
        # DeepSeek's formula (mlx-lm's and Ling's) uses the one there is, transformers neither.
        refuse(family, "yarn's mscale and mscale_all_dim must be set together", dict(scaling))
    return _mscale(factor, 1.0)


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
