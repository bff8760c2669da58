"""Grouped-query attention between a model's own projections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as mlx_nn
from mlx.nn.layers.distributed import shard_linear, sum_gradients
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import KVCache

from .. import ops
from ..errors import refuse
from ..nn import RMSNorm, Rope
from ..nn.recall import products, training_backend
from ..nn.sharding import check_split

Norm = Callable[[mx.array], mx.array]


class Attention(mlx_nn.Module):
    """Scaled dot-product attention with rotary positions and fewer key-value heads than query heads.

    A model derives from it and adds its projections: named as its checkpoints name them, fused or not.

    Args:
        heads: query heads.
        kv_heads: key and value heads; each serves ``heads / kv_heads`` query heads (Ainslie et al.,
            arXiv:2305.13245).
        head_dim: size of a head.
        rope: rotation of queries and keys.
        scale: factor on the scores; ``1 / sqrt(head_dim)`` by default.
    """

    # Names of the projections: three of queries, keys and values or a fused one, and that of the output.
    INPUTS: tuple[str, ...]
    OUTPUT: str
    # Names of the norms of queries and keys, which a model need not have.
    NORMS: tuple[str, ...] = ()

    def __init__(
        self, heads: int, kv_heads: int, head_dim: int, rope: mlx_nn.Module, scale: float | None = None
    ):
        super().__init__()
        self.n_heads = heads
        self.n_kv_heads = kv_heads
        self.head_dim = head_dim
        self.scale = head_dim**-0.5 if scale is None else scale
        self.rope = rope

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        mask: mx.array | str | None,
        cache: Any | None,
        *,
        query_norm: Norm | None = None,
        key_norm: Norm | None = None,
    ) -> mx.array:
        """Attention of projected inputs.

        Args:
            queries: ``[batch, length, heads * head_dim]``.
            keys, values: ``[batch, length, kv_heads * head_dim]``.
            mask: as mlx-lm's ``create_attention_mask`` makes it.
            cache: an mlx-lm KV cache, updated in place, or None.
            query_norm, key_norm: applied per head, before the rotation.

        Returns:
            ``[batch, length, heads * head_dim]``.
        """
        batch, length, _ = queries.shape
        plain = mask is None or (isinstance(mask, str) and mask == "causal")
        rotation = self.rope.rotation if plain and isinstance(self.rope, Rope) else None
        rows = None if rotation is None else _room_in(cache, queries)
        if rotation is not None and cache is not None and rows is not None:
            if query_norm is not None:
                queries = query_norm(queries.reshape(batch, length, self.n_heads, self.head_dim)).flatten(2)
            if key_norm is not None:
                keys = key_norm(keys.reshape(batch, length, self.n_kv_heads, self.head_dim)).flatten(2)
            y, cache.keys, cache.values = ops.cached_attention(
                queries,
                keys,
                values,
                *rows,
                offset=cache.offset,
                rotation=rotation,
                scale=self.scale,
                causal=mask is not None,
                backend=training_backend(self),
            )
            cache.offset += length
            return y
        queries = queries.reshape(batch, length, self.n_heads, self.head_dim)
        keys = keys.reshape(batch, length, self.n_kv_heads, self.head_dim)
        values = values.reshape(batch, length, self.n_kv_heads, self.head_dim).transpose(0, 2, 1, 3)
        if query_norm is not None:
            queries = query_norm(queries)
        if key_norm is not None:
            keys = key_norm(keys)
        queries, keys = queries.transpose(0, 2, 1, 3), keys.transpose(0, 2, 1, 3)
        offset = 0 if cache is None else cache.offset
        queries, keys = self.rope(queries, offset=offset), self.rope(keys, offset=offset)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        if plain and not hasattr(cache, "bits"):  # which a quantized cache has
            backend = training_backend(self)
            return ops.attention(
                queries, keys, values, scale=self.scale, causal=mask is not None, backend=backend
            )
        y = scaled_dot_product_attention(
            queries,
            keys,
            values,
            cache=cache,
            scale=self.scale,
            mask=mask,  # type: ignore[arg-type]  # "causal" is a mask too
        )
        return y.transpose(0, 2, 1, 3).reshape(batch, length, -1)

    def split_fused(self, fused: mx.array) -> list[mx.array]:
        """Queries, keys and values out of one product ``[..., (heads + 2 * kv_heads) * head_dim]``."""
        return list(mx.split(fused, self._fused_segments(), axis=-1))

    def _fused_segments(self) -> list[int]:
        queries = self.n_heads * self.head_dim
        return [queries, queries + self.n_kv_heads * self.head_dim]

    def check_shard(self, group: mx.distributed.Group) -> None:
        """Raise ValueError where the heads do not divide among the ranks."""
        ranks = group.size()
        for name, heads in (("query heads", self.n_heads), ("key-value heads", self.n_kv_heads)):
            if heads % ranks:
                refuse("shard", f"{heads} {name} must divide among the ranks", ranks)
        check_split(self, self.INPUTS, self.OUTPUT, group)

    def shard(self, group: mx.distributed.Group) -> None:
        """Give each rank of a tensor-parallel group its share of the heads; the output projection sums.

        Raises:
            ValueError: the heads do not divide among the ranks.
        """
        self.check_shard(group)
        fused = len(self.INPUTS) == 1
        for name in self.INPUTS:
            segments = self._fused_segments() if fused else 1
            layer = shard_linear(self[name], "all-to-sharded", segments=segments, group=group)
            setattr(self, name, layer)
        setattr(self, self.OUTPUT, shard_linear(self[self.OUTPUT], "sharded-to-all", group=group))
        for name in self.NORMS:
            if name in self:
                setattr(self, name, _ReplicatedNorm(self[name], group))
        self.n_heads //= group.size()
        self.n_kv_heads //= group.size()


def _room_in(cache: Any | None, x: mx.array) -> tuple[mx.array, mx.array] | None:
    """The arrays of a plain cache that has allocated room for the rows of ``x``, else None."""
    if type(cache) is not KVCache or cache.keys is None or cache.values is None:
        return None
    fits = cache.keys.dtype == x.dtype and cache.offset + x.shape[1] <= cache.keys.shape[2]
    return (cache.keys, cache.values) if fits else None


class _ReplicatedNorm(RMSNorm):
    """A norm that every rank applies to its own heads: its weight's gradient is summed over the ranks."""

    def __init__(self, norm: RMSNorm, group: mx.distributed.Group):
        super().__init__(norm.weight.shape[0], norm.eps)
        self.weight = norm.weight
        self._summed = sum_gradients(group)

    def __call__(self, x: mx.array) -> mx.array:  # type: ignore[override]  # no residual stream comes here
        weight = self._summed(self.weight)
        return ops.rms_norm(x, weight, self.eps, backend=training_backend(self))


class SeparateAttention(Attention):
    """Attention with ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj``."""

    INPUTS = ("q_proj", "k_proj", "v_proj")
    OUTPUT = "o_proj"

    def project(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """``[batch, length, hidden]`` -> queries, keys and values."""
        queries, keys, values = products(self, x, (self.q_proj, self.k_proj, self.v_proj))
        return queries, keys, values
