"""How mlx-lm's MoE blocks are put together: one row per class of block, read by :mod:`moefast.acceleration`.

A row says where a block keeps its parts, which of its attributes say what of the routing, and what its
family fixes. What follows from a row is done in one place for all of them. The routing itself is explained
where it is implemented: :mod:`moefast.backends.reference.route`.

Rows are facts about mlx-lm's code, and hold for that code only: ``code`` names what they were read from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True, eq=False)
class Either:
    """An attribute whose value is another word for that of a RouterSpec field.

    Attributes:
        path: of the attribute.
        words: its value -> the field's.
        otherwise: the field's for any other value; None refuses it.
    """

    path: str
    words: Mapping[str, str]
    otherwise: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """One class of block. Paths are attribute names within the block, dotted.

    Attributes:
        module, name: the class: ``mlx_lm.models.<module>.<name>``.
        letter: its router's class, A (softmax of the selected logits) to H (none of the others).
        router: class of its router module, which is looked into instead of being called; None where the
            block itself routes.
        logits: path of the linear layer that gives the logits, or of a bare matrix ``[num_experts, hidden]``.
        float32_input: ``x`` and that matrix are cast to float32 first: "both"; or ``x`` alone.
        bias: path of the selection bias.
        bias_where: path of the flag without which there is none; by default it is there, or None.
        spec: RouterSpec fields that the family fixes. ``weight_dtype="x"`` is the dtype of the block's input.
        reads: RouterSpec field -> path of the attribute that says it.
        groups_where: path and value of the attribute without which groups do not count.
        renormalize: as the attribute at ``reads["renormalize"]`` says (``flag``), the same but never with one
            expert per token (``flag_above_one``), or always, or never.
        experts: path of the stacked experts.
        shared: path of the expert that sees every token.
        shared_class: the class of which it is ``down(activation(gate(x), up(x)))``, so that it may be fused;
            any other is called.
        shared_gate: path of the layer whose sigmoid multiplies its output.
        mix: path of the layer with two outputs, whose softmax weighs the routed and the shared output.
        latent: paths of the layers before and behind the routed experts (and of a norm between), each of
            which a configuration may lack.
        combine: dtype the weights are cast to before they multiply.
        promotes: the sum is not cast back: a router in a wider dtype than the experts widens the output.
        sum_float32: routed and shared outputs are added in float32, then rounded once.
        identity_attribute: path of the number of experts that return their input.
        whole_when_sharded: shards of it run the original.
        code: what else, beside the ``__call__`` of the classes named above, the row was read from.
    """

    module: str
    name: str
    letter: str
    router: str | None = None
    logits: str = "gate"
    float32_input: Literal["no", "x", "both"] = "no"
    bias: str | None = None
    bias_where: str | None = None
    spec: Mapping[str, Any] = field(default_factory=dict)
    reads: Mapping[str, str | Either] = field(default_factory=dict)
    groups_where: tuple[str, str] | None = None
    renormalize: Literal["flag", "flag_above_one"] | bool = False
    experts: str = "switch_mlp"
    shared: str | None = None
    shared_class: str | None = None
    shared_gate: str | None = None
    mix: str | None = None
    latent: tuple[str, str | None, str] | None = None
    combine: str | None = None
    promotes: bool = False
    sum_float32: bool = False
    identity_attribute: str | None = None
    whole_when_sharded: bool = False
    code: tuple[str, ...] = ()

    @property
    def sources(self) -> tuple[str, ...]:
        """What the row was read from, as ``module.function`` and ``module.Class.function``."""
        calls = [f"{kind}.__call__" for kind in (self.name, self.router) if kind is not None]
        return tuple(f"{self.module}.{name}" for name in (*calls, *self.code))

    def __reduce__(self) -> tuple[Any, ...]:
        return _row, (self.module, self.name)


def _row(module: str, name: str) -> Block:
    """A row by its class, for what has been pickled or copied: rows are compared by identity."""
    return next(row for row in BLOCKS if (row.module, row.name) == (module, name))


_SIGMOID = {"score": "sigmoid", "score_dtype": "float32"}
_FLOAT32_SOFTMAX = {"score": "softmax", "score_dtype": "float32"}
_SELECTED = {"score_over": "selected"}
_HIGHEST = {"ties": "highest"}
_EPS = {"renormalize_eps": 1e-20}
_CAST_BACK = {"weight_dtype": "logits"}

# Attributes of the router modules of DeepSeek's line.
_GATE_READS: dict[str, str | Either] = {
    "top_k": "gate.top_k",
    "num_groups": "gate.n_group",
    "top_groups": "gate.topk_group",
    "renormalize": "gate.norm_topk_prob",
    "scale": "gate.routed_scaling_factor",
}
_BAILING_SCORE = Either(path="gate.score_function", words={"sigmoid": "sigmoid"}, otherwise="softmax")


def _v3(module: str, name: str, shared_class: str | None, **other: Any) -> Block:
    """What DeepSeek-V3 and its descendants have: float32 sigmoid, selection bias, groups, shared expert."""
    row: dict[str, Any] = {
        "router": "MoEGate",
        "logits": "gate.weight",
        "bias": "gate.e_score_correction_bias",
        "spec": _SIGMOID,
        "reads": _GATE_READS,
        "renormalize": "flag_above_one",
        "shared": "shared_experts",
        "code": ("group_expert_select",),
    }
    return Block(module=module, name=name, letter="E", shared_class=shared_class, **(row | other))


BLOCKS: tuple[Block, ...] = (
    # A: the softmax of the selected logits.
    Block(
        module="mixtral",
        name="MixtralSparseMoeBlock",
        letter="A",
        spec=_SELECTED,
        reads={"top_k": "num_experts_per_tok"},
        promotes=True,
    ),
    Block(
        module="jamba",
        name="JambaSparseMoeBlock",
        letter="A",
        logits="router",
        spec=_SELECTED,
        reads={"top_k": "num_experts_per_tok"},
        promotes=True,
    ),
    Block(
        module="phixtral",
        name="MOE",
        letter="A",
        spec=_SELECTED,
        reads={"top_k": "num_experts_per_tok"},
        promotes=True,
    ),
    Block(
        module="gpt_oss",
        name="MLPBlock",
        letter="A",
        logits="router",
        spec=_SELECTED | _HIGHEST,
        reads={"top_k": "num_experts_per_tok"},
        experts="experts",
        promotes=True,
        code=("mlx_topk",),
    ),
    Block(
        module="granitemoe",
        name="GraniteMoeMoE",
        letter="A",
        router="GraniteMoeTopKGating",
        logits="router.layer",
        spec=_SELECTED | _HIGHEST | {"score_dtype": "float32"},
        reads={"top_k": "router.top_k"},
    ),
    Block(
        module="granitemoehybrid",
        name="GraniteMoeHybridMoE",
        letter="A",
        router="GraniteMoeHybridTopKGating",
        logits="router.layer",
        spec=_SELECTED | _HIGHEST,
        reads={"top_k": "router.top_k"},
        promotes=True,
    ),
    # B: softmax over all, renormalised by flag.
    Block(
        module="qwen3_moe",
        name="Qwen3MoeSparseMoeBlock",
        letter="B",
        spec=_HIGHEST,
        reads={"top_k": "top_k", "renormalize": "norm_topk_prob"},
        renormalize="flag",
    ),
    Block(
        module="qwen3_next",
        name="Qwen3NextSparseMoeBlock",
        letter="B",
        spec=_HIGHEST,
        reads={"top_k": "top_k", "renormalize": "norm_topk_prob"},
        renormalize="flag",
        shared="shared_expert",
        shared_class="qwen3_next.Qwen3NextMLP",
        shared_gate="shared_expert_gate",
        promotes=True,
    ),
    Block(
        module="mellum",
        name="MellumSparseMoeBlock",
        letter="B",
        spec=_HIGHEST,
        reads={"top_k": "top_k", "renormalize": "norm_topk_prob"},
        renormalize="flag",
        promotes=True,
    ),
    Block(
        module="olmoe",
        name="OlmoeSparseMoeBlock",
        letter="B",
        reads={"top_k": "top_k", "renormalize": "norm_topk_prob"},
        renormalize="flag",
        promotes=True,
    ),
    # C: softmax over all, weights as they are.
    Block(
        module="qwen2_moe",
        name="Qwen2MoeSparseMoeBlock",
        letter="C",
        reads={"top_k": "top_k"},
        shared="shared_expert",
        shared_class="qwen2_moe.MLP",
        shared_gate="shared_expert_gate",
        promotes=True,
    ),
    Block(
        module="deepseek",
        name="DeepseekMoE",
        letter="C",
        router="MoEGate",
        logits="gate.weight",
        reads={"top_k": "gate.top_k"},
        shared="shared_experts",
        shared_class="deepseek.DeepseekMLP",
        promotes=True,
    ),
    Block(
        module="hunyuan",
        name="MoeBlock",
        letter="C",
        router="Gate",
        logits="gate.wg",
        reads={"top_k": "top_k"},
        shared="shared_mlp",
        shared_class="hunyuan.MLP",
        combine="float32",
    ),
    # D: variants of softmax.
    Block(
        module="deepseek_v2",
        name="DeepseekV2MoE",
        letter="D",
        router="MoEGate",
        logits="gate.weight",
        spec={"group_score": "max", "weights_from": "masked"},
        reads={k: v for k, v in _GATE_READS.items() if k != "renormalize"},
        groups_where=("gate.topk_method", "group_limited_greedy"),
        shared="shared_experts",
        shared_class="deepseek_v2.DeepseekV2MLP",
        promotes=True,
    ),
    Block(
        module="mistral4",
        name="Mistral4MoE",
        letter="D",
        spec=_FLOAT32_SOFTMAX | _EPS,
        reads={
            "top_k": "num_experts_per_tok",
            "num_groups": "args.n_group",
            "top_groups": "args.topk_group",
            "renormalize": "args.norm_topk_prob",
            "scale": "args.routed_scaling_factor",
        },
        renormalize="flag",
        shared="shared_experts",
        shared_class="deepseek_v3.DeepseekV3MLP",
        code=("mistral4_expert_select",),
    ),
    Block(
        module="longcat_flash",
        name="LongcatFlashMoE",
        letter="D",
        router="LongcatFlashTopkRouter",
        logits="router.classifier",
        bias="router.e_score_correction_bias",
        spec={"precise": False} | _HIGHEST | _EPS | {"weight_dtype": "x"},
        reads={
            "top_k": "router.top_k",
            "renormalize": "router.norm_topk_prob",
            "scale": "router.routed_scaling_factor",
        },
        renormalize="flag",
        identity_attribute="zero_expert_num",
        whole_when_sharded=True,  # the identity's share must not be summed once per rank
    ),
    Block(
        module="ernie4_5_moe",
        name="Ernie4_5_MoeMLP",
        letter="D",
        spec={"score_dtype": "float32", "renormalize_eps": 1e-12, "eps_form": "max"},
        reads={
            "top_k": "k",
            "score": Either(
                path="gate_act.__class__.__name__", words={"Softmax": "softmax", "Sigmoid": "sigmoid"}
            ),
        },
        renormalize=True,
        shared="shared_experts",
        shared_class="ernie4_5_moe.Ernie4_5_MLP",
    ),
    # E: float32 sigmoid, selection bias, dropped groups filled with 0.
    _v3("deepseek_v3", "DeepseekV3MoE", "deepseek_v3.DeepseekV3MLP"),
    _v3("deepseek_v32", "DeepseekV32MoE", "deepseek_v32.DeepseekV32MLP"),
    _v3("glm4_moe", "MoE", "glm4_moe.MLP"),
    _v3("dots1", "Dots1MoE", "dots1.Dots1MLP", router="Dots1TopkRouter", experts="experts"),
    _v3(
        "afmoe",
        "AfmoeMoE",
        "afmoe.MLP",
        router="MoERouter",
        logits="router.gate",
        bias="expert_bias",
        reads={
            "top_k": "num_experts_per_tok",
            "num_groups": "n_group",
            "top_groups": "topk_group",
            "renormalize": "route_norm",
            "scale": "route_scale",
            "score": Either(path="score_func", words={"sigmoid": "sigmoid"}, otherwise="softmax"),
        },
        spec={"score_dtype": "float32"},
        experts="experts",
        code=(),
    ),
    _v3("glm4_moe_lite", "Glm4MoeLiteMoE", "glm4_moe_lite.Glm4MoeLiteMLP", spec=_SIGMOID | _EPS),
    _v3("exaone_moe", "MoE", "exaone_moe.MLP", spec=_SIGMOID | _EPS),
    _v3("mimo_v2_flash", "MoE", "mimo_v2_flash.MLP", spec=_SIGMOID | _EPS),
    _v3(
        "nemotron_h",
        "NemotronHMoE",
        None,
        spec=_SIGMOID | _EPS,
        latent=("fc1_latent_proj", None, "fc2_latent_proj"),
    ),
    _v3(
        "bailing_moe_linear",
        "SparseMoeBlock",
        "bailing_moe_linear.MLP",
        router="Gate",
        logits="gate.gate_proj",
        bias="gate.expert_bias",
        spec={"score_dtype": "float32"} | _CAST_BACK,
        reads=_GATE_READS | {"score": _BAILING_SCORE},
        promotes=True,
    ),
    _v3(
        "bailing_moe",
        "BailingMoeSparseMoeBlock",
        "bailing_moe.BailingMoeMLP",
        router="BailingMoeGate",
        logits="gate.gate_proj",
        bias="gate.expert_bias",
        spec={"score_dtype": "float32"} | _EPS | _CAST_BACK | _HIGHEST,
        reads=_GATE_READS | {"score": _BAILING_SCORE},
        code=("group_expert_select", "aggregate_expert_outputs"),
    ),
    _v3(
        "kimi_k3",
        "KimiK3SparseMoE",
        None,
        router=None,
        logits="gate",
        bias="e_score_correction_bias",
        spec=_SIGMOID | _EPS | _CAST_BACK,
        reads={
            "top_k": "args.num_experts_per_token",
            "num_groups": "args.num_expert_group",
            "top_groups": "args.topk_group",
            "renormalize": "args.moe_renormalize",
            "scale": "args.routed_scaling_factor",
        },
        latent=("routed_expert_down_proj", "routed_expert_norm", "routed_expert_up_proj"),
        whole_when_sharded=True,  # its ranks are summed before the norm
        promotes=True,
        code=("_group_expert_select",),
    ),
    # Scores, keys and weights in the model's dtype; the bias is rounded to it.
    _v3(
        "kimi_linear",
        "KimiSparseMoE",
        "kimi_linear.KimiMLP",
        router=None,
        logits="gate",
        bias="e_score_correction_bias",
        spec={"bias_dtype": "scores"} | _EPS,
        reads={
            "top_k": "args.num_experts_per_token",
            "num_groups": "args.num_expert_group",
            "top_groups": "args.topk_group",
            "renormalize": "args.moe_renormalize",
            "scale": "args.routed_scaling_factor",
            "score": Either(
                path="args.moe_router_activation_func",
                words={"sigmoid": "sigmoid", "softmax": "softmax"},
            ),
        },
        promotes=True,
        code=("_group_expert_select",),
    ),
    # F: dropped groups filled with -inf.
    Block(
        module="bailing_hybrid",
        name="SparseMoeBlock",
        letter="F",
        router="Gate",
        logits="gate.gate_proj",
        bias="gate.expert_bias",
        spec={"score_dtype": "float32", "dropped_fill": "-inf"} | _EPS | _CAST_BACK,
        reads=_GATE_READS | {"score": _BAILING_SCORE},
        renormalize="flag_above_one",
        shared="shared_experts",
        shared_class="bailing_hybrid.MLP",
        promotes=True,
    ),
    Block(
        module="bailing_moe_v3",
        name="BailingSparseMoE",
        letter="F",
        router="BailingGate",
        logits="gate.weight",
        float32_input="both",
        bias="gate.expert_bias",
        spec=_SIGMOID | _EPS | {"dropped_fill": "-inf"},
        reads={k: v for k, v in _GATE_READS.items() if k != "renormalize"},
        renormalize=True,
        shared="shared_experts",
        shared_class="bailing_moe_v3.BailingMLP",
        code=("_group_expert_select",),
    ),
    # G: sigmoid and bias, no groups.
    Block(
        module="minimax",
        name="MiniMaxSparseMoeBlock",
        letter="G",
        float32_input="x",
        bias="e_score_correction_bias",
        spec=_SIGMOID | _EPS | {"weight_dtype": "x"},
        reads={"top_k": "num_experts_per_tok"},
        renormalize=True,
    ),
    Block(
        module="minimax_m3_vl",
        name="SparseMoeBlock",
        letter="G",
        bias="e_score_correction_bias",
        spec=_SIGMOID | _EPS | {"weight_dtype": "x"},
        reads={"top_k": "num_experts_per_tok", "scale": "routed_scaling_factor"},
        renormalize=True,
        shared="shared_experts",
        shared_class="minimax_m3_vl.DenseMLP",
    ),
    Block(
        module="step3p5",
        name="Step3p5MoE",
        letter="G",
        router="Step3p5MoEGate",
        logits="gate.gate",
        bias="gate.router_bias",
        spec=_SIGMOID | _EPS,
        reads={
            "top_k": "gate.top_k",
            "renormalize": "gate.norm_topk_prob",
            "scale": "gate.routed_scaling_factor",
        },
        renormalize="flag",
        shared="share_expert",
        shared_class="step3p5.Step3p5MLP",
        code=("moe_gate_select",),
    ),
    Block(
        module="Klear",
        name="KlearSparseMoeBlock",
        letter="G",
        bias="expert_bias",
        spec=_SIGMOID | {"weight_dtype": "x"},
        reads={"top_k": "top_k", "renormalize": "norm_topk_prob"},
        renormalize="flag",
        experts="experts",
        shared="shared_experts",
        mix="coefficient",
    ),
    # The sigmoid in the model's dtype, the key in float32.
    Block(
        module="lfm2_moe",
        name="Lfm2MoeSparseMoeBlock",
        letter="G",
        bias="expert_bias",
        bias_where="use_expert_bias",
        spec={"score": "sigmoid", "bias_dtype": "float32", "renormalize_eps": 1e-6}
        | _HIGHEST
        | {"weight_dtype": "x"},
        reads={"top_k": "top_k", "renormalize": "norm_topk_prob", "scale": "routed_scaling_factor"},
        renormalize="flag",
    ),
    # The scale multiplies the combined output.
    Block(
        module="laguna",
        name="MoE",
        letter="G",
        router="MoEGate",
        logits="gate.proj",
        bias="gate.e_score_correction_bias",
        spec={"score_dtype": "float32", "scale_place": "output"},
        reads={
            "top_k": "gate.top_k",
            "softcap": "gate.softcap",
            "scale": "routed_scaling_factor",
            "score": Either(
                path="gate.score_func", words={"sigmoid": "sigmoid", "sqrtsoftplus": "sqrtsoftplus"}
            ),
        },
        renormalize=True,
        shared="shared_expert",
        shared_class="laguna.MLP",
        code=("MoEGate._routing_scores",),
    ),
    Block(
        module="deepseek_v41",
        name="MoE",
        letter="G",
        router="Router",
        logits="gate.weight",
        float32_input="both",
        bias="gate.e_score_correction_bias",
        spec={"score_dtype": "float32"} | _EPS,
        reads={
            "top_k": "gate.top_k",
            "temperature": "gate.gate_temp",
            "renormalize": "gate.norm_topk_prob",
            "scale": "gate.route_scale",
            "score": Either(
                path="gate.score_func",
                words={"sigmoid": "sigmoid", "softmax": "softmax"},
                otherwise="sqrtsoftplus",
            ),
        },
        renormalize="flag_above_one",
        experts="experts.switch_mlp",
        shared="shared_experts",
        sum_float32=True,
        code=("Experts.__call__",),
    ),
)
