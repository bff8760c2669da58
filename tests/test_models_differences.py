"""Where mlx-lm ignores or misreads a setting, our models compute what the original does: the rows of
docs/differences.md, each against an equivalent configuration or a small computation of its own."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from model_builders import Weights, ours, parameters, random_weights, theirs, tokens
from model_cases import BASE, LING_2, Config, sizes

from moefast.models import FAMILIES
from moefast.models.rope import make_rope
from moefast.nn import MLP, MoE, Rope
from moefast.testing import assert_close, assert_logits_close

pytestmark = pytest.mark.usefixtures("cpu")

families = pytest.mark.parametrize("family", FAMILIES)

BACKBONE = {family: "transformer" if family == "dbrx" else "model" for family in FAMILIES}


def weights_of(config: Config, seed: int = 0) -> Weights:
    return random_weights(ours(config, {}), seed)


def logits_of(config: Config, weights: Weights, **format_: Any) -> mx.array:
    y: mx.array = ours(config, weights, **format_)(tokens(2, 20))
    return y


# --- settings of several families ---


@pytest.mark.parametrize("family", ["granitemoe", "glm4_moe", "qwen2_moe", "bailing_moe"])
def test_tied_embeddings_are_the_head(family: str) -> None:
    tied = {**BASE[family], "tie_word_embeddings": True}
    weights = weights_of(tied)
    embedding = "model.word_embeddings" if family == "bailing_moe" else "model.embed_tokens"
    untied = {**weights, "lm_head.weight": weights[f"{embedding}.weight"]}
    want = logits_of({**tied, "tie_word_embeddings": False}, untied)
    assert mx.array_equal(logits_of(tied, weights), want)


@families
def test_linear_scaling_divides_positions(family: str) -> None:
    config = {**BASE[family], "rope_scaling": {"type": "linear", "factor": 2.0}}
    model = ours(config)
    got = model(tokens(2, 20))
    for layer in model.layers:
        attention = layer.norm_attn_norm.attn if family == "dbrx" else layer[layer.ATTENTION]
        dims = attention.head_dim // 2 if family == "glm4_moe" else attention.head_dim
        attention.rope = Rope(dims, base=10000.0, scale=0.5).eval()
    assert mx.array_equal(got, model(tokens(2, 20)))


@pytest.mark.parametrize("family", ["granitemoe", "qwen2_moe", "bailing_moe"])
def test_a_head_may_have_a_size_of_its_own(family: str) -> None:
    config = {**BASE[family], "head_dim": 32}
    shapes = {path: value.shape for path, value in parameters(ours(config)).items()}
    output = "attention.dense" if family == "bailing_moe" else "self_attn.o_proj"
    assert shapes[f"model.layers.0.{output}.weight"] == (64, 4 * 32)
    # What the attribute stands for by default.
    assert mx.array_equal(
        logits_of({**config, "head_dim": 16}, weights_of(BASE[family])),
        logits_of(BASE[family], weights_of(BASE[family])),
    )


ROPES = [
    {"type": "linear", "factor": 3.0},
    {"type": "dynamic", "factor": 2.0},
    {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    | {"original_max_position_embeddings": 64},
    {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "attention_factor": 0.7},
    {
        "type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "mscale": 1.2,
        "mscale_all_dim": 0.8,
    },
    {
        "type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "mscale": 1.0,
        "beta_fast": None,
    },
]


@pytest.mark.parametrize("scaling", ROPES, ids=lambda s: "-".join(k for k in s if k != "factor") + s["type"])
def test_rotary_embeddings_are_transformers(scaling: Config) -> None:
    dims, theta, trained, length = 16, 10000.0, 32, 48
    rope = make_rope("any", dims, theta, scaling, trained)
    x = np.random.default_rng(0).standard_normal((1, 2, length, 32))
    frequency, factor = wavelengths(scaling, dims, theta, trained, length)
    angle = np.arange(length)[:, None] * frequency
    a, b = x[..., : dims // 2] * factor, x[..., dims // 2 : dims] * factor
    turned = [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle), x[..., dims:]]
    got = rope(mx.array(x.astype(np.float32)), offset=0)
    assert_logits_close(got, np.concatenate(turned, axis=-1), layers=1, hidden=dims)


def test_dynamic_scaling_of_a_batch() -> None:
    # mlx-lm's raises an error for the offsets of a padded batch. The longest row decides.
    rope = make_rope("any", 16, 10000.0, {"type": "dynamic", "factor": 2.0}, 32)
    x = mx.array(np.random.default_rng(0).standard_normal((2, 4, 8, 16)).astype(np.float32))
    beyond = rope(x, offset=mx.array([40, 3]))
    assert_logits_close(beyond[:1], rope(x[:1], offset=40), layers=1, hidden=16)
    assert not mx.array_equal(beyond[1:], rope(x[1:], offset=3))
    within = rope(x, offset=mx.array([20, 3]))
    assert_logits_close(within[1:], rope(x[1:], offset=3), layers=1, hidden=16)


def wavelengths(s: Config, dims: int, theta: float, trained: int, length: int) -> tuple[np.ndarray, float]:
    """Radians per position, and the factor on rotated values, as transformers defines them."""
    exponent = np.arange(0, dims, 2) / dims
    frequency = theta**-exponent
    if s["type"] == "linear":
        return frequency / s["factor"], 1.0
    if s["type"] == "dynamic":
        stretch = s["factor"] * max(length, trained) / trained - (s["factor"] - 1)
        return (theta * stretch ** (dims / (dims - 2))) ** -exponent, 1.0
    known = s["original_max_position_embeddings"]
    turns = known * frequency / (2 * math.pi)  # in the trained context
    if s["type"] == "llama3":
        share = (turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
        share = np.clip(share, 0, 1)
        return share * frequency + (1 - share) * frequency / s["factor"], 1.0

    def dimension(turns: float) -> float:
        return dims * math.log(known / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(dimension(s.get("beta_fast") or 32)), 0)
    last = min(math.ceil(dimension(s.get("beta_slow") or 1)), dims - 1)
    stretched = np.clip((np.arange(dims // 2) - first) / max(last - first, 1e-3), 0, 1)
    frequency = stretched * frequency / s["factor"] + (1 - stretched) * frequency

    def mscale(m: float) -> float:
        return 0.1 * m * math.log(s["factor"]) + 1

    ratio = mscale(s["mscale"]) / mscale(s["mscale_all_dim"]) if "mscale_all_dim" in s else mscale(1)
    return frequency, s.get("attention_factor", ratio)


def by_hand(block: MoE, x: mx.array, *, renormalize: bool) -> np.ndarray:
    """A softmax-scored block with its gated shared expert, if any, in float64."""
    p = {path: np.asarray(value).astype(np.float64) for path, value in parameters(block).items()}
    rows = np.asarray(x).astype(np.float64)

    def feed(row: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
        g = gate @ row
        return down @ (g / (1 + np.exp(-g)) * (up @ row))

    out = []
    for row in rows:
        logits = (p["gate.weight"] if "gate.weight" in p else p["router.layer.weight"]) @ row
        scores = np.exp(logits - logits.max())
        scores /= scores.sum()
        chosen = np.argsort(-scores)[: block.spec.top_k]
        share = scores[chosen] / (scores[chosen].sum() if renormalize else 1.0)
        stacks = [p[f"switch_mlp.{name}_proj.weight"] for name in ("gate", "up", "down")]
        y = sum(w * feed(row, *(stack[e] for stack in stacks)) for w, e in zip(share, chosen, strict=True))
        if "shared_expert_gate.weight" in p:
            shared = feed(row, *(p[f"shared_expert.{name}_proj.weight"] for name in ("gate", "up", "down")))
            y = y + shared / (1 + np.exp(-(p["shared_expert_gate.weight"] @ row)))
        out.append(y)
    return np.stack(out)


def check_block(block: MoE, *, renormalize: bool) -> None:
    x = mx.array(np.random.default_rng(1).standard_normal((12, 64)).astype(np.float32))
    assert_close(block(x), by_hand(block, x, renormalize=renormalize), "moe", reductions=(64, 128), top_k=2)


# --- qwen2_moe ---


@pytest.mark.parametrize("flag", [True, False])
def test_qwen_renormalizes_where_it_is_told_to(flag: bool) -> None:
    model = ours({**BASE["qwen2_moe"], "norm_topk_prob": flag})
    check_block(model.layers[0].mlp, renormalize=flag)


def test_qwen_dense_layers() -> None:
    config = {**BASE["qwen2_moe"], "num_hidden_layers": 4}
    every_other = {**config, "decoder_sparse_step": 2}
    listed = {**config, "mlp_only_layers": [0, 2]}
    assert [type(layer.mlp) for layer in ours(every_other, {}).layers] == [MLP, MoE, MLP, MoE]
    weights = weights_of(every_other)
    assert weights["model.layers.0.mlp.up_proj.weight"].shape == (config["intermediate_size"], 64)
    assert mx.array_equal(logits_of(every_other, weights), logits_of(listed, weights))
    both = {**every_other, "mlp_only_layers": [1]}
    assert [type(layer.mlp) for layer in ours(both, {}).layers] == [MLP, MLP, MLP, MoE]
    assert {type(layer.mlp) for layer in ours({**config, "num_experts": 0}, {}).layers} == {MLP}


def test_qwen_without_biases() -> None:
    config = {**BASE["qwen2_moe"], "qkv_bias": False}
    weights = weights_of(config)
    assert not any(path.endswith("bias") for path in weights)
    zeros = {
        f"model.layers.{layer}.self_attn.{name}_proj.bias": mx.zeros((64,))
        for layer in range(2)
        for name in ("q", "k", "v")
    }
    assert_logits_close(
        logits_of(config, weights), logits_of(BASE["qwen2_moe"], {**weights, **zeros}), **sizes(config)
    )


# --- glm4_moe ---


def test_glm_without_shared_expert() -> None:
    config = BASE["glm4_moe"]
    weights = weights_of(config)
    silent = {k: v * 0 if "shared_experts.down_proj" in k else v for k, v in weights.items()}
    without = {k: v for k, v in weights.items() if "shared_experts" not in k}
    want = logits_of(config, silent)
    for number in (None, 0):
        assert_logits_close(logits_of({**config, "n_shared_experts": number}, without), want, **sizes(config))


def test_glm_and_ling_2_are_one_architecture() -> None:
    # Ling's top-1 routing and its head_dim, which mlx-lm cannot run and ignores, against GLM's.
    ling = {**BASE["bailing_moe"], **LING_2, "num_experts_per_tok": 1, "head_dim": 32, "use_qkv_bias": True}
    ling["moe_shared_expert_intermediate_size"] = None
    glm = {**BASE["glm4_moe"], "num_experts_per_tok": 1, "rms_norm_eps": 1e-6, "use_qk_norm": True}
    glm |= {name: ling[name] for name in ("n_group", "topk_group", "routed_scaling_factor")}
    weights = weights_of(glm)
    renamed: Weights = {}
    for path, value in weights.items():
        prefix, _, name = path.rpartition("self_attn.")
        if name.startswith("q_proj"):
            part = name.removeprefix("q_proj")
            rows = [weights[f"{prefix}self_attn.{p}_proj{part}"] for p in "qkv"]
            renamed[f"{prefix}attention.query_key_value{part}"] = mx.concatenate(rows)
        elif not name.startswith(("k_proj", "v_proj")):
            renamed[path] = value
    for former, later in (
        ("self_attn.o_proj", "attention.dense"),
        ("self_attn.q_norm", "attention.query_layernorm"),
        ("self_attn.k_norm", "attention.key_layernorm"),
        ("embed_tokens", "word_embeddings"),
        ("e_score_correction_bias", "expert_bias"),
    ):
        renamed = {path.replace(former, later): value for path, value in renamed.items()}
    assert_logits_close(logits_of(ling, renamed), logits_of(glm, weights), **sizes(glm))


# --- bailing_moe ---

NORM_HEAD = {**BASE["bailing_moe"], "norm_head": True}


def test_ling_normalizes_the_columns_of_its_head() -> None:
    weights = weights_of(NORM_HEAD)
    head = np.asarray(weights["lm_head.weight"]).astype(np.float64)
    by_columns = {
        **weights,
        "lm_head.weight": mx.array((head / np.linalg.norm(head, axis=0)).astype(np.float32)),
    }
    want = logits_of(BASE["bailing_moe"], by_columns)
    assert_logits_close(logits_of(NORM_HEAD, weights), want, **sizes(NORM_HEAD))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
def test_ling_may_load_a_normalized_head(dtype: mx.Dtype) -> None:
    model = ours(NORM_HEAD, dtype=dtype)
    once = parameters(model)["lm_head.weight"]
    twice = model.sanitize(parameters(model))["lm_head.weight"]
    if dtype == mx.float32:  # the guard against division by zero shows in the last bits
        assert_logits_close(twice, once, **sizes(NORM_HEAD))
    else:
        assert mx.array_equal(twice, once)


def test_ling_loads_a_quantized_head_as_it_is() -> None:
    model = ours(NORM_HEAD, bits=4)
    saved = parameters(model)
    loaded = model.sanitize(dict(saved))
    assert all(mx.array_equal(loaded[path], saved[path]) for path in saved)


def test_ling_has_biases_in_the_attention_only() -> None:
    config = {**BASE["bailing_moe"], "use_bias": True, "use_qkv_bias": True, "first_k_dense_replace": 1}
    weights = weights_of(config)
    assert {path.split(".", 3)[3] for path in weights if path.endswith("bias")} == {
        "attention.dense.bias",
        "attention.query_key_value.bias",
    }
    # mlx-lm gives the feed-forward networks biases too: with zeros there, it is the same model.
    biased = {path: v for path, v in weights.items() if ".mlp." in path and path.endswith("_proj.weight")}
    zeros = {
        path.replace("weight", "bias"): mx.zeros(value.shape[:-1])
        for path, value in biased.items()
        if ".gate.gate_proj" not in path
    }
    want = theirs(config, {**weights, **zeros})(tokens(2, 20))
    assert_logits_close(logits_of(config, weights), want, **sizes(config))


# --- dbrx ---


def test_dbrx_may_leave_values_unclipped() -> None:
    sections = [{**BASE["dbrx"]["attn_config"], "clip_qkv": clip} for clip in (None, 1e9)]
    sections.append({k: v for k, v in sections[0].items() if k != "clip_qkv"})
    weights = weights_of(BASE["dbrx"])
    unclipped, wide, absent = (logits_of({**BASE["dbrx"], "attn_config": s}, weights) for s in sections)
    assert mx.array_equal(unclipped, wide)
    assert mx.array_equal(unclipped, absent)
    assert not mx.array_equal(unclipped, logits_of(BASE["dbrx"], weights))


@pytest.mark.parametrize("norm", [None, 1, 1.0])
def test_dbrx_normalizes_where_it_is_told_to(norm: float | None) -> None:
    section = {**BASE["dbrx"]["ffn_config"], "moe_normalize_expert_weights": norm}
    model = ours({**BASE["dbrx"], "ffn_config": section})
    check_block(model.layers[0].ffn, renormalize=norm is not None)


def test_dbrx_normalizes_by_default() -> None:
    check_block(ours(BASE["dbrx"]).layers[0].ffn, renormalize=True)
