"""DBRX: Databricks' model of 16 large experts, 4 per token.

*Architecture.* "Introducing DBRX" (Databricks 2024), trained with MegaBlocks (Gale et al., arXiv:2211.15841).
132 billion parameters, 36 billion active. Norms are LayerNorms without bias.

*Norm-attention-norm.* The checkpoint bundles ``norm_1``, the attention and ``norm_2`` in one module: it
returns both the new residual stream and its normalised copy, the input of the experts. The arithmetic is
that of a pre-norm layer; the bundle was a boundary of the training's sharding, and names the tensors.

*clip_qkv.* Queries, keys and values are clipped to ``+-clip_qkv`` (8 in DBRX) right after the projection. A
single outlier in them makes attention logits explode and training diverge; clipping was MPT's cure, without
the cost of normalising queries and keys. The model was trained with it, so inference must clip too.

*Routing.* Float32 softmax over all experts, top 4, divided by their L1 norm
(``moe_normalize_expert_weights``; the scores are positive, so the norm is their sum), in the model's dtype.

*One path.* mlx-lm keeps the experts in a Python list and loops over tokens in inference and over experts in
training, each time waiting for the indices to reach the host. Here the experts are stacked and both are the
same gathered product, without any synchronisation. :func:`unstack_experts` gives mlx-lm's layout back.

*Quantization.* Nothing is kept at a higher precision, as in mlx-lm.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as mlx_nn

from ..errors import refuse
from ..nn import Embedding, LayerNorm, Linear, MoE, Names, Router
from ..specs import RouterSpec
from .attention import Attention as BaseAttention
from .backbone import Backbone, CausalLM
from .checkpoints import Weights, drop_unused, stack_experts
from .config import BaseArgs
from .residual import Residual, ResidualLayer
from .rope import make_rope

# DBRX's names of the projections and ours: silu(w1 x) * (v1 x), then w2.
_PROJECTIONS = {"w1": "gate_proj", "v1": "up_proj", "w2": "down_proj"}

# transformers 5 reads rope_parameters and copies attn_config as it is: of an original configuration, whose
# only theta (500000) is in attn_config, it makes one that also has its own default in rope_parameters.
_FILLED_IN_THETA = 10000.0


@dataclass
class ModelArgs(BaseArgs):
    """The fields of config.json that shape the model."""

    ALIASES: ClassVar = {
        "d_model": ("hidden_size",),
        "n_heads": ("num_attention_heads",),
        "n_layers": ("num_hidden_layers",),
        "max_seq_len": ("max_position_embeddings",),
    }
    ROUTER_WORDS: ClassVar = {"num_experts": "ffn_config.moe_num_experts", "top_k": "ffn_config.moe_top_k"}

    model_type: str
    vocab_size: int  # rows of the embedding
    d_model: int  # width of the residual stream
    ffn_config: dict[str, Any]  # the experts: see the properties below
    attn_config: dict[str, Any]  # the attention: see the properties below
    n_layers: int  # decoder layers, all of them sparse
    n_heads: int  # query heads; a head has d_model / heads dimensions
    max_seq_len: int | None = None  # trained context length; where dynamic rope scaling starts
    rope_theta: float | None = None  # base of the rotary wavelengths, where attn_config has none
    rope_scaling: dict[str, Any] | None = None  # context extension; see models/rope.py
    tie_word_embeddings: bool = False  # no original implements it: must be false

    def __post_init__(self) -> None:
        family = self.model_type
        self.check_counts("d_model", "n_layers", "n_heads", "vocab_size")
        if self.d_model % self.n_heads:
            refuse(family, f"n_heads must divide d_model={self.d_model}", self.n_heads)
        self.require("tie_word_embeddings", (False,))
        for section, needed in (
            ("ffn_config", ("ffn_hidden_size", "moe_num_experts", "moe_top_k")),
            ("attn_config", ("kv_n_heads",)),
        ):
            for key in needed:
                if getattr(self, section).get(key) is None:
                    refuse(family, f"{section} must set {key}", sorted(getattr(self, section)))
        activation = (self.ffn_config.get("ffn_act_fn") or {}).get("name", "silu")
        if activation != "silu":
            refuse(family, "ffn_config.ffn_act_fn must be 'silu'", repr(activation))
        norm = self.ffn_config.get("moe_normalize_expert_weights", 1.0)
        if norm not in (None, 1, 1.0):
            refuse(family, "ffn_config.moe_normalize_expert_weights must be 1 (the L1 norm) or null", norm)
        if self.theta is None:
            refuse(family, "rope_theta must be set in attn_config or rope_parameters", None)
        if self.rope_theta not in (None, self.theta, _FILLED_IN_THETA):
            refuse(
                family, f"rope_theta must agree with attn_config, which gives {self.theta}", self.rope_theta
            )
        self.check_heads(self.n_heads, self.kv_heads)
        self.check_routing()

    @property
    def theta(self) -> float | None:
        """Base of the rotary wavelengths, from either generation of transformers."""
        given: float | None = self.attn_config.get("rope_theta")
        return self.rope_theta if given is None else given

    @property
    def kv_heads(self) -> int:
        """Key-value heads, shared by groups of query heads."""
        return int(self.attn_config["kv_n_heads"])

    @property
    def clip_qkv(self) -> float | None:
        """Bound on queries, keys and values; None: not clipped."""
        return self.attn_config.get("clip_qkv")

    @property
    def ffn_width(self) -> int:
        """Width of one expert."""
        return int(self.ffn_config["ffn_hidden_size"])

    @property
    def num_experts(self) -> int:
        """Experts per layer."""
        return int(self.ffn_config["moe_num_experts"])

    def router_spec(self) -> RouterSpec:
        """Float32 softmax over all, top k, L1-normalised unless the configuration says null."""
        return RouterSpec(
            num_experts=self.num_experts,
            top_k=int(self.ffn_config["moe_top_k"]),
            score_dtype="float32",
            renormalize=self.ffn_config.get("moe_normalize_expert_weights", 1.0) is not None,
            weight_dtype="logits",
        )


class Attention(BaseAttention):
    """Grouped-query attention with a fused, clipped projection."""

    INPUTS = ("Wqkv",)
    OUTPUT = "out_proj"

    def __init__(self, args: ModelArgs):
        heads, kv_heads, head_dim = args.n_heads, args.kv_heads, args.d_model // args.n_heads
        assert args.theta is not None
        rope = make_rope(args.model_type, head_dim, args.theta, args.rope_scaling, args.max_seq_len)
        super().__init__(heads, kv_heads, head_dim, rope)
        self.clip_qkv = args.clip_qkv
        self.Wqkv = Linear(args.d_model, (heads + 2 * kv_heads) * head_dim, bias=False)
        self.out_proj = Linear(args.d_model, args.d_model, bias=False)

    def __call__(self, x: mx.array, mask: mx.array | str | None, cache: Any | None) -> mx.array:
        """x: ``[batch, length, d_model]`` -> the same shape."""
        fused = self.Wqkv(x)
        if self.clip_qkv is not None:
            fused = mx.clip(fused, -self.clip_qkv, self.clip_qkv)
        queries, keys, values = self.split_fused(fused)
        return self.out_proj(self.attend(queries, keys, values, mask, cache))


class NormAttentionNorm(mlx_nn.Module):
    """``r = x + attention(norm_1(x))``; returns ``r`` and ``norm_2(r)``."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.norm_1 = LayerNorm(args.d_model, bias=False)
        self.norm_2 = LayerNorm(args.d_model, bias=False)
        self.attn = Attention(args)

    def __call__(
        self, stream: Residual, mask: mx.array | str | None, cache: Any | None
    ) -> tuple[mx.array, mx.array]:
        """The residual stream -> two arrays ``[batch, length, d_model]``."""
        x, y = stream.normed(self.norm_1)
        return Residual(x, self.attn(y, mask, cache)).normed(self.norm_2)


class DecoderLayer(ResidualLayer):
    """Norm-attention-norm, then the experts on the normalised copy."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        spec = args.router_spec()
        self.ffn = MoE(
            spec,
            args.d_model,
            args.ffn_width,
            router=Router(spec, args.d_model, linear="layer"),
            names=Names(router="router"),
        )
        self.norm_attn_norm = NormAttentionNorm(args)

    def join(self, stream: Residual, mask: mx.array | str | None, cache: Any | None) -> Residual:
        """The stream -> the stream."""
        residual, h = self.norm_attn_norm(stream, mask, cache)
        return Residual(residual, self.ffn(h))

    def check_shard(self, group: mx.distributed.Group) -> None:
        """Raise ValueError where heads or widths do not divide among the ranks."""
        self.norm_attn_norm.attn.check_shard(group)
        self.ffn.check_shard(group)

    def shard(self, group: mx.distributed.Group) -> None:
        """Split attention heads and expert widths over a tensor-parallel group."""
        self.norm_attn_norm.attn.shard(group)
        self.ffn.shard(group)


class DBRX(Backbone):
    """The backbone with its checkpoints' names."""

    EMBEDDING = "wte"
    LAYERS = "blocks"
    NORM = "norm_f"


class Model(CausalLM):
    """DBRX with its head, the interface mlx-lm expects."""

    BACKBONE = "transformer"

    def __init__(self, args: ModelArgs):
        embedding = Embedding(args.vocab_size, args.d_model)
        layers = [DecoderLayer(args) for _ in range(args.n_layers)]
        backbone = DBRX(embedding, layers, LayerNorm(args.d_model, bias=False))
        super().__init__(args, backbone, tied=False)

    @property
    def model(self) -> Backbone:
        """The backbone under the name mlx-lm's pipelining looks for."""
        backbone: Backbone = self.transformer
        return backbone

    def sanitize(self, weights: Weights) -> Weights:
        """Tensors of an original or an mlx-lm checkpoint -> this model's.

        - The original holds the experts of a layer as three matrices ``experts.mlp.{w1,v1,w2}`` of
          ``[experts * width, d_model]``: reshaped into stacks. ``w2`` is stored transposed, so its slices
          are turned round.
        - mlx-lm's checkpoints hold ``experts.{e}.{w1,v1,w2}``: stacked.
        - What no layer reads is dropped: :func:`~moefast.models.checkpoints.drop_unused`.
        """
        experts = self.args.num_experts
        for layer in range(self.args.n_layers):
            ffn = f"transformer.blocks.{layer}.ffn"
            for name, projection in _PROJECTIONS.items():
                fused = weights.pop(f"{ffn}.experts.mlp.{name}", None)
                if fused is not None:
                    stack = fused.reshape(experts, -1, fused.shape[-1])
                    if name == "w2":
                        stack = mx.contiguous(stack.swapaxes(1, 2))
                    weights[f"{ffn}.switch_mlp.{projection}.weight"] = stack
            stack_experts(weights, f"{ffn}.experts", f"{ffn}.switch_mlp", experts, _PROJECTIONS)
        return drop_unused(weights, tied=False)


def unstack_experts(weights: Mapping[str, mx.array]) -> Weights:
    """This model's tensors in mlx-lm's layout: ``ffn.experts.{e}.{w1,v1,w2}.*``, views of the stacks."""
    names = {ours: theirs for theirs, ours in _PROJECTIONS.items()}
    result: Weights = {}
    for key, value in weights.items():
        found = re.fullmatch(r"(.*\.ffn)\.switch_mlp\.(\w+)\.(\w+)", key)
        if found is None:
            result[key] = value
            continue
        ffn, projection, part = found.groups()
        # An index would copy; a slice does not.
        for expert, view in enumerate(mx.split(value, value.shape[0])):
            result[f"{ffn}.experts.{expert}.{names[projection]}.{part}"] = view.squeeze(0)
    return result
