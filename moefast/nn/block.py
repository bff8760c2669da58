"""A block of experts that remembers its last call, whosever block it is: the layers are handed over.

:func:`recalled` is tried first; where it gives None, the call is made in full, and :func:`remember` keeps
what it chose.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn

from ..backends import registry
from ..registry import Choice
from .recall import Recall

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def recalled(
    owner: mlx.nn.Module,
    x: mx.array,
    logits: mx.array,
    bias: mx.array | None,
    experts: mlx.nn.Module,
    shared: mlx.nn.Module | None,
    shared_gate: mlx.nn.Module | None,
    facts: tuple[Any, ...],
) -> mx.array | None:
    """The block's output by the kernels of its last call, or None where this call is of another kind.

    Args:
        owner: the block; what it remembers stands in its ``__dict__`` as ``_recall``.
        x: ``[..., hidden]``.
        logits: ``[..., num_experts]``.
        bias: selection bias ``[num_experts]``, or None.
        experts: holds ``gate_proj``, ``up_proj`` and ``down_proj``: stacks.
        shared: holds three dense layers of these names, or None.
        shared_gate: dense layer ``hidden -> 1``, or None.
        facts: what else the call depends on (spec, activations, dtype of the combine), equal where the
            last call's will do. Two modules are equal where their parameters are: name their classes.
    """
    own = owner.__dict__
    recall: Recall | None = own.get("_recall")
    if recall is None or own["_training"] or registry.default != recall.default or facts != recall.facts:
        return None
    y: mx.array | None = recall.of_layers(
        x, logits, bias, experts, shared, shared_gate, recall.types, recall.low, recall.high
    )
    return y


def remember(
    owner: mlx.nn.Module,
    choice: Choice,
    x: mx.array,
    experts: mlx.nn.Module,
    shared: mlx.nn.Module | None,
    shared_gate: mlx.nn.Module | None,
    facts: tuple[Any, ...],
) -> None:
    """Keep ``choice``, made for a call of ``moe`` on the arrays of these layers; arguments as of
    :func:`recalled`. Nothing is kept in training, nor where the choice cannot be recalled."""
    own = owner.__dict__
    if choice.of_layers is None or owner.training:
        own["_recall"] = None
        return
    layers = []
    for network in (experts, shared):
        if network is not None:
            layers += [network, *(network[name] for name in _PROJECTIONS)]
    if shared_gate is not None:
        layers.append(shared_gate)
    own["_recall"] = Recall(choice, x.shape, tuple(type(layer) for layer in layers), facts)
