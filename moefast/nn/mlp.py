"""The dense gated feed-forward network: a shared expert, or the MLP of a layer without experts."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn
from mlx.nn.layers.distributed import shard_linear

from ..backends.reference.activations import activate
from ..errors import refuse
from ..specs import Activation
from ..weights import SharedExpert
from .linear import Linear
from .projection import projection_of
from .sharding import check_split, split_width


class MLP(mlx.nn.Module):
    """``down_proj(activation(gate_proj(x), up_proj(x)))``.

    Args:
        hidden: model width.
        width: inner width.
        bias: the three layers have biases.
        activation: a gated :class:`moefast.Activation`.
    """

    def __init__(
        self,
        hidden: int,
        width: int,
        *,
        bias: bool = False,
        activation: Activation = Activation(),  # noqa: B008 (frozen)
    ):
        super().__init__()
        if not activation.gated:
            refuse("MLP", "activation must be gated", activation)
        self.gate_proj = Linear(hidden, width, bias=bias)
        self.up_proj = Linear(hidden, width, bias=bias)
        self.down_proj = Linear(width, hidden, bias=bias)
        self.activation = activation

    def shared_expert(self, output_gate: mlx.nn.Module | None) -> SharedExpert | None:
        """What :func:`moefast.moe` takes; None while a layer is adapted (LoRA) and has to be called."""
        gate, up, down = (projection_of(self[name]) for name in ("gate_proj", "up_proj", "down_proj"))
        if gate is None or up is None or down is None:
            return None
        gating = None
        if output_gate is not None:
            gating = projection_of(output_gate)
            if gating is None:
                return None
        return SharedExpert(gate=gate, up=up, down=down, activation=self.activation, output_gate=gating)

    def __call__(self, x: mx.array) -> mx.array:
        """x: ``[..., hidden]`` -> ``[..., hidden]``."""
        y: mx.array = self.down_proj(activate(self.activation, self.gate_proj(x), self.up_proj(x)))
        return y

    def check_shard(self, group: mx.distributed.Group) -> None:
        """Raise ValueError where the width does not divide among the ranks."""
        check_split(self, ("gate_proj", "up_proj"), "down_proj", group)

    def shard(self, group: mx.distributed.Group) -> None:
        """Split the width over a tensor-parallel group; the layers then communicate themselves.

        Raises:
            ValueError: the width does not divide among the ranks.
        """
        self.check_shard(group)
        self.gate_proj = shard_linear(self.gate_proj, "all-to-sharded", group=group)
        self.up_proj = shard_linear(self.up_proj, "all-to-sharded", group=group)
        self.down_proj = shard_linear(self.down_proj, "sharded-to-all", group=group)

    def shard_in_place(self, group: mx.distributed.Group) -> None:
        """Split the width; the caller sums the output over the group.

        Raises:
            ValueError: the width does not divide among the ranks.
        """
        self.check_shard(group)
        split_width(self, group)
