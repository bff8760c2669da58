"""What a layer remembers of its last call: which kernel it was, so that the next call of the same kind costs
a few checks instead of a description and a choice.

It holds no array and no layer. Parameters are looked up in every call, and whatever may have changed between
two calls (dtypes, shapes, types of layers, training, the default backend) is checked, here or by
:attr:`moefast.registry.Bound.of_layers`; where something has, the call is made in full.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn

from ..backends import registry
from ..ops.quantized_matmul import choose
from ..registry import PHASES, Choice, phase_of
from ..weights import Projection


class Recall:
    """The kernel of a layer's last call. Copies of a layer, and what unpickles, begin without one.

    Args:
        choice: what ran.
        x: what it ran on.
        types: of the layers whose arrays it read, as :attr:`of_layers` takes them.
        facts: what has to be the same, by identity, the next time.
    """

    __slots__ = ("default", "facts", "high", "low", "of_layers", "types")

    def __init__(self, choice: Choice, x: mx.array, types: Any, facts: tuple[Any, ...] = ()):
        assert choice.of_layers is not None
        self.of_layers: Callable[..., Any] = choice.of_layers
        self.low, self.high = PHASES[phase_of(x.shape)]
        self.default = registry.default
        self.types = types
        self.facts = facts

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def training_backend(layer: mlx.nn.Module) -> str:
    """In training the reference runs outright: its gradients are MLX's own."""
    return "reference" if layer.training else "auto"


def product(layer: mlx.nn.Module, x: mx.array, weight_of: Callable[[mlx.nn.Module], Projection]) -> mx.array:
    """``x @ weight.T + bias`` with the arrays of a linear layer, as ``weight_of`` describes them."""
    own = layer.__dict__
    recall = own.get("_recall")
    if recall is not None and not own["_training"] and registry.default == recall.default:
        y: mx.array | None = recall.of_layers(x, layer, recall.types, recall.low, recall.high)
        if y is not None:
            return y
    projection = weight_of(layer)
    choice = choose(x, projection, training_backend(layer))
    if choice.of_layers is not None and not layer.training:
        own["_recall"] = Recall(choice, x, type(layer))
    in_full: mx.array = choice.run(x, projection)
    return in_full
