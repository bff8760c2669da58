"""What the five models share around their attention: the pre-norm layer, the stack of layers, the head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import mlx.core as mx
import mlx.nn as mlx_nn
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.pipeline import PipelineMixin

from ..nn import MLP, Embedding, Linear, MoE, RMSNorm
from .decoding import again, watch
from .residual import Residual, ResidualLayer


class PreNormLayer(ResidualLayer):
    """``h = x + m attention(norm(x))``, then ``h + m ffn(norm(h))`` (m: residual multiplier).

    Args:
        attention: under the attribute name ``ATTENTION``.
        ffn: an MoE block or a dense MLP, under ``FFN``.
        hidden: model width.
        eps: of the norms.
        residual_multiplier: factor on each branch; 1 but for Granite.
    """

    ATTENTION = "self_attn"
    FFN = "mlp"

    def __init__(
        self,
        attention: mlx_nn.Module,
        ffn: MoE | MLP,
        hidden: int,
        eps: float,
        residual_multiplier: float = 1.0,
    ):
        super().__init__()
        setattr(self, self.ATTENTION, attention)
        setattr(self, self.FFN, ffn)
        self.input_layernorm = RMSNorm(hidden, eps=eps)
        self.post_attention_layernorm = RMSNorm(hidden, eps=eps)
        self.residual_multiplier = residual_multiplier

    def join(self, stream: Residual, mask: mx.array | str | None, cache: Any | None) -> Residual:
        """The stream -> the stream, on which the norms add up what is to come before them."""
        x, y = stream.normed(self.input_layernorm)
        attended = Residual(x, self[self.ATTENTION](y, mask, cache), self.residual_multiplier)
        h, y = attended.normed(self.post_attention_layernorm)
        return Residual(h, self[self.FFN](y), self.residual_multiplier)

    def check_shard(self, group: mx.distributed.Group) -> None:
        """Raise ValueError where heads or widths do not divide among the ranks."""
        self[self.ATTENTION].check_shard(group)
        self[self.FFN].check_shard(group)

    def shard(self, group: mx.distributed.Group) -> None:
        """Split attention heads and feed-forward widths over a tensor-parallel group."""
        self[self.ATTENTION].shard(group)
        self[self.FFN].shard(group)


class Backbone(PipelineMixin, mlx_nn.Module):
    """Embedding, the stack of decoder layers (whole, or this rank's part of a pipeline), final norm.

    Args:
        embedding, layers, norm: under the attribute names ``EMBEDDING``, ``LAYERS`` and ``NORM``, which a
            model overrides where its checkpoints have others.
    """

    EMBEDDING = "embed_tokens"
    LAYERS = "layers"
    NORM = "norm"

    def __init__(self, embedding: Embedding, layers: list[Any], norm: mlx_nn.Module):
        super().__init__()
        setattr(self, self.EMBEDDING, embedding)
        setattr(self, self.LAYERS, layers)
        setattr(self, self.NORM, norm)
        self._pipeline_group: mx.distributed.Group | None = None

    @classmethod
    def around(cls, layers: list[Any], args: Any) -> Self:
        """The layers, with embedding and norm of the sizes that ``args`` has under Hugging Face's names."""
        embedding = Embedding(args.vocab_size, args.hidden_size)
        return cls(embedding, layers, RMSNorm(args.hidden_size, eps=args.rms_norm_eps))

    def __call__(self, inputs: mx.array, cache: Sequence[Any] | None = None) -> mx.array:
        """Token ids ``[batch, length]`` -> hidden states ``[batch, length, hidden]``."""
        _, y = self.run_layers(self.embed(inputs), cache).normed(self[self.NORM])
        return y

    def embed(self, inputs: mx.array) -> mx.array:
        """Token ids ``[batch, length]`` -> embeddings ``[batch, length, hidden]``."""
        y: mx.array = self[self.EMBEDDING](inputs)
        return y

    def as_head(self, h: mx.array) -> mx.array:
        """The tied head: ``[..., hidden]`` -> logits ``[..., vocabulary]``."""
        y: mx.array = self[self.EMBEDDING].as_linear(h)
        return y

    @property
    def pipeline_layers(self) -> list[Any]:
        """This rank's layers."""
        return list(self[self.LAYERS][self.start_idx : self.end_idx])

    def pipeline(self, group: mx.distributed.Group, split: Sequence[int] | None = None) -> None:
        """Keep this rank's layers: rank 0 the last ones, the highest rank the first (mlx-lm's order)."""
        self.layers = self.pop(self.LAYERS)  # the name mlx-lm's mixin works on
        super().pipeline(group, split)
        setattr(self, self.LAYERS, self.pop("layers"))
        self._pipeline_group = group

    def run_layers(self, h: mx.array, cache: Sequence[Any] | None) -> Residual:
        """Embeddings ``[batch, length, hidden]`` through this process's layers, then (in a pipeline) on to
        the other ranks: every rank returns the last layer's output.

        In a pipeline a call is to be evaluated before the next one is made, as generation does: MLX keeps no
        order between one call's ``all_gather`` and the next one's ``send``.
        """
        layers = self.pipeline_layers
        cache = [None] * len(layers) if cache is None else cache
        mask = create_attention_mask(h, cache[0])
        rank, size, group = self.pipeline_rank, self.pipeline_size, self._pipeline_group
        if rank < size - 1:
            h = mx.distributed.recv_like(h, rank + 1, group=group)
        stream = Residual(h)
        for layer, layer_cache in zip(layers, cache, strict=True):
            # In training an array: what gradient checkpointing keeps of a layer. And layers of other kinds
            # know nothing else.
            if self.training or not isinstance(layer, ResidualLayer):
                stream = Residual(layer(stream.sum(), mask, layer_cache))
            else:
                stream = layer(stream, mask, layer_cache)
        if size == 1:
            return stream
        h = stream.sum()
        if rank != 0:
            h = mx.distributed.send(h, rank - 1, group=group)
            if cache[-1] is not None:
                # Evaluating the cache alone must not leave the next rank waiting for this output.
                cache[-1].keys = mx.depends(cache[-1].keys, h)
        return Residual(mx.distributed.all_gather(h, group=group)[: h.shape[0]])


class CausalLM(mlx_nn.Module):
    """mlx-lm's ``Model`` interface around a backbone.

    Args:
        args: the family's ``ModelArgs``.
        backbone: under the attribute name ``BACKBONE``.
        tied: the embedding is the head; otherwise ``lm_head`` is.
    """

    BACKBONE = "model"
    # Parameters that stay in float32 when a model is cast: rounding a selection bias moves experts.
    KEEP_FLOAT32: tuple[str, ...] = ()

    def __init__(self, args: Any, backbone: Backbone, *, tied: bool):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        setattr(self, self.BACKBONE, backbone)
        if not tied:
            vocabulary, hidden = backbone[backbone.EMBEDDING].weight.shape
            self.lm_head = Linear(hidden, vocabulary, bias=False)

    def __call__(self, inputs: mx.array, cache: Sequence[Any] | None = None) -> mx.array:
        """Token ids ``[batch, length]`` -> logits ``[batch, length, vocabulary]``."""
        logits = again(self, inputs, cache)
        if logits is None:
            step = watch(self, inputs, cache)
            logits = self.head(self[self.BACKBONE](inputs, cache))
            if step is not None:
                step.made(logits)
        return logits

    def head(self, h: mx.array) -> mx.array:
        """Hidden states ``[..., hidden]`` -> logits ``[..., vocabulary]``."""
        if "lm_head" in self:
            y: mx.array = self.lm_head(h)
            return y
        backbone: Backbone = self[self.BACKBONE]
        return backbone.as_head(h)

    @property
    def layers(self) -> list[Any]:
        """This process's decoder layers: what mlx-lm makes caches for."""
        return list(self[self.BACKBONE].pipeline_layers)

    def shard(self, group: mx.distributed.Group | None = None) -> None:
        """Split every layer over a tensor-parallel group. Embedding, norms, routers and head stay whole.

        Raises:
            ValueError: heads or widths do not divide among the ranks; nothing has been split then.
        """
        group = group or mx.distributed.init()
        for layer in self.layers:
            layer.check_shard(group)
        for layer in self.layers:
            layer.shard(group)

    @property
    def cast_predicate(self) -> Callable[[str], bool]:
        """Which parameters follow the model's dtype; asked by ``mlx_lm.convert``."""
        return lambda path: not any(name in path for name in self.KEEP_FLOAT32)
