"""Tiny configurations of the five models. A row says why it is there.

Only settings that mlx-lm computes as the original does are rows; the others are in
test_models_differences.py. All sizes are multiples of 64, ``quant_predicate``'s quantization group.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moefast.models import FAMILIES

Config = dict[str, Any]

_GRANITE: Config = {
    "model_type": "granitemoe",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "attention_bias": False,
    "attention_multiplier": 0.4,
    "embedding_multiplier": 3.0,
    "logits_scaling": 3.0,
    "residual_multiplier": 1.3,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}

_GLM: Config = {
    "model_type": "glm4_moe",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 1,
    "attention_bias": True,
    "use_qk_norm": False,
    "partial_rotary_factor": 0.5,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}

_QWEN: Config = {
    "model_type": "qwen2_moe",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 12,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}

_BAILING: Config = {
    "model_type": "bailing_moe",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_shared_experts": 2,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "first_k_dense_replace": 0,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}

_DBRX: Config = {
    "model_type": "dbrx",
    "vocab_size": 128,
    "d_model": 64,
    "n_layers": 2,
    "n_heads": 4,
    "max_seq_len": 512,
    # Tight enough to clip a good part of the values of random weights.
    "attn_config": {"clip_qkv": 0.8, "kv_n_heads": 2, "rope_theta": 10000.0},
    "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
}

BASE = dict(zip(FAMILIES, (_GRANITE, _GLM, _QWEN, _BAILING, _DBRX), strict=True))

LING_2: Config = {
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "use_qk_norm": True,
    "partial_rotary_factor": 0.5,
    "num_shared_experts": 1,
    "moe_shared_expert_intermediate_size": 128,
}

_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


@dataclass(frozen=True)
class Case:
    """A configuration: what differs from the family's first row, and why it is tested."""

    family: str
    name: str
    why: str
    settings: Config = field(default_factory=dict)

    @property
    def config(self) -> Config:
        """The content of a config.json."""
        return {**BASE[self.family], **self.settings}

    def __str__(self) -> str:
        return f"{self.family}-{self.name}"


def _dbrx(section: str, **settings: Any) -> Config:
    return {section: {**_DBRX[section], **settings}}


CASES = (
    Case("granitemoe", "plain", "as released: tied embeddings, four multipliers, grouped queries"),
    Case(
        "granitemoe",
        "untied",
        "a head of its own, and biases in all four projections of the attention",
        {"tie_word_embeddings": False, "attention_bias": True},
    ),
    Case("granitemoe", "one_expert", "top 1: the softmax of a single logit", {"num_experts_per_tok": 1}),
    Case(
        "granitemoe",
        "all_experts",
        "nothing is left to choose",
        {"num_experts_per_tok": 8},
    ),
    Case("granitemoe", "linear", "positions divided", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    Case("granitemoe", "yarn", "stretched wavelengths, a factor on rotated values", {"rope_scaling": _YARN}),
    Case("granitemoe", "llama3", "long wavelengths stretched, short ones kept", {"rope_scaling": _LLAMA3}),
    Case(
        "granitemoe",
        "dynamic",
        "the base grows where the text outgrows the trained context",
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 32},
    ),
    Case("glm4_moe", "plain", "as GLM-4.5-Air: a dense layer, a selection bias, half of each head rotated"),
    Case(
        "glm4_moe",
        "groups",
        "groups of experts, qk norm, scaled weights",
        {"n_group": 4, "topk_group": 2, "use_qk_norm": True, "routed_scaling_factor": 2.5},
    ),
    Case(
        "glm4_moe",
        "all_groups",
        "groups of which none is dropped",
        {"n_group": 2, "topk_group": 2, "first_k_dense_replace": 0},
    ),
    Case(
        "glm4_moe",
        "raw_weights",
        "weights not renormalised; two shared experts; whole heads rotated; no biases",
        {
            "norm_topk_prob": False,
            "n_shared_experts": 2,
            "partial_rotary_factor": 1.0,
            "attention_bias": False,
            "routed_scaling_factor": 1.5,
        },
    ),
    Case(
        "glm4_moe",
        "one_expert",
        "top 1 is not renormalised; no shared expert",
        {"num_experts_per_tok": 1, "n_shared_experts": None},
    ),
    Case("glm4_moe", "dense", "no experts at all", {"n_routed_experts": None, "num_hidden_layers": 2}),
    Case("qwen2_moe", "plain", "as Qwen1.5-MoE: as many key-value heads, 12 experts are no power of two"),
    Case(
        "qwen2_moe",
        "grouped",
        "as Qwen2-57B: grouped queries; a shared expert wider than its inputs",
        {"num_key_value_heads": 2, "shared_expert_intermediate_size": 256},
    ),
    Case("qwen2_moe", "one_expert", "top 1 keeps its softmax weight", {"num_experts_per_tok": 1}),
    Case("qwen2_moe", "traditional", "mlx-lm's own setting: neighbours rotated", {"rope_traditional": True}),
    Case("bailing_moe", "plain", "as Ling-lite: softmax, two shared experts, no groups"),
    Case(
        "bailing_moe",
        "ling_2",
        "as Ling-2.0: sigmoid, bias, groups, qk norm, dense layer, half rotated",
        LING_2,
    ),
    Case(
        "bailing_moe",
        "raw_weights",
        "softmax with a selection bias and groups; weights not renormalised; qkv biases; no shared expert",
        {
            "norm_topk_prob": False,
            "moe_router_enable_expert_bias": True,
            "n_group": 2,
            "topk_group": 1,
            "use_qkv_bias": True,
            "num_shared_experts": 0,
        },
    ),
    Case(
        "bailing_moe",
        "tied",
        "tied embeddings; rotary_dim wins over the factor; the shared expert is switched off",
        {
            "tie_word_embeddings": True,
            "rotary_dim": 8,
            "partial_rotary_factor": 1.0,
            "moe_router_enable_shared_expert": False,
        },
    ),
    Case("bailing_moe", "norm_head", "columns of the head are normalised on loading", {"norm_head": True}),
    # No row with one expert per token: there mlx-lm's compiled combine crashes MLX's CPU.
    Case(
        "bailing_moe",
        "yarn",
        "DeepSeek's two factors on rotated values",
        {"rope_scaling": {**_YARN, "mscale": 1.2, "mscale_all_dim": 0.8, "beta_fast": 16}},
    ),
    Case("dbrx", "plain", "as released: clipped queries, keys and values"),
    Case("dbrx", "one_expert", "top 1: its normalised weight is 1", _dbrx("ffn_config", moe_top_k=1)),
    Case("dbrx", "heads", "as many key-value heads as query heads", _dbrx("attn_config", kv_n_heads=4)),
)

# One configuration a family, with everything the family can do: for tests that need no more.
FULL = tuple(
    next(case for case in CASES if (case.family, case.name) == pair)
    for pair in (
        ("granitemoe", "untied"),
        ("glm4_moe", "groups"),
        ("qwen2_moe", "grouped"),
        ("bailing_moe", "ling_2"),
        ("dbrx", "plain"),
    )
)


def sizes(config: Config) -> dict[str, int]:
    """What :func:`moefast.testing.assert_logits_close` asks: ``layers`` and ``hidden``."""
    return {
        "layers": config.get("num_hidden_layers") or config["n_layers"],
        "hidden": config.get("hidden_size") or config["d_model"],
    }
