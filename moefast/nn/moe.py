"""The MoE block: router, routed experts and shared expert. Every model's MoE layer is this class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn
from mlx.nn.layers.distributed import sum_gradients

from .. import ops
from ..backends.reference.experts import combine, identity_share
from ..errors import refuse
from ..ops.moe import choose
from ..specs import Activation, RouterSpec
from .block import recalled, remember
from .linear import Linear
from .mlp import MLP
from .recall import Recall, training_backend
from .router import Router
from .sharding import check_split, split_width
from .switch import SwitchGLU


@dataclass(frozen=True, kw_only=True)
class Names:
    """What a checkpoint calls the parts of the block."""

    router: str = "gate"
    experts: str = "switch_mlp"
    shared: str = "shared_experts"
    shared_gate: str = "shared_expert_gate"


class MoE(mlx.nn.Module):
    """Router + experts + shared expert (none, plain, or gated by a sigmoid).

    ``y = sum_k weight_k * expert_k(x) + [sigmoid(shared_gate(x)) *] shared(x)``

    Args:
        spec: the routing.
        hidden: model width.
        width: width of one routed expert.
        router: a :class:`Router`, or a bare :class:`Linear` that gives the logits where the checkpoint
            has one in the router's place (Qwen2-MoE).
        shared_width: inner width of the shared expert; 0 for none.
        shared_gate: gate the shared expert's output by ``sigmoid(linear(x))``.
        bias: experts and shared expert have output biases.
        activation: of experts and shared expert.
        names: attribute names, for checkpoint compatibility.
        combine_dtype: see :func:`moefast.experts`.
    """

    def __init__(
        self,
        spec: RouterSpec,
        hidden: int,
        width: int,
        *,
        router: Router | Linear | None = None,
        shared_width: int = 0,
        shared_gate: bool = False,
        bias: bool = False,
        activation: Activation = Activation(),  # noqa: B008 (frozen)
        names: Names = Names(),
        combine_dtype: mx.Dtype | None = None,
    ):
        super().__init__()
        parts = (names.router, names.experts, names.shared, names.shared_gate)
        if len(set(parts)) < len(parts) or any(hasattr(MoE, part) for part in parts):
            refuse("MoE", "names must differ from one another and from MoE's own members", names)
        if isinstance(router, Router) and router.spec != spec:
            refuse("MoE", f"the router must have spec {spec}", router.spec)
        self.spec = spec
        self.names = names
        self.combine_dtype = combine_dtype
        self.sharding_group: mx.distributed.Group | None = None
        self._recall: Recall | None = None
        stacked = spec.num_experts - spec.identity_experts
        setattr(self, names.router, router if router is not None else Router(spec, hidden))
        setattr(self, names.experts, SwitchGLU(hidden, width, stacked, activation, bias))
        self._has_shared = shared_width > 0
        self._has_shared_gate = self._has_shared and shared_gate
        if self._has_shared:
            setattr(self, names.shared, MLP(hidden, shared_width, bias=bias, activation=activation))
        if self._has_shared_gate:
            setattr(self, names.shared_gate, Linear(hidden, 1, bias=False))

    def __call__(self, x: mx.array) -> mx.array:
        """x: ``[..., hidden]`` -> ``[..., hidden]``."""
        own = self.__dict__  # to look there is faster than to ask a module for an attribute
        names, group = own["names"], own["sharding_group"]
        router = self[names.router]
        if isinstance(router, Router):
            bias_name = router.__dict__["_selection_bias"]  # its property selection_bias, without a call
            bias, logits = None if bias_name is None else router[bias_name], router.logits(x)
        else:
            bias, logits = None, router(x)
        if group is not None:
            # Each rank sees part of the experts' width, so gradients through them are partial sums; the
            # router is replicated and its own product needs no sum.
            summed = sum_gradients(group)
            return self._sharded(x, summed(x), summed(logits), bias, group)

        experts = self[names.experts]
        shared = self[names.shared] if own["_has_shared"] else None
        shared_gate = self[names.shared_gate] if own["_has_shared_gate"] else None
        facts = (
            own["spec"],
            own["combine_dtype"] or False,  # a dtype cannot be compared with None
            experts.__dict__["activation"],
            None if shared is None else shared.__dict__["activation"],
        )
        y = recalled(self, x, logits, bias, experts, shared, shared_gate, facts)
        return self._in_full(x, logits, bias, experts, shared, shared_gate, facts) if y is None else y

    def _in_full(
        self,
        x: mx.array,
        logits: mx.array,
        bias: mx.array | None,
        experts: SwitchGLU,
        shared_layers: MLP | None,
        shared_gate: mlx.nn.Module | None,
        facts: tuple[Any, ...],
    ) -> mx.array:
        weights = experts.expert_weights()
        shared = None if shared_layers is None else shared_layers.shared_expert(shared_gate)
        if weights is None or (shared_layers is not None and shared is None):
            return self._layer_by_layer(x, x, logits, bias)
        choice = choose(
            x,
            logits,
            self.spec,
            weights,
            selection_bias=bias,
            shared=shared,
            combine_dtype=self.combine_dtype,
            backend=training_backend(self),
        )
        if type(experts) is SwitchGLU:
            remember(self, choice, x, experts, shared_layers, shared_gate, facts)
        in_full: mx.array = choice.run(x, logits, self.spec, weights, bias, None, shared, self.combine_dtype)
        return in_full

    def check_shard(self, group: mx.distributed.Group) -> None:
        """Raise ValueError where :meth:`shard` would."""
        if self.spec.identity_experts:
            refuse("shard", "identity_experts must be 0", self.spec.identity_experts)
        check_split(self[self.names.experts], ("gate_proj", "up_proj"), "down_proj", group)
        if self._has_shared:
            self[self.names.shared].check_shard(group)

    def shard(self, group: mx.distributed.Group) -> None:
        """Split every expert's width over a tensor-parallel group. The block sums its output itself.

        Raises:
            ValueError: a width does not divide among the ranks, or the block has identity experts, whose
                share would be summed once per rank.
        """
        self.check_shard(group)
        split_width(self[self.names.experts], group)
        if self._has_shared:
            self[self.names.shared].shard_in_place(group)
        self.sharding_group = group

    def _sharded(
        self,
        x: mx.array,
        summed: mx.array,
        logits: mx.array,
        bias: mx.array | None,
        group: mx.distributed.Group,
    ) -> mx.array:
        return mx.distributed.all_sum(self._layer_by_layer(x, summed, logits, bias), group=group)

    def _layer_by_layer(
        self, x: mx.array, expert_x: mx.array, logits: mx.array, bias: mx.array | None
    ) -> mx.array:
        """The block out of its layers: where one is adapted, or where gates must be reduced apart.

        ``expert_x`` equals ``x``; under sharding its gradient is summed over the group.
        """
        backend = training_backend(self)
        routing = ops.route(logits, self.spec, selection_bias=bias, backend=backend)
        experts = self[self.names.experts]
        if not self.spec.identity_experts:
            y = combine(experts(expert_x, routing.indices), routing.weights, self.combine_dtype)
        else:
            stacked = self.spec.num_experts - self.spec.identity_experts
            real = routing.indices < stacked  # of the others there is no weight to multiply with
            apart = experts(expert_x, mx.where(real, routing.indices, 0))
            apart = mx.where(real[..., None], apart, mx.array(0, apart.dtype))
            y = combine(apart, routing.weights, self.combine_dtype)
            y = y + identity_share(expert_x, routing, stacked).astype(y.dtype)
        if self.spec.scale_place == "output":
            y = y * self.spec.scale
        if not self._has_shared:
            return y
        shared: mx.array = self[self.names.shared](expert_x)
        if self._has_shared_gate:
            gate = self[self.names.shared_gate](x)
            if self.sharding_group is not None:
                gate = sum_gradients(self.sharding_group)(gate)
            shared = mx.sigmoid(gate) * shared
        return y + shared
