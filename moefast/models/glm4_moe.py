"""GLM-4 MoE: GLM-4.5, GLM-4.5-Air, GLM-4.6.

*Architecture.* "GLM-4.5: Agentic, Reasoning, and Coding (ARC) Foundation Models" (arXiv:2508.06471, section
2.1). The sparse layers follow DeepSeek-V3; the model is deeper and narrower, with more attention heads
(96 for a width of 5120), because depth helped reasoning. Attention: grouped queries, rotary positions on
half of each head (``partial_rotary_factor``), and in the large model RMSNorm on queries and keys
(``use_qk_norm``) to keep attention logits in range. The first ``first_k_dense_replace`` layers are dense:
routing in the lowest layers is hard to balance.

*Routing.* Sigmoid scores in float32 plus a selection bias (loss-free balancing), groups where ``n_group >
1``, weights renormalised and scaled; explained in :mod:`moefast.backends.reference.route`. One shared expert
is added plainly.

*Quantization.* The router is a raw matrix, not a linear layer, so quantization never touches it: sigmoid
scores of neighbouring experts differ by less than a 4-bit step. That is stronger than the 8 bits some
families keep; there is nothing to configure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx

from ..nn import MLP, Linear, MoE, RMSNorm, Router
from ..specs import RouterSpec
from .attention import SeparateAttention
from .backbone import Backbone, CausalLM, PreNormLayer
from .checkpoints import Weights, drop_unused, stack_experts
from .config import BaseArgs
from .rope import make_rope


@dataclass
class ModelArgs(BaseArgs):
    """The fields of config.json that shape the model."""

    ALIASES: ClassVar = {"n_routed_experts": ("num_local_experts", "num_experts")}
    ROUTER_WORDS: ClassVar = {
        "num_experts": "n_routed_experts",
        "top_k": "num_experts_per_tok",
        "num_groups": "n_group",
        "top_groups": "topk_group",
    }

    model_type: str
    vocab_size: int  # rows of the embedding
    hidden_size: int  # width of the residual stream
    intermediate_size: int  # width of the MLP in dense layers
    max_position_embeddings: int  # trained context length; where dynamic rope scaling starts
    moe_intermediate_size: int  # width of one expert
    norm_topk_prob: bool  # divide a token's weights by their sum
    num_attention_heads: int  # query heads
    n_group: int  # groups of experts; 1 means no groups
    topk_group: int  # groups whose experts stay in the race
    n_shared_experts: int | None  # width of the shared expert, in experts; None or 0: no shared expert
    n_routed_experts: int | None  # experts per sparse layer; None makes every layer dense
    routed_scaling_factor: float  # factor on the weights
    num_experts_per_tok: int  # experts per token (k)
    first_k_dense_replace: int  # so many first layers are dense
    num_hidden_layers: int  # decoder layers
    num_key_value_heads: int  # key-value heads, shared by groups of query heads
    rms_norm_eps: float  # added to the mean square in every RMSNorm
    rope_theta: float  # base of the rotary wavelengths
    use_qk_norm: bool  # RMSNorm on every query and key head
    tie_word_embeddings: bool  # the embedding is the head
    attention_bias: bool  # biases in q, k and v projections (never in o)
    head_dim: int | None = None  # size of a head; hidden_size / heads by default
    partial_rotary_factor: float = 0.5  # share of each head that is rotated
    rope_scaling: dict[str, Any] | None = None  # context extension; see models/rope.py
    scoring_func: str = "sigmoid"  # how logits become scores
    topk_method: str = "noaux_tc"  # selection bias without auxiliary loss
    num_nextn_predict_layers: int = 1  # multi-token prediction layers in the checkpoint: dropped
    hidden_act: str = "silu"  # activation of the gates

    def __post_init__(self) -> None:
        self.check_counts("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        self.require("hidden_act", ("silu",))
        self.require("scoring_func", ("sigmoid",))
        self.require("topk_method", ("noaux_tc",))
        self.check_heads(self.num_attention_heads, self.num_key_value_heads)
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if self.n_routed_experts is not None:
            self.check_routing()

    def is_sparse(self, layer: int) -> bool:
        """Whether this layer has experts."""
        return self.n_routed_experts is not None and layer >= self.first_k_dense_replace

    def router_spec(self) -> RouterSpec:
        """Float32 sigmoid, selection bias, groups with fill 0, renormalised and scaled."""
        assert self.n_routed_experts is not None
        return RouterSpec(
            num_experts=self.n_routed_experts,
            top_k=self.num_experts_per_tok,
            score="sigmoid",
            score_dtype="float32",
            num_groups=self.n_group,
            # mlx-lm looks at topk_group only where there are groups
            top_groups=self.topk_group if self.n_group > 1 else 1,
            # 0, not -inf: what the released configurations ran with
            dropped_fill="zero",
            renormalize=self.norm_topk_prob and self.num_experts_per_tok > 1,
            scale=self.routed_scaling_factor,
        )


class Attention(SeparateAttention):
    """Grouped-query attention: partial rotation, optional norms on queries and keys."""

    NORMS = ("q_norm", "k_norm")

    def __init__(self, args: ModelArgs):
        heads, kv_heads, head_dim = args.num_attention_heads, args.num_key_value_heads, args.head_dim
        assert head_dim is not None
        rope = make_rope(
            args.model_type,
            int(head_dim * args.partial_rotary_factor),
            args.rope_theta,
            args.rope_scaling,
            args.max_position_embeddings,
        )
        super().__init__(heads, kv_heads, head_dim, rope)
        bias = args.attention_bias
        self.q_proj = Linear(args.hidden_size, heads * head_dim, bias=bias)
        self.k_proj = Linear(args.hidden_size, kv_heads * head_dim, bias=bias)
        self.v_proj = Linear(args.hidden_size, kv_heads * head_dim, bias=bias)
        self.o_proj = Linear(heads * head_dim, args.hidden_size, bias=False)
        if args.use_qk_norm:
            self.q_norm = RMSNorm(head_dim, eps=args.rms_norm_eps)
            self.k_norm = RMSNorm(head_dim, eps=args.rms_norm_eps)

    def __call__(self, x: mx.array, mask: mx.array | str | None, cache: Any | None) -> mx.array:
        """x: ``[batch, length, hidden]`` -> the same shape."""
        y = self.attend(
            *self.project(x),
            mask,
            cache,
            query_norm=self.get("q_norm"),
            key_norm=self.get("k_norm"),
        )
        return self.o_proj(y)


class DecoderLayer(PreNormLayer):
    """A pre-norm layer: sparse with a shared expert, or dense."""

    def __init__(self, args: ModelArgs, layer: int):
        ffn: MoE | MLP
        if args.is_sparse(layer):
            spec = args.router_spec()
            ffn = MoE(
                spec,
                args.hidden_size,
                args.moe_intermediate_size,
                router=Router(spec, args.hidden_size, linear=None, selection_bias="e_score_correction_bias"),
                shared_width=args.moe_intermediate_size * (args.n_shared_experts or 0),
            )
        else:
            ffn = MLP(args.hidden_size, args.intermediate_size)
        super().__init__(Attention(args), ffn, args.hidden_size, args.rms_norm_eps)


class Model(CausalLM):
    """GLM-4 MoE with its head, the interface mlx-lm expects."""

    KEEP_FLOAT32 = ("e_score_correction_bias",)

    def __init__(self, args: ModelArgs):
        layers = [DecoderLayer(args, i) for i in range(args.num_hidden_layers)]
        super().__init__(args, Backbone.around(layers, args), tied=args.tie_word_embeddings)

    def sanitize(self, weights: Weights) -> Weights:
        """Tensors of an original or an mlx-lm checkpoint -> this model's.

        - ``mlp.experts.{e}.*``: the experts are stacked.
        - What no layer reads is dropped: :func:`~moefast.models.checkpoints.drop_unused`.
        """
        args = self.args
        for layer in range(args.num_hidden_layers):
            mlp = f"model.layers.{layer}.mlp"
            stack_experts(weights, f"{mlp}.experts", f"{mlp}.switch_mlp", args.n_routed_experts or 0)
        layers = args.num_hidden_layers
        surplus = range(layers, layers + args.num_nextn_predict_layers)
        return drop_unused(weights, tied=args.tie_word_embeddings, prediction_layers=surplus)
