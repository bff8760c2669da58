"""What each MoE family of mlx-lm computes when it routes, as a table: family -> RouterSpec."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from moefast import RouterSpec


@dataclass(frozen=True)
class Family:
    """One row.

    Attributes:
        name: module of ``mlx_lm.models``.
        letter: its class in the table of router families, A (selected logits) to G (no groups).
        spec: the constant fields of its RouterSpec.
        bias: it has a selection bias.
        groups: it knows groups of experts.
        expert_scale: it multiplies a weight by its expert's own factor.
        renormalize: ``flag``: as the configuration says; ``flag_above_one``: but never with one expert per
            token; or always so.
        scaled: it has a ``routed_scaling_factor``.
        float32_logits: its gate is a float32 product, whatever the model's dtype; weights are cast back.
        combine: dtype its weights are cast to before they multiply the outputs.
    """

    name: str
    letter: str
    spec: dict[str, Any] = field(default_factory=dict)
    bias: bool = False
    groups: bool = False
    expert_scale: bool = False
    renormalize: Literal["flag", "flag_above_one"] | bool = False
    scaled: bool = False
    float32_logits: bool = False
    combine: str | None = None

    def router(
        self,
        *,
        num_experts: int,
        top_k: int,
        num_groups: int = 1,
        top_groups: int = 1,
        renormalize: bool = True,
        scale: float = 1.0,
        dtype: str = "float32",
    ) -> RouterSpec:
        """The spec of a configuration of this family; ``dtype`` is the model's."""
        if self.renormalize is True or self.renormalize is False:
            renormalize = self.renormalize
        elif self.renormalize == "flag_above_one":
            renormalize = renormalize and top_k > 1
        return RouterSpec(
            num_experts=num_experts,
            top_k=top_k,
            num_groups=num_groups,
            top_groups=top_groups,
            renormalize=renormalize,
            scale=scale if self.scaled else 1.0,
            **({"weight_dtype": dtype} if self.float32_logits else {}),
            **self.spec,
        )


_SIGMOID = {"score": "sigmoid", "score_dtype": "float32"}
_SELECTED = {"score_over": "selected"}
_HIGHEST = {"ties": "highest"}
_EPS = {"renormalize_eps": 1e-20}
_CAST_BACK = {"weight_dtype": "logits"}
_MINUS_INF = {"dropped_fill": "-inf"}

# What DeepSeek-V3 and its many descendants have.
_V3: dict[str, Any] = {"bias": True, "groups": True, "renormalize": "flag_above_one", "scaled": True}

FAMILIES = (
    # A: the softmax of the selected logits, which is the softmax over all renormalised.
    Family("mixtral", "A", _SELECTED),
    Family("jamba", "A", _SELECTED),
    Family("phixtral", "A", _SELECTED),
    Family("gpt_oss", "A", _SELECTED | _HIGHEST),
    Family("granitemoe", "A", _SELECTED | _HIGHEST | {"score_dtype": "float32"}),
    # The hybrid takes a precise softmax where granitemoe casts: weights stay in the logits' dtype.
    Family("granitemoehybrid", "A", _SELECTED | _HIGHEST),
    # The plain softmax, in the model's dtype.
    Family("gemma4_text", "A", _SELECTED | _HIGHEST | {"precise": False}, expert_scale=True),
    # B: softmax over all, renormalised by flag.
    Family("qwen3_moe", "B", _HIGHEST, renormalize="flag"),
    Family("qwen3_next", "B", _HIGHEST, renormalize="flag"),
    Family("mellum", "B", _HIGHEST, renormalize="flag"),
    Family("olmoe", "B", renormalize="flag"),
    # C: softmax over all, never renormalised.
    Family("qwen2_moe", "C"),
    Family("deepseek", "C"),
    Family("hunyuan", "C", combine="float32"),
    # D: variants of softmax.
    Family("deepseek_v2", "D", {"group_score": "max", "weights_from": "masked"}, groups=True, scaled=True),
    Family("mistral4", "D", {"score_dtype": "float32"} | _EPS, groups=True, renormalize="flag", scaled=True),
    Family(
        "longcat_flash",
        "D",
        {"precise": False} | _HIGHEST | _EPS | _CAST_BACK,
        bias=True,
        renormalize="flag",
        scaled=True,
    ),
    Family(
        "ernie4_5_moe",
        "D",
        {"score_dtype": "float32", "renormalize_eps": 1e-12, "eps_form": "max"},
        renormalize=True,
    ),
    # An L1 norm of positive scores is their sum.
    Family("dbrx", "D", {"score_dtype": "float32"} | _CAST_BACK, renormalize=True),
    # E: float32 sigmoid, selection bias, dropped groups filled with 0.
    Family("deepseek_v3", "E", _SIGMOID, **_V3),
    Family("deepseek_v32", "E", _SIGMOID, **_V3),
    Family("glm4_moe", "E", _SIGMOID, **_V3),
    Family("dots1", "E", _SIGMOID, **_V3),
    Family("afmoe", "E", _SIGMOID, **_V3),
    Family("glm4_moe_lite", "E", _SIGMOID | _EPS, **_V3),
    Family("exaone_moe", "E", _SIGMOID | _EPS, **_V3),
    Family("mimo_v2_flash", "E", _SIGMOID | _EPS, **_V3),
    Family("nemotron_h", "E", _SIGMOID | _EPS, **_V3),
    Family("bailing_moe_linear", "E", _SIGMOID | _CAST_BACK, **_V3),
    Family("bailing_moe", "E", _SIGMOID | _EPS | _CAST_BACK | _HIGHEST, **_V3),
    Family("kimi_k3", "E", _SIGMOID | _EPS | _CAST_BACK, **_V3),
    # Scores, keys and weights in the model's dtype; the bias is rounded to it.
    Family("kimi_linear", "E", {"score": "sigmoid", "bias_dtype": "scores"} | _EPS, **_V3),
    # F: dropped groups filled with -inf.
    Family("bailing_hybrid", "F", _SIGMOID | _EPS | _CAST_BACK | _MINUS_INF, **_V3),
    Family("bailing_moe_v3", "F", _SIGMOID | _EPS | _MINUS_INF, **_V3 | {"renormalize": True}),
    # G: sigmoid and bias, no groups.
    Family("minimax", "G", _SIGMOID | _EPS, bias=True, renormalize=True, float32_logits=True),
    Family("minimax_m3_vl", "G", _SIGMOID | _EPS | _CAST_BACK, bias=True, renormalize=True, scaled=True),
    Family("step3p5", "G", _SIGMOID | _EPS, bias=True, renormalize="flag", scaled=True),
    Family("Klear", "G", _SIGMOID | _CAST_BACK, bias=True, renormalize="flag"),
    # The sigmoid in the model's dtype, the key in float32.
    Family(
        "lfm2_moe",
        "G",
        {"score": "sigmoid", "bias_dtype": "float32", "renormalize_eps": 1e-6} | _HIGHEST | _CAST_BACK,
        bias=True,
        renormalize="flag",
        scaled=True,
    ),
    # The scale multiplies the combined output.
    Family(
        "laguna",
        "G",
        _SIGMOID | {"softcap": 30.0, "scale_place": "output"},
        bias=True,
        renormalize=True,
        scaled=True,
    ),
    Family(
        "deepseek_v41",
        "G",
        {"score": "sqrtsoftplus", "score_dtype": "float32", "temperature": 1.5} | _EPS,
        bias=True,
        renormalize="flag_above_one",
        scaled=True,
    ),
)

BY_NAME = {family.name: family for family in FAMILIES}
