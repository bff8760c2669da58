"""Bailing MoE: Ant Group's Ling and Ring models (Ling-lite, Ling-plus; Ling-mini-2.0, Ling-flash-2.0).

*Architecture.* "Every FLOP Counts: Scaling a 300B Mixture-of-Experts LING LLM without Premium GPUs"
(arXiv:2503.05139) for the first generation; "Ling 2.0" (arXiv:2510.22115) for the second. A pre-norm
decoder: attention with a fused query-key-value projection, fine-grained experts and shared experts after
DeepSeekMoE (arXiv:2401.06066), the first ``first_k_dense_replace`` layers dense.

*Two generations, one file.* The first scores by softmax, without groups or bias. The second scores by
sigmoid with a selection bias (``moe_router_enable_expert_bias``), takes the experts from the best groups
(``n_group``, ``topk_group``), scales the weights, normalises queries and keys (``use_qk_norm``) and rotates
half of each head. Both renormalise with an epsilon of 1e-20 and return weights in the model's dtype; of
tied scores the highest index wins. See :mod:`moefast.backends.reference.route` for the steps.

*Normalised head.* With ``norm_head`` each *column* of the head (one hidden dimension over the vocabulary) is
divided by its norm, which keeps logits from growing with frequent tokens' rows (as in Baichuan 2,
arXiv:2309.10305). In inference the weights are fixed, so it is done once, in ``sanitize``.

*Quantization.* ``quant_predicate`` keeps the router at 8 bits: it is a 64 x 2048 matrix, small and decisive.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx

from ..nn import MLP, Linear, MoE, RMSNorm, Router
from ..specs import RouterSpec
from .attention import Attention as BaseAttention
from .backbone import Backbone, CausalLM, PreNormLayer
from .checkpoints import Weights, drop_unused, keep_at, rename, stack_experts
from .config import BaseArgs
from .rope import make_rope


@dataclass
class ModelArgs(BaseArgs):
    """The fields of config.json that shape the model."""

    ALIASES: ClassVar = {"num_experts": ("num_local_experts", "n_routed_experts")}
    ROUTER_WORDS: ClassVar = {
        "top_k": "num_experts_per_tok",
        "num_groups": "n_group",
        "top_groups": "topk_group",
    }

    model_type: str
    hidden_size: int  # width of the residual stream
    intermediate_size: int  # width of the MLP in dense layers
    max_position_embeddings: int  # trained context length; where dynamic rope scaling starts
    moe_intermediate_size: int  # width of one expert
    num_experts: int | None  # experts per sparse layer; None makes every layer dense
    num_shared_experts: int | None  # width of the shared expert, in shared-expert units; 0: none
    norm_topk_prob: bool  # divide a token's weights by their sum
    num_attention_heads: int  # query heads
    num_experts_per_tok: int  # experts per token (k)
    num_hidden_layers: int  # decoder layers
    num_key_value_heads: int  # key-value heads, shared by groups of query heads
    rms_norm_eps: float  # added to the mean square in every RMSNorm
    rope_theta: float  # base of the rotary wavelengths
    vocab_size: int  # rows of the embedding
    first_k_dense_replace: int = 0  # so many first layers are dense
    rope_scaling: dict[str, Any] | None = None  # context extension; see models/rope.py
    head_dim: int | None = None  # size of a head; hidden_size / heads by default
    use_bias: bool = False  # bias of the attention's output projection
    use_qkv_bias: bool = False  # bias of the fused query-key-value projection
    norm_head: bool = False  # columns of the head are divided by their norm
    norm_softmax: bool = False  # no published implementation: must be false
    use_qk_norm: bool = False  # RMSNorm on every query and key head
    tie_word_embeddings: bool = False  # the embedding is the head
    partial_rotary_factor: float = 1.0  # share of each head that is rotated ...
    rotary_dim: int | None = None  # ... or the number of rotated dimensions, which wins
    moe_router_enable_expert_bias: bool = False  # a selection bias per expert
    moe_router_enable_routed_scaling: bool = True  # must be true wherever the factor is not 1
    routed_scaling_factor: float = 1.0  # factor on the weights
    score_function: str = "softmax"  # or "sigmoid"
    n_group: int = 1  # groups of experts; 1 means no groups
    topk_group: int = 4  # groups whose experts stay in the race; read only where n_group > 1
    moe_shared_expert_intermediate_size: int | None = None  # unit of num_shared_experts; one expert's width
    moe_router_enable_shared_expert: bool = True  # false leaves the shared expert out
    use_sliding_window: bool = False  # window attention: not implemented
    num_nextn_predict_layers: int = 0  # multi-token prediction layers in the checkpoint: dropped
    hidden_act: str = "silu"  # activation of the gates

    def __post_init__(self) -> None:
        self.check_counts("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        self.require("hidden_act", ("silu",))
        self.require("use_sliding_window", (False, None))
        self.require("norm_softmax", (False, None))
        self.require("score_function", ("softmax", "sigmoid", None))
        self.score_function = self.score_function or "softmax"
        if self.routed_scaling_factor != 1.0:
            self.require("moe_router_enable_routed_scaling", (True,), " where routed_scaling_factor is not 1")
        if self.tie_word_embeddings:
            # The original would normalise the embedding along with the head.
            self.require("norm_head", (False, None), " where tie_word_embeddings is set")
        self.check_heads(self.num_attention_heads, self.num_key_value_heads)
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if self.num_experts is not None:
            self.check_routing()

    def is_sparse(self, layer: int) -> bool:
        """Whether this layer has experts."""
        return self.num_experts is not None and layer >= self.first_k_dense_replace

    @property
    def shared_width(self) -> int:
        """Width of the shared expert; 0 for none."""
        if not self.moe_router_enable_shared_expert:
            return 0
        unit = self.moe_shared_expert_intermediate_size or self.moe_intermediate_size
        return unit * (self.num_shared_experts or 0)

    def router_spec(self) -> RouterSpec:
        """Float32 scores, groups with fill 0, renormalised with 1e-20, weights in the logits' dtype."""
        assert self.num_experts is not None
        return RouterSpec(
            num_experts=self.num_experts,
            top_k=self.num_experts_per_tok,
            score=self.score_function,
            score_dtype="float32",
            num_groups=self.n_group,
            top_groups=self.topk_group if self.n_group > 1 else 1,
            ties="highest",
            renormalize=self.norm_topk_prob and self.num_experts_per_tok > 1,
            renormalize_eps=1e-20,
            scale=self.routed_scaling_factor,
            weight_dtype="logits",
        )


class Attention(BaseAttention):
    """Grouped-query attention with one fused projection for queries, keys and values."""

    INPUTS = ("query_key_value",)
    OUTPUT = "dense"
    NORMS = ("query_layernorm", "key_layernorm")

    def __init__(self, args: ModelArgs):
        heads, kv_heads, head_dim = args.num_attention_heads, args.num_key_value_heads, args.head_dim
        assert head_dim is not None
        rotated = args.rotary_dim
        if rotated is None:
            rotated = int(head_dim * args.partial_rotary_factor)
        rope = make_rope(
            args.model_type, rotated, args.rope_theta, args.rope_scaling, args.max_position_embeddings
        )
        super().__init__(heads, kv_heads, head_dim, rope)
        self.query_key_value = Linear(
            args.hidden_size, (heads + 2 * kv_heads) * head_dim, bias=args.use_qkv_bias
        )
        self.dense = Linear(heads * head_dim, args.hidden_size, bias=args.use_bias)
        if args.use_qk_norm:
            self.query_layernorm = RMSNorm(head_dim, eps=args.rms_norm_eps)
            self.key_layernorm = RMSNorm(head_dim, eps=args.rms_norm_eps)

    def __call__(self, x: mx.array, mask: mx.array | str | None, cache: Any | None) -> mx.array:
        """x: ``[batch, length, hidden]`` -> the same shape."""
        queries, keys, values = self.split_fused(self.query_key_value(x))
        y = self.attend(
            queries,
            keys,
            values,
            mask,
            cache,
            query_norm=self.get("query_layernorm"),
            key_norm=self.get("key_layernorm"),
        )
        return self.dense(y)


class DecoderLayer(PreNormLayer):
    """A pre-norm layer: sparse with shared experts, or dense."""

    ATTENTION = "attention"

    def __init__(self, args: ModelArgs, layer: int):
        ffn: MoE | MLP
        if args.is_sparse(layer):
            spec = args.router_spec()
            bias = "expert_bias" if args.moe_router_enable_expert_bias else None
            ffn = MoE(
                spec,
                args.hidden_size,
                args.moe_intermediate_size,
                router=Router(spec, args.hidden_size, linear="gate_proj", selection_bias=bias),
                shared_width=args.shared_width,
            )
        else:
            ffn = MLP(args.hidden_size, args.intermediate_size)
        super().__init__(Attention(args), ffn, args.hidden_size, args.rms_norm_eps)


class BailingMoE(Backbone):
    """The backbone with its checkpoints' names."""

    EMBEDDING = "word_embeddings"


class Model(CausalLM):
    """Bailing MoE with its head, the interface mlx-lm expects."""

    KEEP_FLOAT32 = ("expert_bias",)

    def __init__(self, args: ModelArgs):
        layers = [DecoderLayer(args, i) for i in range(args.num_hidden_layers)]
        super().__init__(args, BailingMoE.around(layers, args), tied=args.tie_word_embeddings)

    def sanitize(self, weights: Weights) -> Weights:
        """Tensors of an original or an mlx-lm checkpoint -> this model's.

        - With ``norm_head``, the columns of an unquantized head are normalised. A second time changes
          nothing in half precision, and in float32 no more than the last bits. A quantized head was
          normalised before it was packed.
        - ``mlp.experts.{e}.*``: the experts are stacked.
        - The router's ``gate.weight`` becomes the linear layer ``gate.gate_proj``.
        - What no layer reads is dropped: :func:`~moefast.models.checkpoints.drop_unused`.
        """
        args = self.args
        if args.norm_head and "lm_head.weight" in weights and "lm_head.scales" not in weights:
            head = weights["lm_head.weight"]
            norm = mx.linalg.norm(head.astype(mx.float32), axis=0, keepdims=True) + 1e-7
            weights["lm_head.weight"] = (head / norm).astype(head.dtype)
        for layer in range(args.first_k_dense_replace, args.num_hidden_layers):
            mlp = f"model.layers.{layer}.mlp"
            stack_experts(weights, f"{mlp}.experts", f"{mlp}.switch_mlp", args.num_experts or 0)
            rename(weights, [(f"{mlp}.gate.weight", f"{mlp}.gate.gate_proj.weight")])
        layers = args.num_hidden_layers
        surplus = range(layers, layers + args.num_nextn_predict_layers)
        return drop_unused(weights, tied=args.tie_word_embeddings, prediction_layers=surplus)

    def quantization(
        self, *, bits: int = 8, group_size: int = 64
    ) -> Callable[[str, Any], bool | dict[str, int]]:
        """The predicate for ``mlx.nn.quantize`` with the given precision for the routers."""
        return keep_at(("mlp.gate.gate_proj",), bits=bits, group_size=group_size)

    @property
    def quant_predicate(self) -> Callable[[str, Any], bool | dict[str, int]]:
        """mlx-lm's hook: :meth:`quantization` with 8 bits in groups of 64."""
        return self.quantization()
