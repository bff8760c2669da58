"""mlx-lm's own routing, run on given logits.

Where mlx-lm has a routing function or module, it is called. Where routing is inline in a block's
``__call__``, the real block runs with two parts replaced: its gate returns the given logits, and its
experts return a stand-in that ends the call at the moment the block multiplies it by the weights. What is
caught is thus exactly what the block is about to combine with: indices, their order, weights, dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace
from typing import Any, NamedTuple

import mlx.core as mx

from moefast import RouterSpec

_HIDDEN = 8  # of blocks whose gate is replaced; nothing depends on it


class Call(NamedTuple):
    """One routing problem in mlx-lm's words. ``logits`` are ``[tokens, num_experts]``."""

    logits: mx.array
    spec: RouterSpec
    renormalize: bool  # the configuration's flag, which a family may ignore
    bias: mx.array | None = None
    expert_scale: mx.array | None = None
    dtype: mx.Dtype = mx.float32  # of the model

    @property
    def x(self) -> mx.array:
        return mx.zeros((self.logits.shape[0], _HIDDEN), self.dtype)


Result = tuple[mx.array, mx.array]


class _CombineReached(Exception):
    def __init__(self, indices: mx.array, weights: mx.array):
        self.result = (indices, weights)


class _Uncombined:
    """Stands for the experts' outputs: the first thing a block does with them is to weigh them."""

    def __init__(self, indices: mx.array):
        self._indices = indices

    def __mul__(self, weights: mx.array) -> None:
        raise _CombineReached(self._indices, weights.squeeze(-1))


def _module(name: str) -> Any:
    return import_module(f"mlx_lm.models.{name}")


def _run_block(block: Any, call: Call, experts: str, gate: str, x: mx.array | None = None) -> Result:
    setattr(block, gate, lambda _: call.logits if x is None else call.logits[None])
    setattr(block, experts, lambda _, indices: _Uncombined(indices))
    try:
        block(call.x if x is None else x)
    except _CombineReached as reached:
        indices, weights = reached.result
        return indices.reshape(-1, indices.shape[-1]), weights.reshape(-1, weights.shape[-1])
    raise AssertionError(f"{type(block).__name__} never combined its experts")


def _inline(name: str, block: str, arguments: Callable[[Call], Any], experts: str, gate: str, bias: str = ""):
    """A block with inline routing, built with ``arguments``."""

    def run(call: Call) -> Result:
        instance = getattr(_module(name), block)(*arguments(call))
        if bias:
            setattr(instance, bias, call.bias)
        return _run_block(instance, call, experts, gate)

    return run


def _group_expert_select(name: str, *extra: str):
    def run(call: Call) -> Result:
        s = call.spec
        return _module(name).group_expert_select(
            call.logits, call.bias, s.top_k, s.num_groups, s.top_groups, s.scale, call.renormalize, *extra
        )

    return run


def _args(**fields: Any) -> tuple[SimpleNamespace]:
    return (SimpleNamespace(**fields),)


def _sizes(**names: str) -> Callable[[Call], tuple[SimpleNamespace]]:
    """Arguments of a block: ``names`` maps the family's words to ours."""

    def arguments(call: Call) -> tuple[SimpleNamespace]:
        values = {
            "hidden": _HIDDEN,
            "experts": call.spec.num_experts,
            "top_k": call.spec.top_k,
            "renormalize": call.renormalize,
            "scale": call.spec.scale,
            "one": 1,
            "yes": True,
            "no": False,
        }
        return _args(**{name: values.get(word, word) for name, word in names.items()})

    return arguments


_QWEN = {
    "hidden_size": "hidden",
    "moe_intermediate_size": "hidden",
    "shared_expert_intermediate_size": "hidden",
    "num_experts": "experts",
    "num_experts_per_tok": "top_k",
    "norm_topk_prob": "renormalize",
}
_MIXTRAL = {
    "hidden_size": "hidden",
    "intermediate_size": "hidden",
    "num_local_experts": "experts",
    "num_experts": "experts",
    "num_experts_per_tok": "top_k",
}


def _granite(name: str, gating: str):
    def run(call: Call) -> Result:
        router = getattr(_module(name), gating)(_HIDDEN, call.spec.num_experts, call.spec.top_k)
        router.layer = lambda _: call.logits
        return router(call.x)

    return run


def _phixtral(call: Call) -> Result:
    (args,) = _sizes(num_local_experts="experts", num_experts_per_tok="top_k", model_dim="hidden")(call)
    block = _module("phixtral").MOE(args, _HIDDEN, _HIDDEN)
    return _run_block(block, call, "switch_mlp", "gate")


def _gemma4(call: Call) -> Result:
    (args,) = _args(
        hidden_size=_HIDDEN, num_experts=call.spec.num_experts, top_k_experts=call.spec.top_k, rms_norm_eps=1e-6
    )
    router = _module("gemma4_text").Router(args)
    router.proj = lambda _: call.logits
    router.per_expert_scale = call.expert_scale
    return router(call.x)


def _weight_gate(name: str):
    """deepseek's and deepseek_v2's MoEGate multiply by a raw weight: the identity passes logits through."""

    def run(call: Call) -> Result:
        s = call.spec
        (args,) = _args(
            hidden_size=s.num_experts,
            n_routed_experts=s.num_experts,
            num_experts_per_tok=s.top_k,
            routed_scaling_factor=s.scale,
            topk_method="group_limited_greedy" if s.num_groups > 1 else "greedy",
            n_group=s.num_groups,
            topk_group=s.top_groups,
        )
        gate = _module(name).MoEGate(args)
        gate.weight = mx.eye(s.num_experts, dtype=call.logits.dtype)
        indices, weights = gate(call.logits[None])
        return indices[0], weights[0]

    return run


def _hunyuan(call: Call) -> Result:
    (args,) = _args(
        hidden_size=_HIDDEN,
        intermediate_size=_HIDDEN,
        moe_intermediate_size=None,
        use_mixed_mlp_moe=False,
        num_experts=call.spec.num_experts,
        moe_topk=call.spec.top_k,
    )
    return _run_block(_module("hunyuan").MoeBlock(args), call, "switch_mlp", "gate")


def _mistral4(call: Call) -> Result:
    s = call.spec
    return _module("mistral4").mistral4_expert_select(
        call.logits, s.top_k, s.num_groups, s.top_groups, s.scale, call.renormalize
    )


def _longcat(call: Call) -> Result:
    (args,) = _args(
        hidden_size=_HIDDEN,
        moe_topk=call.spec.top_k,
        n_routed_experts=call.spec.num_experts,
        zero_expert_num=0,
        routed_scaling_factor=call.spec.scale,
        norm_topk_prob=call.renormalize,
        router_bias=False,
    )
    router = _module("longcat_flash").LongcatFlashTopkRouter(args)
    router.classifier = lambda _: call.logits
    router.e_score_correction_bias = call.bias
    return router(call.x)


_ernie = _inline(
    "ernie4_5_moe",
    "Ernie4_5_MoeMLP",
    lambda call: _args(
        moe_k=call.spec.top_k,
        moe_intermediate_size=_HIDDEN,
        hidden_size=_HIDDEN,
        moe_num_experts=call.spec.num_experts,
        use_bias=False,
        moe_gate_act="softmax",
    ),
    "switch_mlp",
    "gate",
)


def _dbrx(call: Call) -> Result:
    """A list of experts, called one by one. Expert e returns the e-th unit vector, so that the block's own
    weighted sum, exact since all other terms are 0, is the vector of the token's weights by expert."""
    experts = call.spec.num_experts
    (args,) = _args(
        d_model=experts,
        ffn_config={"ffn_hidden_size": 1, "moe_num_experts": experts, "moe_top_k": call.spec.top_k},
    )
    block = _module("dbrx").SparseMoeBlock(args)
    chosen: list[int] = []

    def expert(e: int) -> Callable[[mx.array], mx.array]:
        def output(x: mx.array) -> mx.array:
            chosen.append(e)
            return (mx.arange(experts) == e).astype(x.dtype)

        return output

    block.router = lambda _: call.logits
    block.experts = [expert(e) for e in range(experts)]
    block.eval()
    by_expert = block(mx.zeros((call.logits.shape[0], experts), call.dtype))
    indices = mx.array(chosen, mx.uint32).reshape(-1, call.spec.top_k)
    return indices, mx.take_along_axis(by_expert, indices, axis=-1)


def _afmoe(call: Call) -> Result:
    s = call.spec
    (args,) = _args(
        hidden_size=_HIDDEN,
        moe_intermediate_size=_HIDDEN,
        num_experts=s.num_experts,
        num_experts_per_tok=s.top_k,
        route_norm=call.renormalize,
        route_scale=s.scale,
        score_func="sigmoid",
        n_group=s.num_groups,
        topk_group=s.top_groups,
        num_shared_experts=0,
    )
    block = _module("afmoe").AfmoeMoE(args)
    block.expert_bias = call.bias
    return _run_block(block, call, "experts", "router")


def _kimi_linear(call: Call) -> Result:
    s = call.spec
    return _module("kimi_linear")._group_expert_select(
        call.logits, call.bias, s.top_k, s.num_groups, s.top_groups, s.scale, call.renormalize, "sigmoid"
    )


def _kimi_k3(call: Call) -> Result:
    s = call.spec
    return _module("kimi_k3")._group_expert_select(
        call.logits, call.bias, s.top_k, s.num_groups, s.top_groups, s.scale, call.renormalize
    )


def _bailing_hybrid(call: Call) -> Result:
    s = call.spec
    (args,) = _args(
        hidden_size=_HIDDEN,
        num_experts=s.num_experts,
        num_experts_per_tok=s.top_k,
        n_group=s.num_groups,
        topk_group=s.top_groups,
        norm_topk_prob=call.renormalize,
        routed_scaling_factor=s.scale,
        score_function="sigmoid",
        moe_router_enable_expert_bias=True,
    )
    gate = _module("bailing_hybrid").Gate(args)
    gate.gate_proj = lambda _: call.logits
    gate.expert_bias = call.bias
    return gate(call.x)


def _bailing_v3(call: Call) -> Result:
    s = call.spec
    return _module("bailing_moe_v3")._group_expert_select(
        call.logits, call.bias, s.top_k, s.num_groups, s.top_groups, s.scale
    )


def _step3p5(call: Call) -> Result:
    return _module("step3p5").moe_gate_select(
        call.logits, call.bias, call.spec.top_k, call.spec.scale, call.renormalize
    )


def _minimax_m3(call: Call) -> Result:
    (args,) = _args(
        hidden_size=_HIDDEN,
        intermediate_size=_HIDDEN,
        shared_intermediate_size=_HIDDEN,
        num_local_experts=call.spec.num_experts,
        num_experts_per_tok=call.spec.top_k,
        routed_scaling_factor=call.spec.scale,
        swiglu_alpha=1.702,
        swiglu_limit=7.0,
    )
    block = _module("minimax_m3_vl").SparseMoeBlock(args)
    block.e_score_correction_bias = call.bias
    return _run_block(block, call, "switch_mlp", "gate")


def _klear(call: Call) -> Result:
    (args,) = _args(
        hidden_size=_HIDDEN,
        moe_intermediate_size=_HIDDEN,
        num_experts=call.spec.num_experts,
        num_experts_per_tok=call.spec.top_k,
        n_shared_experts=1,
        norm_topk_prob=call.renormalize,
    )
    block = _module("Klear").KlearSparseMoeBlock(args)
    block.expert_bias = call.bias
    return _run_block(block, call, "experts", "gate", call.x[None])  # it wants [batch, tokens, hidden]
