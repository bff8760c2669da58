"""Configurations of the five model families: the real ones, and shrunken ones that keep every feature.

A preset is the content of a config.json with the field names of the original checkpoints, so that mlx-lm,
moefast and transformers read it alike.
"""

from __future__ import annotations

import copy
from typing import Any

from ..errors import refuse

FAMILIES = ("granitemoe", "glm4_moe", "qwen2_moe", "bailing_moe", "dbrx")

Config = dict[str, Any]

# Granite-3.1-3B-A800M: muP-style multipliers, tied embeddings.
_GRANITE: Config = {
    "architectures": ["GraniteMoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_multiplier": 0.015625,
    "bos_token_id": 0,
    "embedding_multiplier": 12.0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "initializer_range": 0.02,
    "intermediate_size": 512,
    "logits_scaling": 6.0,
    "max_position_embeddings": 131072,
    "model_type": "granitemoe",
    "num_attention_heads": 24,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 40,
    "output_router_logits": False,
    "pad_token_id": 0,
    "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 10000000.0,
    "router_aux_loss_coef": 0.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 49155,
}

# GLM-4.5-Air: sigmoid scores with a selection bias, one dense layer first.
_GLM: Config = {
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": [151329, 151336, 151338],
    "first_k_dense_replace": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "max_position_embeddings": 131072,
    "model_type": "glm4_moe",
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 46,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "pad_token_id": 151329,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_qk_norm": False,
    "vocab_size": 151552,
}

# Qwen1.5-MoE-A2.7B: weights not renormalized, a shared expert behind a sigmoid gate.
_QWEN: Config = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5632,
    "max_position_embeddings": 8192,
    "max_window_layers": 21,
    "model_type": "qwen2_moe",
    "moe_intermediate_size": 1408,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "output_router_logits": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 5632,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}

# Ling-lite. Its auto_map is left out: it would make transformers ask for the original's own code.
_BAILING: Config = {
    "architectures": ["BailingMoeForCausalLM"],
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "eos_token_id": 126081,
    "first_k_dense_replace": 0,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.006,
    "intermediate_size": 1408,
    "max_position_embeddings": 32768,
    "model_type": "bailing_moe",
    "moe_intermediate_size": 1408,
    "norm_head": False,
    "norm_softmax": False,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "num_shared_experts": 2,
    "output_dropout": 0.0,
    "output_router_logits": False,
    "pad_token_id": 126081,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 600000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_bias": False,
    "use_cache": True,
    "use_qkv_bias": False,
    "vocab_size": 126464,
}

# DBRX: field names of MPT, sizes of experts and attention nested.
_DBRX: Config = {
    "architectures": ["DbrxForCausalLM"],
    "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "model_type": "", "rope_theta": 500000},
    "d_model": 6144,
    "emb_pdrop": 0.0,
    "ffn_config": {
        "ffn_hidden_size": 10752,
        "model_type": "",
        "moe_jitter_eps": 0,
        "moe_loss_weight": 0.05,
        "moe_num_experts": 16,
        "moe_top_k": 4,
    },
    "initializer_range": 0.02,
    "max_seq_len": 32768,
    "model_type": "dbrx",
    "n_heads": 48,
    "n_layers": 40,
    "output_router_logits": False,
    "resid_pdrop": 0.0,
    "router_aux_loss_coef": 0.05,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 100352,
}

_REAL = dict(zip(FAMILIES, (_GRANITE, _GLM, _QWEN, _BAILING, _DBRX), strict=True))

# What Ling-2.0 adds to Ling-lite under the same model_type: without it, no shrunken model would have
# groups and a selection bias in the softmax's place.
_LING_2: Config = {
    "architectures": ["BailingMoeV2ForCausalLM"],
    "first_k_dense_replace": 1,
    "moe_router_enable_expert_bias": True,
    "moe_shared_expert_intermediate_size": 128,
    "n_group": 4,
    "num_shared_experts": 1,
    "partial_rotary_factor": 0.5,
    "routed_scaling_factor": 2.5,
    "score_function": "sigmoid",
    "topk_group": 2,
    "use_qk_norm": True,
}

# Every size is a multiple of 64, MLX's default quantization group.
_TINY: dict[str, Config] = {
    "granitemoe": {
        "hidden_size": 256,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
    },
    "glm4_moe": {
        "head_dim": 64,
        "hidden_size": 256,
        "intermediate_size": 512,
        "moe_intermediate_size": 128,
        "n_group": 4,
        "n_routed_experts": 16,
        "num_attention_heads": 6,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "topk_group": 2,
    },
    "qwen2_moe": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "moe_intermediate_size": 128,
        "num_attention_heads": 4,
        "num_experts": 12,
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
        "shared_expert_intermediate_size": 512,
    },
    "bailing_moe": {
        **_LING_2,
        "hidden_size": 256,
        "intermediate_size": 512,
        "moe_intermediate_size": 128,
        "num_attention_heads": 4,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
    },
    "dbrx": {
        "attn_config": {**_DBRX["attn_config"], "kv_n_heads": 2},
        "d_model": 256,
        "ffn_config": {**_DBRX["ffn_config"], "ffn_hidden_size": 128, "moe_num_experts": 8, "moe_top_k": 2},
        "n_heads": 4,
        "n_layers": 2,
    },
}

_SMALL: dict[str, Config] = {
    "granitemoe": {
        "hidden_size": 512,
        "intermediate_size": 256,
        "num_attention_heads": 8,
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "num_local_experts": 32,
    },
    "glm4_moe": {
        "head_dim": 64,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "moe_intermediate_size": 256,
        "n_routed_experts": 32,
        "num_attention_heads": 12,
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
    },
    "qwen2_moe": {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "moe_intermediate_size": 256,
        "num_attention_heads": 8,
        "num_hidden_layers": 2,
        "num_key_value_heads": 8,
        "shared_expert_intermediate_size": 1024,
    },
    "bailing_moe": {
        "hidden_size": 512,
        "intermediate_size": 256,
        "moe_intermediate_size": 256,
        "num_attention_heads": 8,
        "num_experts": 32,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
    },
    "dbrx": {
        "attn_config": {**_DBRX["attn_config"], "kv_n_heads": 2},
        "d_model": 512,
        "ffn_config": {**_DBRX["ffn_config"], "ffn_hidden_size": 896},
        "n_heads": 8,
        "n_layers": 2,
    },
}

# Vocabularies that hold the byte alphabet and a few words.
_SHRUNKEN: dict[str, tuple[dict[str, Config], int]] = {"tiny": (_TINY, 512), "small": (_SMALL, 8192)}


def preset(family: str, size: str = "tiny") -> Config:
    """The content of a config.json.

    Args:
        family: one of :data:`FAMILIES`.
        size: ``"tiny"`` (about a million parameters, every feature of the family), ``"small"`` (tens of
            millions) or ``"layers=N"``: the real sizes with the first N layers of the real model
            (GLM's first layer is dense).

    Returns:
        A new dictionary.

    Raises:
        ValueError: no such family or size.
    """
    if family not in FAMILIES:
        refuse("preset", f"family must be one of {FAMILIES}", repr(family))
    real = _REAL[family]
    if size in _SHRUNKEN:
        changes, vocab = _SHRUNKEN[size]
        return copy.deepcopy({**real, **changes[family], "vocab_size": vocab})
    depth = layers_field(real)
    most = real[depth]
    count = size.removeprefix("layers=")
    if count == size or not count.isdecimal() or not 1 <= int(count) <= most:
        refuse("preset", f"size must be 'tiny', 'small' or 'layers=N' with N in 1..{most}", repr(size))
    return copy.deepcopy({**real, depth: int(count)})


def layers_field(config: Config) -> str:
    """What a configuration calls its number of layers."""
    return "n_layers" if "n_layers" in config else "num_hidden_layers"
