"""Qwen2-MoE: Qwen1.5-MoE-A2.7B and Qwen2-57B-A14B.

*Architecture.* A pre-norm decoder with grouped-query attention (biases on q, k and v only) and, in each
sparse layer, many small experts next to a shared expert. "Qwen1.5-MoE: Matching 7B Model Performance with
1/3 Activated Parameters" (Qwen Team 2024); "Qwen2 Technical Report" (arXiv:2407.10671, section 2.2.2): the
experts are fine-grained (a dense layer's width cut in pieces), and upcycled from a dense model.

*Routing.* Softmax over all experts, the top k, weights as they are (not renormalised, unless
``norm_topk_prob``): their sum says how much of the router's probability the chosen experts hold.

*Gated shared expert.* Every token also passes one wide expert, and a linear layer with a single output
decides through a sigmoid how much of it the token wants: ``y = routed(x) + sigmoid(g x) * shared(x)``. Common
knowledge sits in the shared expert, so the routed ones need not each learn it.

*Quantization.* Nothing is kept at a higher precision: mlx-lm's checkpoints quantize the router, a plain
linear layer named ``mlp.gate``, like every other layer, and so does this model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import mlx.core as mx

from ..errors import refuse
from ..nn import MLP, Linear, MoE, Names
from ..specs import RouterSpec
from .attention import SeparateAttention
from .backbone import Backbone, CausalLM, PreNormLayer
from .checkpoints import Weights, drop_unused, stack_experts
from .config import BaseArgs
from .rope import make_rope


@dataclass
class ModelArgs(BaseArgs):
    """The fields of config.json that shape the model."""

    ALIASES: ClassVar = {"num_experts": ("num_local_experts", "n_routed_experts")}
    ROUTER_WORDS: ClassVar = {"top_k": "num_experts_per_tok"}

    model_type: str
    hidden_size: int  # width of the residual stream
    num_hidden_layers: int  # decoder layers
    intermediate_size: int  # width of the MLP in layers without experts
    num_attention_heads: int  # query heads
    num_experts_per_tok: int  # experts per token (k)
    num_experts: int  # routed experts per layer; 0 makes every layer dense
    moe_intermediate_size: int  # width of one routed expert
    shared_expert_intermediate_size: int  # width of the shared expert
    rms_norm_eps: float  # added to the mean square in every RMSNorm
    vocab_size: int  # rows of the embedding
    num_key_value_heads: int | None = None  # key-value heads; as many as query heads by default
    head_dim: int | None = None  # size of a head; hidden_size / heads by default
    rope_theta: float = 1000000.0  # base of the rotary wavelengths
    rope_traditional: bool = False  # rotate neighbouring pairs instead of halves (mlx-lm's own setting)
    rope_scaling: dict[str, Any] | None = None  # context extension; see models/rope.py
    max_position_embeddings: int | None = None  # trained context length; where dynamic rope scaling starts
    tie_word_embeddings: bool = False  # the embedding is the head
    norm_topk_prob: bool = False  # divide a token's weights by their sum
    qkv_bias: bool = True  # biases in q, k and v projections
    decoder_sparse_step: int = 1  # layer i is sparse where (i + 1) is a multiple of it ...
    mlp_only_layers: list[int] | None = field(default_factory=list)  # ... and i is not listed here
    use_sliding_window: bool = False  # window attention: not implemented
    # the same layer by layer: every one must be full_attention
    layer_types: list[str] | None = field(default=None, compare=False)
    hidden_act: str = "silu"  # activation of the gates

    def __post_init__(self) -> None:
        self.check_counts(
            "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "decoder_sparse_step"
        )
        self.require("hidden_act", ("silu",))
        self.require("use_sliding_window", (False, None))
        if set(self.layer_types or ()) - {"full_attention"}:
            refuse(self.model_type, "layer_types must all be 'full_attention'", self.layer_types)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self.check_heads(self.num_attention_heads, self.num_key_value_heads)
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if self.num_experts > 0:
            self.check_routing()

    def is_sparse(self, layer: int) -> bool:
        """Whether this layer has experts."""
        dense = layer in (self.mlp_only_layers or ())
        return not dense and self.num_experts > 0 and (layer + 1) % self.decoder_sparse_step == 0

    def router_spec(self) -> RouterSpec:
        """Softmax over all experts, top k. Where weights are renormalised (a setting mlx-lm ignores), it
        happens in float32 before they return to the model's dtype, as in the original."""
        return RouterSpec(
            num_experts=self.num_experts,
            top_k=self.num_experts_per_tok,
            score_dtype="float32" if self.norm_topk_prob else None,
            renormalize=self.norm_topk_prob,
            weight_dtype="logits" if self.norm_topk_prob else None,
        )


class Attention(SeparateAttention):
    """Grouped-query attention with biases on q, k and v."""

    def __init__(self, args: ModelArgs):
        heads, kv_heads, head_dim = args.num_attention_heads, args.num_key_value_heads, args.head_dim
        assert kv_heads is not None
        assert head_dim is not None
        rope = make_rope(
            args.model_type,
            head_dim,
            args.rope_theta,
            args.rope_scaling,
            args.max_position_embeddings,
            args.rope_traditional,
        )
        super().__init__(heads, kv_heads, head_dim, rope)
        self.q_proj = Linear(args.hidden_size, heads * head_dim, bias=args.qkv_bias)
        self.k_proj = Linear(args.hidden_size, kv_heads * head_dim, bias=args.qkv_bias)
        self.v_proj = Linear(args.hidden_size, kv_heads * head_dim, bias=args.qkv_bias)
        self.o_proj = Linear(heads * head_dim, args.hidden_size, bias=False)

    def __call__(self, x: mx.array, mask: mx.array | str | None, cache: Any | None) -> mx.array:
        """x: ``[batch, length, hidden]`` -> the same shape."""
        y = self.attend(*self.project(x), mask, cache)
        return self.o_proj(y)


class DecoderLayer(PreNormLayer):
    """A pre-norm layer: sparse with a gated shared expert, or dense."""

    def __init__(self, args: ModelArgs, layer: int):
        ffn: MoE | MLP
        if args.is_sparse(layer):
            ffn = MoE(
                args.router_spec(),
                args.hidden_size,
                args.moe_intermediate_size,
                router=Linear(args.hidden_size, args.num_experts, bias=False),
                shared_width=args.shared_expert_intermediate_size,
                shared_gate=True,
                names=Names(shared="shared_expert"),
            )
        else:
            ffn = MLP(args.hidden_size, args.intermediate_size)
        super().__init__(Attention(args), ffn, args.hidden_size, args.rms_norm_eps)


class Model(CausalLM):
    """Qwen2-MoE with its head, the interface mlx-lm expects."""

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
            stack_experts(weights, f"{mlp}.experts", f"{mlp}.switch_mlp", args.num_experts)
        return drop_unused(weights, tied=args.tie_word_embeddings)
