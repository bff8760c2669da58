"""The router of an MoE block: one small matrix product, then :func:`moefast.route`."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn

from .. import ops
from ..errors import refuse
from ..routing import Routing
from ..specs import RouterSpec
from ..weights import Projection
from .linear import Linear
from .recall import product, training_backend


def _own_weight(router: mlx.nn.Module) -> Projection:
    return Projection(router["weight"])


class Router(mlx.nn.Module):
    """Maps a token to its experts.

    Checkpoints name the router's matrix in two ways, and both are kept, so that they load and save
    unchanged: as a child layer (``linear="layer"``: quantizable), or as the router's own raw ``weight``
    (``linear=None``: ``mlx.nn.quantize`` never sees it, the choice of the DeepSeek line, whose routing is
    sensitive to rounding).

    Args:
        spec: what to do with the logits.
        hidden: model width.
        linear: name of the child layer, or None for a raw ``weight [num_experts, hidden]``.
        selection_bias: name of the ``[num_experts]`` selection bias, or None.

    Raises:
        ValueError: a name is that of a method or property of this class.
    """

    def __init__(
        self,
        spec: RouterSpec,
        hidden: int,
        *,
        linear: str | None = "layer",
        selection_bias: str | None = None,
    ):
        super().__init__()
        for name in (linear, selection_bias):
            if name is not None and (hasattr(Router, name) or name == "spec"):
                refuse("Router", "linear and selection_bias must not name a member of Router", repr(name))
        self.spec = spec
        self._linear = linear
        self._selection_bias = selection_bias
        layer = Linear(hidden, spec.num_experts, bias=False)
        if linear is None:
            self.weight = layer.weight
        else:
            setattr(self, linear, layer)
        if selection_bias is not None:
            setattr(self, selection_bias, mx.zeros((spec.num_experts,)))

    @property
    def selection_bias(self) -> mx.array | None:
        """``[num_experts]``, or None where the family has none."""
        name = self._selection_bias
        return None if name is None else self[name]

    def logits(self, x: mx.array) -> mx.array:
        """x: ``[..., hidden]`` -> ``[..., num_experts]``."""
        name = self._linear
        if name is None:
            return product(self, x, _own_weight)
        y: mx.array = self[name](x)
        return y

    def __call__(self, x: mx.array) -> Routing:
        """x: ``[..., hidden]`` -> indices and weights ``[..., top_k]``."""
        return ops.route(
            self.logits(x), self.spec, selection_bias=self.selection_bias, backend=training_backend(self)
        )
