"""Steps that the families' ``sanitize`` methods are made of: from a checkpoint's tensors to the model's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import mlx.core as mx

Weights = dict[str, mx.array]

# Tensors of one quantized matrix; an unquantized one has only the first.
_PARTS = ("weight", "scales", "biases", "bias", "global_scale")
_PROJECTIONS = {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"}


def stack_experts(
    weights: Weights,
    source: str,
    target: str,
    num_experts: int,
    projections: dict[str, str] = _PROJECTIONS,
) -> None:
    """Replace ``source.{e}.{name}.{part}`` of all experts by one ``target.{projection}.{part}``, in place.

    Original checkpoints keep each expert's matrices apart; a gathered product needs one stack
    ``[num_experts, out, in]``. Nothing happens where expert 0 is not there (already stacked).
    """
    for name, projection in projections.items():
        for part in _PARTS:
            if f"{source}.0.{name}.{part}" in weights:
                keys = [f"{source}.{e}.{name}.{part}" for e in range(num_experts)]
                if all(key in weights for key in keys):  # a gap is reported as missing by the loader
                    weights[f"{target}.{projection}.{part}"] = mx.stack([weights.pop(key) for key in keys])


def drop_unused(weights: Weights, *, tied: bool, prediction_layers: range = range(0)) -> Weights:
    """``weights`` without the tensors that checkpoints carry and no model here reads.

    - Multi-token prediction (arXiv:2412.19437, section 2.2): layers after the last one, which speculate on
      further tokens and take no part in plain decoding. Only ``prediction_layers``: any other surplus layer
      means that configuration and weights do not belong together, and is left for the loader to refuse.
    - ``lm_head`` beside tied embeddings: a copy of the embedding.
    - ``rotary_emb.inv_freq``: a constant that old versions of transformers saved.
    """

    def unused(key: str) -> bool:
        layer = re.match(r"model\.layers\.(\d+)\.", key)
        predicts = layer is not None and int(layer[1]) in prediction_layers
        return predicts or (tied and key.startswith("lm_head.")) or key.endswith("rotary_emb.inv_freq")

    return {key: value for key, value in weights.items() if not unused(key)}


def rename(weights: Weights, pairs: Iterable[tuple[str, str]]) -> None:
    """Rename single tensors in place, where they exist."""
    for former, name in pairs:
        if former in weights:
            weights[name] = weights.pop(former)


def keep_at(
    suffixes: tuple[str, ...], *, bits: int, group_size: int
) -> Callable[[str, Any], bool | dict[str, int]]:
    """A quantization predicate: layers whose path ends in a suffix get these numbers, all others the
    defaults of the conversion."""

    def predicate(path: str, layer: Any) -> bool | dict[str, int]:
        if path.endswith(suffixes):
            return {"group_size": group_size, "bits": bits}
        return True

    return predicate
