"""How llama.cpp calls what the five models consist of, and where it wants it otherwise.

Names are those of the GGUF specification; keys and tensors are the ones that llama.cpp reads for each
architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Config = Mapping[str, Any]

_OUTER = {
    "model.embed_tokens": "token_embd",
    "model.word_embeddings": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.switch_mlp.gate_proj": "ffn_gate_exps",
    "mlp.switch_mlp.up_proj": "ffn_up_exps",
    "mlp.switch_mlp.down_proj": "ffn_down_exps",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One family as llama.cpp knows it.

    Attributes:
        name: of the architecture.
        keys: the configuration's field for each key, without the architecture's prefix; a dotted path
            where the field lies deeper.
        fixed: keys whose value no field has.
        layers: module path of the layers.
        outer, inner: name of each module's tensors, outside of layers and inside of one; several names where
            llama.cpp wants queries, keys and values apart.
        interleaved: queries and keys that are rotated in neighbouring pairs: their rows are put in that
            order.
    """

    name: str
    keys: Mapping[str, str]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    layers: str = "model.layers"
    outer: Mapping[str, str] = field(default_factory=lambda: _OUTER)
    inner: Mapping[str, str | tuple[str, ...]] = field(default_factory=lambda: _LAYER)
    interleaved: bool = False


_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "expert_used_count": "num_experts_per_tok",
    "vocab_size": "vocab_size",
}

ARCHITECTURES = {
    "granitemoe": Architecture(
        name="granitemoe",
        keys=_KEYS
        | {
            "expert_count": "num_local_experts",
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
        inner={key.replace("mlp.", "block_sparse_moe.", 1): name for key, name in _LAYER.items()}
        | {"block_sparse_moe.router.layer": "ffn_gate_inp"},
        interleaved=True,
    ),
    "glm4_moe": Architecture(
        name="glm4moe",
        keys=_KEYS
        | {
            "expert_count": "n_routed_experts",
            "expert_feed_forward_length": "moe_intermediate_size",
            "expert_shared_count": "n_shared_experts",
            "leading_dense_block_count": "first_k_dense_replace",
            "expert_weights_scale": "routed_scaling_factor",
            "expert_weights_norm": "norm_topk_prob",
            "attention.key_length": "head_dim",
            "attention.value_length": "head_dim",
        },
        fixed={"expert_gating_func": 2},  # sigmoid
        inner=_LAYER
        | {
            "post_attention_layernorm": "post_attention_norm",
            "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",  # a parameter, not a module
        },
    ),
    "qwen2_moe": Architecture(
        name="qwen2moe",
        keys=_KEYS
        | {
            "expert_count": "num_experts",
            "expert_feed_forward_length": "moe_intermediate_size",
            "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
        },
        inner={key.replace("shared_experts.", "shared_expert."): name for key, name in _LAYER.items()}
        | {"mlp.shared_expert_gate": "ffn_gate_inp_shexp"},
    ),
    "bailing_moe": Architecture(
        name="bailingmoe",
        keys=_KEYS
        | {
            "expert_count": "num_experts",
            "expert_feed_forward_length": "moe_intermediate_size",
            "expert_shared_count": "num_shared_experts",
            "leading_dense_block_count": "first_k_dense_replace",
            "expert_weights_norm": "norm_topk_prob",
        },
        fixed={"expert_weights_scale": 1.0},
        inner=_LAYER
        | {
            "attention.query_key_value": ("attn_q", "attn_k", "attn_v"),
            "attention.dense": "attn_output",
            "mlp.gate.gate_proj": "ffn_gate_inp",
        },
        interleaved=True,
    ),
    "dbrx": Architecture(
        name="dbrx",
        keys={
            "context_length": "max_seq_len",
            "embedding_length": "d_model",
            "block_count": "n_layers",
            "feed_forward_length": "ffn_config.ffn_hidden_size",
            "attention.head_count": "n_heads",
            "attention.head_count_kv": "attn_config.kv_n_heads",
            "attention.clamp_kqv": "attn_config.clip_qkv",
            "rope.freq_base": "attn_config.rope_theta",
            "expert_count": "ffn_config.moe_num_experts",
            "expert_used_count": "ffn_config.moe_top_k",
            "vocab_size": "vocab_size",
        },
        fixed={"attention.layer_norm_epsilon": 1e-5},
        layers="transformer.blocks",
        outer={"transformer.wte": "token_embd", "transformer.norm_f": "output_norm", "lm_head": "output"},
        inner={
            "norm_attn_norm.norm_1": "attn_norm",
            "norm_attn_norm.norm_2": "attn_output_norm",
            "norm_attn_norm.attn.Wqkv": "attn_qkv",
            "norm_attn_norm.attn.out_proj": "attn_output",
            "ffn.router.layer": "ffn_gate_inp",
            "ffn.switch_mlp.gate_proj": "ffn_gate_exps",
            "ffn.switch_mlp.up_proj": "ffn_up_exps",
            "ffn.switch_mlp.down_proj": "ffn_down_exps",
        },
    ),
}
