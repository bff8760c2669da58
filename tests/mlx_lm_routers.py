"""mlx-lm's own routing, run on given logits.

Where mlx-lm has a routing function or module, it is called. Where routing is inline in a block's
``__call__``, the real block runs with two parts replaced: its gate returns the given logits, and its
experts return a stand-in that ends the call when the block multiplies it by the weights. What is caught is
exactly what the block was about to combine with: indices, their order, weights, dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace
from typing import Any, NamedTuple

import mlx.core as mx

from moefast import RouterSpec

Result = tuple[mx.array, mx.array]


class Call(NamedTuple):
    """One routing problem; ``logits`` are ``[tokens, num_experts]``.

    ``renormalize`` is the flag of the configuration, which a family may overrule. ``dtype`` is the model's.
    """

    logits: mx.array
    spec: RouterSpec
    renormalize: bool
    dtype: mx.Dtype
    bias: mx.array | None = None
    expert_scale: mx.array | None = None


def configuration(call: Call) -> SimpleNamespace:
    """The problem in the words of every family at once. All sizes are the number of experts, which DBRX's
    stand-in needs; for the others they only have to be something."""
    s = call.spec
    sizes = {
        name: s.num_experts
        for name in (
            "hidden_size", "intermediate_size", "moe_intermediate_size", "shared_intermediate_size",
            "shared_expert_intermediate_size", "d_model", "model_dim",
        )
    }  # fmt: skip
    experts = {
        name: s.num_experts
        for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    }
    top_k = {name: s.top_k for name in ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k")}
    flags = {name: call.renormalize for name in ("norm_topk_prob", "route_norm")}
    scale = {name: s.scale for name in ("routed_scaling_factor", "route_scale")}
    return SimpleNamespace(
        **sizes, **experts, **top_k, **flags, **scale,
        ffn_config={"ffn_hidden_size": 1, "moe_num_experts": s.num_experts, "moe_top_k": s.top_k},
        n_group=s.num_groups,
        topk_group=s.top_groups,
        topk_method="group_limited_greedy" if s.num_groups > 1 else "greedy",
        score_func="sigmoid",
        score_function="sigmoid",
        scoring_func=s.score,
        gate_temp=s.temperature,
        moe_gate_act="softmax",
        moe_router_score_func="sigmoid",
        moe_router_logit_softcapping=s.softcap,
        moe_router_enable_expert_bias=True,
        use_expert_bias=True,
        use_bias=False,
        router_bias=False,
        mlp_bias=False,
        use_mixed_mlp_moe=False,
        num_shared_experts=0,
        n_shared_experts=1,
        zero_expert_num=0,
        rms_norm_eps=1e-6,
        swiglu_alpha=1.702,
        swiglu_limit=7.0,
    )  # fmt: skip


def _class(name: str, kind: str) -> Any:
    return getattr(import_module(f"mlx_lm.models.{name}"), kind)


def _build(name: str, kind: str, call: Call) -> Any:
    return _class(name, kind)(configuration(call))


def _build_granite(name: str, kind: str, call: Call) -> Any:
    return _class(name, kind)(call.spec.num_experts, call.spec.num_experts, call.spec.top_k)


def _build_phixtral(name: str, kind: str, call: Call) -> Any:
    return _class(name, kind)(configuration(call), call.spec.num_experts, call.spec.num_experts)


def _flat(result: Result, call: Call) -> Result:
    """``[1, tokens, top_k]`` to ``[tokens, top_k]``."""
    indices, weights = result
    shape = (call.logits.shape[0], call.spec.top_k)
    return indices.reshape(shape), weights.reshape(shape)


# -- functions ---------------------------------------------------------------------------------------------


def _function(name: str, function: str, *, flag: bool = True, extra: tuple[str, ...] = ()) -> Any:
    """``function(gates, [bias], top_k, n_group, topk_group, scale, [renormalize], *extra)``."""

    def run(call: Call) -> Result:
        s = call.spec
        flags = (call.renormalize,) if flag else ()
        bias = () if name == "mistral4" else (call.bias,)
        numbers = (s.top_k, s.scale) if name == "step3p5" else (s.top_k, s.num_groups, s.top_groups, s.scale)
        return _class(name, function)(call.logits, *bias, *numbers, *flags, *extra)

    return run


# -- router modules ----------------------------------------------------------------------------------------


def _router(name: str, kind: str, linear: str, *, bias: str = "", build: Any = _build) -> Any:
    """A module ``x -> indices, weights`` whose linear layer is replaced."""

    def run(call: Call) -> Result:
        router = build(name, kind, call)
        setattr(router, linear, lambda _: call.logits)
        if bias:
            setattr(router, bias, call.bias)
        if call.expert_scale is not None:
            router.per_expert_scale = call.expert_scale
        return router(mx.zeros(call.logits.shape, call.dtype))

    return run


class _Input:
    """Stands for the x of a module that multiplies it by a raw weight: the product is the given logits."""

    def __init__(self, logits: mx.array):
        self.logits, self.shape = logits, logits.shape

    def astype(self, dtype: mx.Dtype) -> _Input:
        return _Input(self.logits.astype(dtype))

    def __matmul__(self, weight: mx.array) -> mx.array:
        return self.logits


def _weight_router(name: str, kind: str, *, bias: str = "") -> Any:
    def run(call: Call) -> Result:
        router = _build(name, kind, call)
        if bias:
            setattr(router, bias, call.bias)
        return _flat(router(_Input(call.logits[None])), call)

    return run


# -- blocks with inline routing ----------------------------------------------------------------------------


class _CombineReached(Exception):  # noqa: N818 (an event, not an error)
    pass


class _Uncombined:
    """Stands for the experts' outputs: the first thing a block does with them is to weigh them."""

    def __init__(self, indices: mx.array):
        self.indices = indices

    def __mul__(self, weights: mx.array) -> None:
        raise _CombineReached(self.indices, weights.squeeze(-1))


@dataclass(frozen=True)
class Block:
    """A block with inline routing: its class, and the names of its gate, experts and selection bias."""

    name: str
    kind: str
    gate: str = "gate"
    experts: str = "switch_mlp"
    bias: str = ""
    build: Callable[..., Any] = _build

    def run(self, call: Call, x: mx.array, experts: Callable[[mx.array, mx.array], Any]) -> mx.array:
        """The block's output for x ``[1, tokens, hidden]``, with the given logits and experts."""
        block = self.build(self.name, self.kind, call)
        setattr(block, self.gate, lambda x: call.logits.reshape(*x.shape[:-1], call.logits.shape[-1]))
        setattr(block, self.experts, experts)
        if self.bias:
            setattr(block, self.bias, call.bias)
        return block(x)

    def __call__(self, call: Call) -> Result:
        try:
            x = mx.zeros((1, *call.logits.shape), call.dtype)
            self.run(call, x, lambda _, indices: _Uncombined(indices))
        except _CombineReached as reached:
            return _flat(reached.args, call)
        raise AssertionError(f"{self.kind} of {self.name} never combined its experts")


def _dbrx(call: Call) -> Result:
    """A Python list of experts. Expert e returns the e-th unit vector, so that the block's own weighted sum,
    exact because all other terms are 0, is the vector of a token's weights by expert."""
    experts = range(call.spec.num_experts)
    block = _build("dbrx", "SparseMoeBlock", call)
    chosen: list[int] = []

    def expert(e: int) -> Callable[[mx.array], mx.array]:
        def unit_vector(x: mx.array) -> mx.array:
            chosen.append(e)
            return (mx.arange(len(experts)) == e).astype(x.dtype)

        return unit_vector

    block.router = lambda _: call.logits
    block.experts = [expert(e) for e in experts]
    by_expert = block.eval()(mx.zeros(call.logits.shape, call.dtype))
    indices = mx.array(chosen, mx.uint32).reshape(-1, call.spec.top_k)
    return indices, mx.take_along_axis(by_expert, indices, axis=-1)


ROUTERS: dict[str, Callable[[Call], Result]] = {
    "mixtral": Block("mixtral", "MixtralSparseMoeBlock"),
    "jamba": Block("jamba", "JambaSparseMoeBlock", "router"),
    "phixtral": Block("phixtral", "MOE", build=_build_phixtral),
    "gpt_oss": Block("gpt_oss", "MLPBlock", "router", "experts"),
    "granitemoe": _router("granitemoe", "GraniteMoeTopKGating", "layer", build=_build_granite),
    "granitemoehybrid": _router(
        "granitemoehybrid", "GraniteMoeHybridTopKGating", "layer", build=_build_granite
    ),
    "gemma4_text": _router("gemma4_text", "Router", "proj"),
    "qwen3_moe": Block("qwen3_moe", "Qwen3MoeSparseMoeBlock"),
    "qwen3_next": Block("qwen3_next", "Qwen3NextSparseMoeBlock"),
    "mellum": Block("mellum", "MellumSparseMoeBlock"),
    "olmoe": Block("olmoe", "OlmoeSparseMoeBlock"),
    "qwen2_moe": Block("qwen2_moe", "Qwen2MoeSparseMoeBlock"),
    "deepseek": _weight_router("deepseek", "MoEGate"),
    "hunyuan": Block("hunyuan", "MoeBlock"),
    "deepseek_v2": _weight_router("deepseek_v2", "MoEGate"),
    "mistral4": _function("mistral4", "mistral4_expert_select"),
    "longcat_flash": _router(
        "longcat_flash", "LongcatFlashTopkRouter", "classifier", bias="e_score_correction_bias"
    ),
    "ernie4_5_moe": Block("ernie4_5_moe", "Ernie4_5_MoeMLP"),
    "dbrx": _dbrx,
    "deepseek_v3": _function("deepseek_v3", "group_expert_select"),
    "deepseek_v32": _function("deepseek_v32", "group_expert_select"),
    "glm4_moe": _function("glm4_moe", "group_expert_select"),
    "dots1": _function("dots1", "group_expert_select"),
    "afmoe": Block("afmoe", "AfmoeMoE", "router", "experts", "expert_bias"),
    "glm4_moe_lite": _function("glm4_moe_lite", "group_expert_select"),
    "exaone_moe": _function("exaone_moe", "group_expert_select"),
    "mimo_v2_flash": _function("mimo_v2_flash", "group_expert_select"),
    "nemotron_h": _function("nemotron_h", "group_expert_select"),
    "bailing_moe_linear": _function("bailing_moe_linear", "group_expert_select", extra=("sigmoid",)),
    "bailing_moe": _function("bailing_moe", "group_expert_select", extra=("sigmoid",)),
    "kimi_linear": _function("kimi_linear", "_group_expert_select", extra=("sigmoid",)),
    "kimi_k3": _function("kimi_k3", "_group_expert_select"),
    "bailing_hybrid": _router("bailing_hybrid", "Gate", "gate_proj", bias="expert_bias"),
    "bailing_moe_v3": _function("bailing_moe_v3", "_group_expert_select", flag=False),
    "minimax": Block("minimax", "MiniMaxSparseMoeBlock", bias="e_score_correction_bias"),
    "minimax_m3_vl": Block("minimax_m3_vl", "SparseMoeBlock", bias="e_score_correction_bias"),
    "step3p5": _function("step3p5", "moe_gate_select"),
    "Klear": Block("Klear", "KlearSparseMoeBlock", experts="experts", bias="expert_bias"),
    "lfm2_moe": Block("lfm2_moe", "Lfm2MoeSparseMoeBlock", bias="expert_bias"),
    "laguna": _router("laguna", "MoEGate", "proj", bias="e_score_correction_bias"),
    "deepseek_v41": _weight_router("deepseek_v41", "Router", bias="e_score_correction_bias"),
}
