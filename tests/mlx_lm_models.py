"""Tiny models of every MoE family of mlx-lm, with random weights.

All have eight experts, three per token, and where the family knows groups of experts two of four stay. Inner
sizes are multiples of 64, so that every projection can be quantized in groups of 64.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

EXPERTS, TOP_K, GROUPS, KEPT_GROUPS = 8, 3, 4, 2
HIDDEN, WIDTH, VOCABULARY = 64, 128, 128

# Under every name that families have for them; mlx-lm drops what a family does not know.
_MLA = {
    "kv_lora_rank": 64,
    "q_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "qk_nope_head_dim": 16,
}
_SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 1000,
    "rope_theta": 10000.0,
    "num_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "moe_intermediate_size": WIDTH,
    "n_group": GROUPS,
    "topk_group": KEPT_GROUPS,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "num_shared_experts": 1,
    "n_shared_experts": 1,
    "shared_expert_intermediate_size": WIDTH,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "use_bias": False,
    "rope_scaling": None,
}


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """A model.

    Attributes:
        module: of ``mlx_lm.models``.
        variant: what sets it apart from others of the module.
        config: what deviates from the sizes above.
        text: what deviates within the ``text_config`` of a wrapper.
        report: what ``accelerate`` has to say: what it did -> how often.
        why_not: why it does not run on a CPU.
        layers: of the model.
    """

    module: str
    variant: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, Any] | None = None
    report: Mapping[str, int] = field(default_factory=lambda: {"block": 1})
    why_not: str | None = None
    layers: int = 2

    def __str__(self) -> str:
        return f"{self.module}-{self.variant}" if self.variant else self.module


_LINEAR_ATTENTION = {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 3,
    "full_attention_interval": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "head_dim": 32,
    "partial_rotary_factor": 0.5,
}
_QWEN3 = {"decoder_sparse_step": 1, "mlp_only_layers": [0], "head_dim": 32}
_BOTH = {"block": 2}
_SLIDING = ["sliding_attention", "full_attention"]
_BAILING = {
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "layer_group_size": 2,
    "group_norm_size": 1,
    "head_dim": 32,
}
_INDEXER = {"index_head_dim": 32, "index_n_heads": 2, "index_topk": 12}
_KIMI = {
    "num_experts_per_token": TOP_K,
    "num_expert_group": GROUPS,
    "linear_attn_config": {
        "num_heads": 2,
        "head_dim": 32,
        "kda_layers": [1],
        "full_attn_layers": [2],
        "short_conv_kernel_size": 4,
    },
    "head_dim": 32,
    "model_max_length": 1000,
}
_GEMMA4 = {
    "enable_moe_block": True,
    "top_k_experts": TOP_K,
    "head_dim": 32,
    "global_head_dim": 32,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
    "sliding_window": 8,
    "layer_types": _SLIDING,
    "tie_word_embeddings": True,
}
_NEMOTRON = {
    "hybrid_override_pattern": ["*", "E", "M", "E"],
    "num_hidden_layers": 4,
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "mamba_proj_bias": False,
    "ssm_state_size": 32,
    "conv_kernel": 3,
    "n_groups": 2,
    "time_step_limit": [0.0, 0.5],
    "mlp_bias": False,
    "layer_norm_epsilon": 1e-5,
    "use_conv_bias": True,
    "moe_shared_expert_intermediate_size": WIDTH,
}
_LAGUNA = {
    "head_dim": 32,
    "sliding_window": 8,
    "moe_routed_scaling_factor": 2.5,
    "layer_types": ["full_attention", "sliding_attention"],
    "mlp_layer_types": ["dense", "sparse"],
    "num_attention_heads_per_layer": [4, 4],
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 500000.0, "partial_rotary_factor": 0.5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
    },
}
_V41 = {
    # Not a multiple of 32, which would be rounded to eight bits: a last digit becomes a jump.
    "head_dim": 48,
    "num_attention_heads": 8,
    "qk_rope_head_dim": 16,
    "q_lora_rank": 64,
    "o_groups": 2,
    "o_lora_rank": 64,
    "sliding_window": 16,
    "hc_mult": 2,
    "hc_sinkhorn_iters": 5,
    "swiglu_limit": 1.0,
    "gate_temp": 1.5,
}
_ROPE = {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default", "type": "default"}}
_MISTRAL4 = {
    **_MLA,
    "rope_parameters": {
        "rope_theta": 10000.0,
        "type": "yarn",
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 256,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "beta_fast": 32,
        "beta_slow": 1,
        "llama_4_scaling_beta": 0.1,
    },
}
_YARN = {
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
    }
}
_LONGCAT = {
    **_MLA,
    "attention_method": "MLA",
    "zero_expert_type": "identity",
    "ffn_hidden_size": WIDTH,
    "moe_topk": TOP_K,
    "expert_ffn_hidden_size": WIDTH,
    "zero_expert_num": 4,
    "num_layers": 2,
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
}

MODELS: tuple[Tiny, ...] = (
    Tiny(module="Klear", config={"decoder_sparse_step": 1, "mlp_only_layers": [0]}),
    Tiny(
        module="afmoe",
        config={"layer_types": _SLIDING, "num_dense_layers": 1, "head_dim": 32, "sliding_window": 8},
    ),
    Tiny(
        module="afmoe",
        variant="softmax",
        config={
            "layer_types": _SLIDING,
            "num_dense_layers": 1,
            "head_dim": 32,
            "score_func": "softmax",
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    Tiny(module="bailing_hybrid", config={**_MLA, **_BAILING}),
    Tiny(module="bailing_moe", config=_BAILING),
    Tiny(
        module="bailing_moe",
        variant="softmax",
        config={"score_function": "softmax", "n_group": 1, "topk_group": 1, "norm_topk_prob": False},
    ),
    Tiny(module="bailing_moe_linear", config={**_BAILING, "num_key_value_heads": 4}),
    Tiny(
        module="bailing_moe_v3",
        config={
            **_MLA,
            "model_type": "bailing_hybrid",
            "head_dim": 32,
            "layer_group_size": 2,
            "moe_shared_expert_intermediate_size": WIDTH,
        },
    ),
    Tiny(
        module="dbrx",
        config={
            "d_model": HIDDEN,
            "n_layers": 2,
            "n_heads": 4,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": WIDTH, "moe_num_experts": EXPERTS, "moe_top_k": TOP_K},
        },
        report=_BOTH,
    ),
    Tiny(module="deepseek", config={"num_key_value_heads": 4}),
    Tiny(module="deepseek_v2", config={**_MLA, **_YARN, "topk_method": "group_limited_greedy"}),
    Tiny(module="deepseek_v2", variant="greedy", config={**_MLA, **_YARN, "topk_method": "greedy"}),
    Tiny(module="deepseek_v3", config=_MLA),
    Tiny(
        module="deepseek_v3",
        variant="one_group",
        config={**_MLA, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1},
    ),
    Tiny(module="deepseek_v32", config={**_MLA, **_INDEXER}),
    Tiny(module="deepseek_v41", config=_V41, report=_BOTH),
    Tiny(
        module="deepseek_v41",
        variant="sigmoid",
        config={**_V41, "scoring_func": "sigmoid", "swiglu_limit": 0.0},
        report=_BOTH,
    ),
    Tiny(module="dots1"),
    Tiny(
        module="ernie4_5_moe",
        config={
            "moe_num_experts": EXPERTS,
            "moe_k": TOP_K,
            "moe_layer_start_index": 1,
            "moe_num_shared_experts": 1,
            "moe_gate_act": "sigmoid",
        },
    ),
    Tiny(
        module="ernie4_5_moe",
        variant="softmax",
        config={"moe_num_experts": EXPERTS, "moe_k": TOP_K, "moe_layer_start_index": 1, "use_bias": True},
    ),
    Tiny(
        module="exaone_moe",
        config={
            "head_dim": 32,
            "sliding_window": 8,
            "layer_types": _SLIDING,
            "is_moe_layer": [False, True],
        },
    ),
    Tiny(module="gemma4", text=_GEMMA4, report={"router": 2, "experts": 2}),
    Tiny(module="gemma4_text", config=_GEMMA4, report={"router": 2, "experts": 2}),
    Tiny(module="glm4_moe", config={"head_dim": 32, "use_qk_norm": True, "partial_rotary_factor": 0.5}),
    Tiny(module="glm4_moe_lite", config={**_MLA, "num_key_value_heads": 4}),
    Tiny(
        module="glm_moe_dsa",
        config={
            **_MLA,
            **_INDEXER,
            **_ROPE,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "moe_layer_freq": 1,
        },
    ),
    Tiny(module="gpt_oss", config={"head_dim": 32, "sliding_window": 8}, report=_BOTH),
    Tiny(
        module="granitemoe",
        config={
            "logits_scaling": 1.0,
            "attention_multiplier": 0.25,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
        },
        report=_BOTH,
    ),
    Tiny(
        module="granitemoehybrid",
        config={
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.25,
            "logits_scaling": 1.0,
            "residual_multiplier": 0.22,
            "layer_types": ["mamba", "attention"],
            "shared_intermediate_size": WIDTH,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_proj_bias": False,
            "mamba_d_state": 32,
            "mamba_d_conv": 4,
            "mamba_n_groups": 1,
            "mamba_conv_bias": False,
        },
        report=_BOTH,
    ),
    Tiny(
        module="hunyuan",
        config={
            "moe_topk": [TOP_K, 2],  # another number in each layer
            "num_shared_expert": [1, 1],
            "use_mixed_mlp_moe": True,
            "use_qk_norm": True,
            "use_cla": True,
            "cla_share_factor": 2,
            "rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"},
        },
        report=_BOTH,
    ),
    Tiny(
        module="hunyuan",
        variant="no_shared",
        config={
            "moe_topk": TOP_K,
            "num_shared_expert": 1,
            "use_mixed_mlp_moe": False,
            "use_qk_norm": False,
            "use_cla": False,
            "cla_share_factor": 2,
            "rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"},
        },
        report=_BOTH,
    ),
    Tiny(
        module="jamba",
        config={
            "attn_layer_offset": 1,
            "attn_layer_period": 2,
            "expert_layer_offset": 1,
            "expert_layer_period": 2,
            "mamba_d_conv": 4,
            "mamba_d_state": 16,
            "mamba_expand": 2,
        },
    ),
    Tiny(module="kimi_k25", text=_MLA),
    Tiny(
        module="kimi_k3",
        text={
            **_MLA,
            **_KIMI,
            "routed_expert_hidden_size": 64,
            "latent_moe_use_norm": True,
            "activation_situ_beta": 1.5,
            "activation_situ_linear_beta": 2.0,
        },
    ),
    Tiny(module="kimi_k3", variant="no_latent", text={**_MLA, **_KIMI, "num_shared_experts": 0}),
    Tiny(module="kimi_linear", config={**_MLA, **_KIMI}),
    Tiny(
        module="kimi_linear",
        variant="softmax",
        config={
            **_MLA,
            **_KIMI,
            "moe_router_activation_func": "softmax",
            "num_expert_group": 1,
            "topk_group": 1,
        },
    ),
    Tiny(module="kimi_vl", text=_MLA),
    Tiny(module="laguna", config=_LAGUNA),
    Tiny(
        module="laguna",
        variant="softcap",
        config={
            **_LAGUNA,
            "moe_router_score_func": "sqrtsoftplus",
            "moe_router_logit_softcapping": 2.0,
        },
    ),
    Tiny(
        module="lfm2_moe",
        config={
            "num_dense_layers": 1,
            "use_expert_bias": True,
            "norm_eps": 1e-5,
            "conv_bias": True,
            "conv_L_cache": 3,
            "full_attn_idxs": [1],
        },
    ),
    Tiny(
        module="lfm2_moe",
        variant="no_bias",
        config={
            "num_dense_layers": 1,
            "use_expert_bias": False,
            "norm_eps": 1e-5,
            "conv_bias": False,
            "conv_L_cache": 3,
            "full_attn_idxs": [1],
            "norm_topk_prob": False,
        },
    ),
    Tiny(
        module="llama4",
        text={
            "attention_chunk_size": 8,
            "head_dim": 16,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": WIDTH,
            "model_type": "llama4",
            "num_experts_per_tok": 1,
            "use_qk_norm": True,
            "num_hidden_layers": 4,
        },
        report={"experts": 2},
        layers=4,
    ),
    Tiny(module="longcat_flash", config=_LONGCAT, report=_BOTH),
    Tiny(
        module="longcat_flash_ngram",
        config={**_LONGCAT, "ngram_vocab_size_ratio": 2, "emb_neighbor_num": 3, "emb_split_num": 2},
        report=_BOTH,
    ),
    Tiny(
        module="mellum",
        config={
            "head_dim": 16,
            "sliding_window": 8,
            "layer_types": _SLIDING,
            "rope_parameters": {
                "full_attention": {"rope_theta": 500000.0, "rope_type": "default"},
                "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
            },
        },
        report=_BOTH,
    ),
    Tiny(
        module="mimo_v2_flash",
        config={
            "hybrid_layer_pattern": [0, 1],
            "moe_layer_freq": [0, 1],
            "add_swa_attention_sink_bias": True,
            "add_full_attention_sink_bias": False,
            "sliding_window_size": 8,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "layernorm_epsilon": 1e-5,
            "swa_rope_theta": 1000.0,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "head_dim": 32,
            "v_head_dim": 16,
            "swa_head_dim": 32,
            "swa_v_head_dim": 16,
            "partial_rotary_factor": 0.5,
        },
    ),
    Tiny(module="minimax", config={"rotary_dim": 8, "shared_intermediate_size": WIDTH}, report=_BOTH),
    Tiny(
        module="minimax_m3_vl",
        text={
            "head_dim": 16,
            "dense_intermediate_size": WIDTH,
            "shared_intermediate_size": WIDTH,
            "mlp_layer_types": ["dense", "sparse"],
            "swiglu_limit": 1.0,  # so low that it limits
        },
    ),
    Tiny(module="mistral3", text={**_MISTRAL4, "model_type": "mistral4"}),
    Tiny(module="mistral4", config=_MISTRAL4),
    Tiny(module="mixtral", report=_BOTH),
    Tiny(
        module="muse_spark",
        text={
            "head_dim": 16,
            "post_norm_eps": 1e-5,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
            "layer_rope_theta": [10000.0, 10000.0],
            "layer_types": ["full_attention", "full_attention"],
            "sliding_window": 8,
            "final_logit_softcapping": 30.0,
            "output_multiplier": 1.0,
            "moe_hidden_size": 64,
            "num_shared_experts": 0,
            "num_experts_per_tok": TOP_K,
        },
        report={"experts": 2},
        why_not="its router and its combine are Metal kernels of mlx-lm's own",
    ),
    Tiny(module="nemotron_h", config=_NEMOTRON, report=_BOTH, layers=4),
    Tiny(
        module="nemotron_h",
        variant="latent",
        config={**_NEMOTRON, "moe_latent_size": 64},
        report=_BOTH,
        layers=4,
    ),
    Tiny(module="olmoe", report=_BOTH),
    Tiny(
        module="phimoe",
        config={
            "num_experts_per_tok": 2,
            "rope_scaling": {
                "long_factor": [1.0] * 8,
                "long_mscale": 1.2,
                "original_max_position_embeddings": 4096,
                "short_factor": [1.0] * 8,
                "short_mscale": 1.2,
                "type": "longrope",
            },
        },
        report={"experts": 2},
    ),
    Tiny(
        module="phixtral",
        config={
            "num_vocab": VOCABULARY,
            "model_dim": HIDDEN,
            "num_heads": 4,
            "num_layers": 2,
            "rotary_dim": 8,
        },
        report=_BOTH,
    ),
    Tiny(module="qwen2_moe", report=_BOTH),
    Tiny(module="qwen3_5", text={**_LINEAR_ATTENTION, **_ROPE}, report=_BOTH),
    Tiny(module="qwen3_5_moe", text={**_LINEAR_ATTENTION, **_ROPE}, report=_BOTH),
    Tiny(module="qwen3_moe", config=_QWEN3),
    Tiny(module="qwen3_moe", variant="not_renormalized", config={**_QWEN3, "norm_topk_prob": False}),
    Tiny(module="qwen3_next", config=_LINEAR_ATTENTION, report=_BOTH),
    Tiny(module="qwen3_vl_moe", text=_QWEN3),
    Tiny(module="solar_open", config={"head_dim": 32, "partial_rotary_factor": 1.0}),
    Tiny(
        module="step3p5",
        config={
            "num_attention_groups": 2,
            "head_dim": 32,
            "sliding_window": 8,
            "layer_types": ["full_attention", "sliding_attention"],
            "rope_theta": [10000.0, 10000.0],
            "partial_rotary_factors": [0.5, 1.0],
            "attention_other_setting": {"num_attention_heads": 4, "num_attention_groups": 2},
            "moe_num_experts": EXPERTS,
            "moe_top_k": TOP_K,
            "share_expert_dim": WIDTH,
            "moe_layers_enum": "1",
            "swiglu_limits": [0.0, 1.0],
            "swiglu_limits_shared": [0.0, 0.5],
        },
    ),
)

RUNNING = tuple(tiny for tiny in MODELS if tiny.why_not is None)


def config_of(tiny: Tiny) -> dict[str, Any]:
    """Its config.json."""
    if tiny.text is None:
        return {"model_type": tiny.module, **_SIZES, **tiny.config}
    text = {"model_type": tiny.module, **_SIZES, **tiny.text}
    return {"model_type": tiny.module, "vocab_size": VOCABULARY, "text_config": text}


def build(tiny: Tiny, *, bits: int | None = None, dtype: mx.Dtype = mx.float32, seed: int = 0) -> nn.Module:
    """The model, cast and quantized as ``mlx_lm.convert`` does, in evaluation mode."""
    module = importlib.import_module(f"mlx_lm.models.{tiny.module}")
    model: nn.Module = module.Model(module.ModelArgs.from_dict(config_of(tiny)))
    model.load_weights(list(_random_weights(model, seed).items()), strict=True)
    return finish(model, bits=bits, dtype=dtype)


def finish(model: nn.Module, *, bits: int | None, dtype: mx.Dtype) -> nn.Module:
    """Cast, then quantize."""
    follows = getattr(model, "cast_predicate", lambda path: True)
    cast = [(k, v.astype(dtype)) for k, v in parameters(model).items() if follows(k) and v.dtype != mx.uint32]
    model.load_weights(cast, strict=False)
    if bits is not None:
        predicate = getattr(model, "quant_predicate", lambda path, layer: True)

        def of_layer(path: str, layer: nn.Module) -> bool | dict[str, Any]:
            fits = hasattr(layer, "to_quantized") and layer.weight.shape[-1] % 64 == 0
            wanted: bool | dict[str, Any] = fits and predicate(path, layer)
            return wanted

        nn.quantize(model, group_size=64, bits=bits, class_predicate=of_layer)
    mx.eval(model.parameters())
    return model.eval()


def parameters(model: nn.Module) -> dict[str, mx.array]:
    """All parameters by path."""
    return dict(tree_flatten(model.parameters()))


def _random_weights(model: nn.Module, seed: int) -> dict[str, mx.array]:
    """Matrices that keep the size of their input; norms and per-expert factors near 1; selection and other
    biases large enough to matter."""
    rng = np.random.default_rng(seed)
    weights = {}
    for path, value in sorted(parameters(model).items()):
        normal = rng.standard_normal(value.shape).astype(np.float32)
        if path.endswith(("bias", "sinks")):
            normal *= 0.2
        elif value.ndim == 1:
            normal = 1 + 0.1 * normal
        elif "embed_q" in path:  # used both ways round
            normal *= max(value.shape[-2:]) ** -0.5
        elif "embed" not in path and "wte" not in path:
            normal *= value.shape[-1] ** -0.5
        weights[path] = mx.array(normal).astype(value.dtype)
    return weights


def tokens(*shape: int, seed: int = 1) -> mx.array:
    """Random token ids of the vocabulary all models share."""
    return mx.array(np.random.default_rng(seed).integers(0, VOCABULARY, shape))
