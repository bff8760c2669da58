"""mlx-lm's MoE blocks, with the operations of moefast in the place of their forward pass.

One implementation for every row of :mod:`moefast.families`. A block that is plain, i.e. has no layers between
its experts and its output, is one call of :func:`moefast.moe`; else router and experts are two operations and
the rest is what the block does. Everything that may have changed since the last call is looked up in each:
configuration, parameters, adapters, training, sharding.
"""

from __future__ import annotations

from typing import Any, ClassVar

import mlx.core as mx
from mlx.nn.layers.distributed import sum_gradients

from .. import ops
from ..backends.reference.experts import combine, identity_share
from ..families import Block
from ..nn.block import recalled, remember
from ..ops.moe import choose
from ..registry import log
from ..routing import Routing
from ..specs import RouterSpec
from ..weights import ExpertWeights, SharedExpert, dtype_name
from .again import Facts, again_of, facts_of
from .experts import STACKS, AcceleratedExperts, weights_of
from .known import why_unlike
from .routing import part, router_logits, router_spec, selection_bias
from .stacks import shared_activation, shared_expert
from .swap import runs_original


class AcceleratedBlock:
    """Goes before the block's own class in a class's bases. In training the original runs, in phases in which
    it was found to be faster, and on input that the operations refuse, unless the backend was named."""

    _moefast_row: ClassVar[Block]
    _moefast_backend: str

    def moefast_logits(self: Any, x: mx.array) -> mx.array:
        """x: ``[..., hidden]`` -> router logits ``[..., num_experts]``."""
        return router_logits(self._moefast_row, self, x)

    def __call__(self: Any, x: mx.array) -> mx.array:
        """x: ``[..., hidden]`` -> ``[..., hidden]``."""
        row = self._moefast_row
        y, logits = again_of(row)(self, x)
        if y is not None:
            return y
        group = self.__dict__.get("sharding_group")
        if runs_original(self, x.shape) or (group is not None and row.whole_when_sharded):
            return super().__call__(x)  # type: ignore[misc,no-any-return]
        try:
            whole = x if group is None else sum_gradients(group)(x)
            y = forward(self, row, self._moefast_backend, whole, logits)
        except ValueError as error:  # from the description of the call, before anything runs
            if self._moefast_backend != "auto":
                raise
            log.info("%s: the original, %s", row.name, error)
            return super().__call__(x)  # type: ignore[misc,no-any-return]
        if group is not None:
            y = mx.distributed.all_sum(y, group=group)
        return y.astype(x.dtype) if row.sum_float32 else y


def forward(block: Any, row: Block, backend: str, x: mx.array, logits: mx.array | None = None) -> mx.array:
    """The block's output before ranks are summed. x: ``[..., hidden]`` -> ``[..., hidden]``; ``logits`` where
    they are known, and the last call's kernels have been tried in vain."""
    experts = part(block, row.experts)
    tried = logits is not None
    if logits is None:
        logits = block.moefast_logits(x)
    bias = selection_bias(row, block)
    shared = None if row.shared is None else block.get(row.shared)
    gate = None if row.shared_gate is None else block[row.shared_gate]
    plain = is_plain(row, block) and not widens(row, x.dtype, logits.dtype)
    facts: Facts = ()
    if plain:
        facts = facts_of(row)(block, experts, shared)
        y = None if tried else recalled(block, x, logits, bias, experts, shared, gate, facts)
        if y is not None:
            return y
    spec = router_spec(row, block, stack_size(experts), dtype_name(x.dtype))
    if plain:
        weights, beside = fused_weights(row, experts, shared, gate)
        if weights is not None and (shared is None or beside is not None):
            return _fused(block, row, backend, x, logits, bias, spec, weights, beside, facts)
    routing = ops.route(logits, spec, selection_bias=bias, backend=backend)
    y = _routed(row, block, backend, x, routing, spec, experts)
    return y if shared is None else _with_shared(row, block, x, y, shared, gate)


def stack_size(experts: Any) -> int:
    """How many experts a stack holds."""
    up = experts["up_proj" if "up_proj" in experts else "fc1"]
    return int(up.get("linear", up)["weight"].shape[0])  # a LoRA layer holds the linear one


def is_plain(row: Block, block: Any) -> bool:
    """Whether :func:`moefast.moe` can be the whole of the block."""
    if row.mix is not None or row.sum_float32:
        return False
    return row.latent is None or _latent(row, block) is None


def widens(row: Block, dtype: mx.Dtype, logits: mx.Dtype) -> bool:
    """Whether weights of another dtype than the input's decide that of the output."""
    return row.promotes and logits != dtype


def fused_weights(
    row: Block, experts: Any, shared: Any, gate: Any
) -> tuple[ExpertWeights | None, SharedExpert | None]:
    """What :func:`moefast.moe` takes; None for what has to be called."""
    weights = weights_of(experts) if is_stack(experts) else None
    if shared is None or row.shared_class is None or why_unlike(shared, row.shared_class) is not None:
        return weights, None
    activation = shared_activation(shared)
    return weights, None if activation is None else shared_expert(shared, activation, gate)


def is_stack(experts: Any) -> bool:
    """Whether these are mlx-lm's own stacked experts, accelerated or not."""
    if isinstance(experts, AcceleratedExperts):
        return True
    return any(why_unlike(experts, kind) is None for kind in STACKS)


def _fused(
    block: Any,
    row: Block,
    backend: str,
    x: mx.array,
    logits: mx.array,
    bias: mx.array | None,
    spec: RouterSpec,
    weights: ExpertWeights,
    shared: SharedExpert | None,
    facts: Facts,
) -> mx.array:
    combine_dtype = None if row.combine is None else getattr(mx, row.combine)
    choice = choose(
        x,
        logits,
        spec,
        weights,
        selection_bias=bias,
        shared=shared,
        combine_dtype=combine_dtype,
        backend=backend,
    )
    if weights.gate is not None:
        beside = None if shared is None or row.shared is None else block[row.shared]
        gate = None if beside is None or row.shared_gate is None else block[row.shared_gate]
        remember(block, choice, x, part(block, row.experts), beside, gate, facts)
    y: mx.array = choice.run(x, logits, spec, weights, bias, None, shared, combine_dtype)
    return y


def _routed(
    row: Block, block: Any, backend: str, x: mx.array, routing: Routing, spec: RouterSpec, experts: Any
) -> mx.array:
    """The routed experts' sum, with the layers around them."""
    latent = _latent(row, block)
    inner = x if latent is None else latent[0](x)
    combine_dtype = None if row.combine is None else getattr(mx, row.combine)
    weights = weights_of(experts) if is_stack(experts) else None
    if row.sum_float32:
        apart = _apart(backend, inner, weights, experts, routing.indices)
        summed: mx.array = (apart.astype(mx.float32) * routing.weights[..., None]).sum(axis=-2)
        return summed
    if widens(row, inner.dtype, routing.weights.dtype):
        apart = _apart(backend, inner, weights, experts, routing.indices)
        y = (apart * routing.weights[..., None]).sum(axis=-2)
    elif weights is not None and not spec.identity_experts:
        y = ops.experts(inner, weights, routing, combine_dtype=combine_dtype, backend=backend)
    else:
        stacked = spec.num_experts - spec.identity_experts
        real = routing.indices < stacked
        apart = _apart(backend, inner, weights, experts, mx.where(real, routing.indices, 0))
        apart = mx.where(real[..., None], apart, mx.array(0, apart.dtype))
        y = combine(apart, routing.weights, combine_dtype)
        if spec.identity_experts:
            y = y + identity_share(inner, routing, stacked).astype(y.dtype)
    if spec.scale_place == "output":
        y = y * spec.scale
    if latent is None:
        return y
    _, norm, out = latent
    y = y if norm is None else norm(y)
    projected: mx.array = out(y)
    return projected


def _apart(
    backend: str, x: mx.array, weights: ExpertWeights | None, experts: Any, indices: mx.array
) -> mx.array:
    """``[..., top_k, hidden]``: by the operation, or by calling adapted experts."""
    if weights is not None:
        return ops.switch_glu(x, weights, indices, backend=backend)
    y: mx.array = experts(x, indices)
    return y


def _latent(row: Block, block: Any) -> tuple[Any, Any, Any] | None:
    """The layers before and behind the routed experts, and the norm between, where the block has them."""
    if row.latent is None or block.get(row.latent[0]) is None:
        return None
    before, norm, behind = row.latent
    return block[before], None if norm is None else block.get(norm), block[behind]


def _with_shared(row: Block, block: Any, x: mx.array, y: mx.array, shared: Any, gate: Any) -> mx.array:
    beside: mx.array = shared(x)
    if row.sum_float32:
        return y + beside.astype(mx.float32)
    if row.mix is not None:
        mix = mx.softmax(block[row.mix](x), axis=-1, precise=True)
        return y * mix[..., :1] + beside * mix[..., 1:]
    if gate is not None:
        beside = mx.sigmoid(gate(x)) * beside
    return y + beside
