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
from ..ops.embed import choose as choose_rows
from ..ops.quantized_matmul import choose as choose_product
from ..ops.quantized_matmul import choose_several
from ..registry import PHASES, Choice, phase_of
from ..weights import Projection, Shape
from .projection import projection_of, quantized


class Recall:
    """The kernel of a layer's last call. Copies of a layer, and what unpickles, begin without one.

    Args:
        choice: what ran.
        shape: of what it ran on, ``[..., features]``.
        types: of the layers whose arrays it read, as :attr:`of_layers` takes them.
        facts: what else has to be the same the next time.
    """

    __slots__ = ("default", "facts", "high", "low", "of_layers", "types")

    def __init__(self, choice: Choice, shape: Shape, types: Any, facts: tuple[Any, ...] = ()):
        assert choice.of_layers is not None
        self.of_layers: Callable[..., Any] = choice.of_layers
        self.low, self.high = PHASES[phase_of(shape)]
        self.default = registry.default
        self.types = types
        self.facts = facts

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def training_backend(layer: mlx.nn.Module) -> str:
    """In training the reference runs outright: its gradients are MLX's own. Else any backend does, or the one
    that an accelerated layer was given."""
    return "reference" if layer.training else layer.__dict__.get("_moefast_backend", "auto")


def product(layer: mlx.nn.Module, x: mx.array, weight_of: Callable[[mlx.nn.Module], Projection]) -> mx.array:
    """``x @ weight.T + bias`` with the arrays of a linear layer, as ``weight_of`` describes them."""
    y = product_again(layer, x)
    return product_in_full(layer, x, weight_of) if y is None else y


def product_again(layer: mlx.nn.Module, x: mx.array) -> mx.array | None:
    """:func:`product` by the kernel of the last call, or None where this call is of another kind."""
    own = layer.__dict__
    recall = own.get("_recall")
    if recall is None or own["_training"] or registry.default != recall.default:
        return None
    y: mx.array | None = recall.of_layers(x, layer, recall.types, recall.low, recall.high)
    return y


def product_in_full(
    layer: mlx.nn.Module, x: mx.array, weight_of: Callable[[mlx.nn.Module], Projection]
) -> mx.array:
    """What :func:`product` gives, described and chosen; the layer remembers the choice."""
    weight = weight_of(layer)
    choice = choose_product(x, weight, training_backend(layer))
    _remember(layer, "_recall", choice, x.shape, ())
    y: mx.array = choice.run(x, weight)
    return y


def products(owner: mlx.nn.Module, x: mx.array, layers: tuple[mlx.nn.Module, ...]) -> list[mx.array]:
    """What each of ``layers``, which belong to ``owner``, makes of ``x``: in one operation where all of them
    are plain or quantized linear layers, else by calling them."""
    own = owner.__dict__
    recall = own.get("_recall_products")
    if recall is not None and not own["_training"] and registry.default == recall.default:
        ys: list[mx.array] | None = recall.of_layers(x, layers, recall.types, recall.low, recall.high)
        if ys is not None:
            return ys
    weights = [projection_of(layer) for layer in layers]
    if None in weights:
        return [layer(x) for layer in layers]
    choice = choose_several(x, tuple(filter(None, weights)), training_backend(owner))
    if choice.of_layers is not None and not owner.training:
        own["_recall_products"] = Recall(choice, x.shape, tuple(type(layer) for layer in layers))
    in_full: list[mx.array] = choice.run(x, *weights)
    return in_full


def rows(layer: mlx.nn.Module, x: mx.array) -> mx.array:
    """``weight[x]`` of a quantized embedding; remembered beside the product that a tied one is used for."""
    own = layer.__dict__
    recall = own.get("_recall_rows")
    # Shapes do not tell 4 bits in groups of 64 from 8 in groups of 32.
    packing = layer.bits, layer.group_size, layer.mode
    if (
        recall is not None
        and not own["_training"]
        and registry.default == recall.default
        and recall.facts == packing
    ):
        y: mx.array | None = recall.of_layers(x, layer, recall.types, recall.low, recall.high)
        if y is not None:
            return y
    weight = quantized(layer)
    choice = choose_rows(x, weight, training_backend(layer))
    _remember(layer, "_recall_rows", choice, (*x.shape, 1), packing)
    in_full: mx.array = choice.run(x, weight)
    return in_full


def _remember(layer: mlx.nn.Module, name: str, choice: Choice, shape: Shape, facts: tuple[Any, ...]) -> None:
    if choice.of_layers is not None and not layer.training:
        layer.__dict__[name] = Recall(choice, shape, type(layer), facts)
