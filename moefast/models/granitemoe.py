"""GraniteMoE: IBM's Granite 3.x language models with small experts (Granite-3.1-1B-A400M, 3B-A800M).

*Architecture.* A pre-norm decoder: RMSNorm, grouped-query attention with rotary positions, RMSNorm, MoE;
every layer is sparse and there is no shared expert. "Granite 3.0 Language Models", IBM 2024; the sparse
blocks follow ScatterMoE (Tan et al., arXiv:2403.08245). What is Granite's own are four multipliers, which
let hyperparameters found on a small model carry over to a large one (maximal update parametrisation, Yang
et al., arXiv:2203.03466; Power scheduler, arXiv:2408.13359):

- ``embedding_multiplier`` on the embeddings,
- ``attention_multiplier`` in place of ``1 / sqrt(head_dim)`` on the attention scores,
- ``residual_multiplier`` on both branches of a layer before they join the residual stream,
- ``logits_scaling``, by which the logits are divided.

*Routing.* The top k of the logits are taken first and softmax runs over those alone (in float32), which is
the softmax over all experts renormalised to the chosen ones. Of tied logits the highest index wins.

*Quantization.* ``quant_predicate`` keeps the router, ``o_proj``, the head and the experts' down projections
at 8 bits, as mlx-lm does (its rule names ``mlp.down_proj``, which matches the experts' ``switch_mlp``): a
real 4-bit Granite checkpoint mixes 4 and 8 bits. The router is tiny, and one wrong bit in it sends a token
to another expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx

from ..nn import Embedding, Linear, MoE, Names, RMSNorm, Router
from ..specs import RouterSpec
from .attention import SeparateAttention
from .backbone import Backbone, CausalLM, PreNormLayer
from .checkpoints import Weights, drop_unused, keep_at
from .config import BaseArgs
from .rope import make_rope


@dataclass
class ModelArgs(BaseArgs):
    """The fields of config.json that shape the model."""

    ALIASES: ClassVar = {"num_local_experts": ("num_experts", "n_routed_experts")}
    ROUTER_WORDS: ClassVar = {"num_experts": "num_local_experts", "top_k": "num_experts_per_tok"}

    model_type: str
    hidden_size: int  # width of the residual stream
    num_hidden_layers: int  # decoder layers, all of them sparse
    intermediate_size: int  # width of one expert
    num_attention_heads: int  # query heads
    rms_norm_eps: float  # added to the mean square in every RMSNorm
    vocab_size: int  # rows of the embedding
    logits_scaling: float  # logits are divided by it
    attention_multiplier: float  # factor on attention scores, instead of 1 / sqrt(head_dim)
    embedding_multiplier: float  # factor on the token embeddings
    residual_multiplier: float  # factor on the attention and MoE branches
    max_position_embeddings: int  # trained context length; where dynamic rope scaling starts
    num_key_value_heads: int  # key-value heads, shared by groups of query heads
    attention_bias: bool  # biases in q, k, v and o projections
    rope_theta: float  # base of the rotary wavelengths
    num_local_experts: int  # experts per layer
    num_experts_per_tok: int  # experts per token (k)
    head_dim: int | None = None  # size of a head; hidden_size / heads by default
    rope_scaling: dict[str, Any] | None = None  # context extension; see models/rope.py
    tie_word_embeddings: bool = True  # the embedding is the head
    hidden_act: str = "silu"  # activation of the experts' gate

    def __post_init__(self) -> None:
        self.check_counts(
            "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "vocab_size"
        )
        self.require("hidden_act", ("silu",))
        self.check_heads(self.num_attention_heads, self.num_key_value_heads)
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.check_routing()

    def router_spec(self) -> RouterSpec:
        """Top k of the logits, then a float32 softmax over the selected."""
        return RouterSpec(
            num_experts=self.num_local_experts,
            top_k=self.num_experts_per_tok,
            score_over="selected",
            score_dtype="float32",
            ties="highest",
        )


class Attention(SeparateAttention):
    """Grouped-query attention whose scores are scaled by ``attention_multiplier``."""

    def __init__(self, args: ModelArgs):
        heads, kv_heads, head_dim = args.num_attention_heads, args.num_key_value_heads, args.head_dim
        assert head_dim is not None
        rope = make_rope(
            args.model_type,
            head_dim,
            args.rope_theta,
            args.rope_scaling,
            args.max_position_embeddings,
        )
        super().__init__(heads, kv_heads, head_dim, rope, scale=args.attention_multiplier)
        bias = args.attention_bias
        self.q_proj = Linear(args.hidden_size, heads * head_dim, bias=bias)
        self.k_proj = Linear(args.hidden_size, kv_heads * head_dim, bias=bias)
        self.v_proj = Linear(args.hidden_size, kv_heads * head_dim, bias=bias)
        self.o_proj = Linear(heads * head_dim, args.hidden_size, bias=bias)

    def __call__(self, x: mx.array, mask: mx.array | str | None, cache: Any | None) -> mx.array:
        """x: ``[batch, length, hidden]`` -> the same shape."""
        y = self.attend(*self.project(x), mask, cache)
        return self.o_proj(y)


class DecoderLayer(PreNormLayer):
    """A pre-norm layer whose branches are scaled by ``residual_multiplier``."""

    FFN = "block_sparse_moe"

    def __init__(self, args: ModelArgs):
        spec = args.router_spec()
        moe = MoE(
            spec,
            args.hidden_size,
            args.intermediate_size,
            router=Router(spec, args.hidden_size, linear="layer"),
            names=Names(router="router"),
        )
        super().__init__(Attention(args), moe, args.hidden_size, args.rms_norm_eps, args.residual_multiplier)


class GraniteMoE(Backbone):
    """The backbone with scaled embeddings."""

    def __init__(self, args: ModelArgs):
        embedding = Embedding(args.vocab_size, args.hidden_size)
        layers = [DecoderLayer(args) for _ in range(args.num_hidden_layers)]
        super().__init__(embedding, layers, RMSNorm(args.hidden_size, eps=args.rms_norm_eps))
        self.embedding_multiplier = args.embedding_multiplier

    def embed(self, inputs: mx.array) -> mx.array:
        """Token ids -> embeddings, times ``embedding_multiplier``."""
        return super().embed(inputs) * self.embedding_multiplier


class Model(CausalLM):
    """GraniteMoE with its head, the interface mlx-lm expects."""

    def __init__(self, args: ModelArgs):
        super().__init__(args, GraniteMoE(args), tied=args.tie_word_embeddings)

    def head(self, h: mx.array) -> mx.array:
        """Hidden states -> logits, divided by ``logits_scaling``."""
        scaling: float = self.args.logits_scaling
        return super().head(h) / scaling

    def sanitize(self, weights: Weights) -> Weights:
        """Tensors of an original or an mlx-lm checkpoint -> this model's.

        - ``input_linear [E, 2 * width, hidden]`` holds gate and up of every expert, gate first: split.
        - ``output_linear`` is the stack of down projections: renamed.
        - What no layer reads is dropped: :func:`~moefast.models.checkpoints.drop_unused`.
        """
        for layer in range(self.args.num_hidden_layers):
            block = f"model.layers.{layer}.block_sparse_moe"
            fused = weights.pop(f"{block}.input_linear.weight", None)
            if fused is not None:
                gate, up = mx.split(fused, 2, axis=1)
                weights[f"{block}.switch_mlp.gate_proj.weight"] = gate
                weights[f"{block}.switch_mlp.up_proj.weight"] = up
            down = weights.pop(f"{block}.output_linear.weight", None)
            if down is not None:
                weights[f"{block}.switch_mlp.down_proj.weight"] = down
        args = self.args
        return drop_unused(weights, tied=args.tie_word_embeddings)

    def quantization(
        self, *, bits: int = 8, group_size: int = 64
    ) -> Callable[[str, Any], bool | dict[str, int]]:
        """The predicate for ``mlx.nn.quantize`` with the given precision for the sensitive layers."""
        sensitive = ("block_sparse_moe.router.layer", "self_attn.o_proj", "mlp.down_proj", "lm_head")
        return keep_at(sensitive, bits=bits, group_size=group_size)

    @property
    def quant_predicate(self) -> Callable[[str, Any], bool | dict[str, int]]:
        """mlx-lm's hook: :meth:`quantization` with 8 bits in groups of 64."""
        return self.quantization()
