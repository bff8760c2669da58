"""The configurations of the five families."""

from __future__ import annotations

from typing import Any

import pytest
from mlx.utils import tree_flatten

pytest.importorskip("mlx_lm")

from moefast.lm import FAMILIES, preset
from moefast.lm.presets import layers_field
from moefast.models import get_classes

# hidden, expert width, experts, top k, layers, vocabulary
REAL = {
    "granitemoe": (1536, 512, 40, 8, 32, 49155),
    "glm4_moe": (4096, 1408, 128, 8, 46, 151552),
    "qwen2_moe": (2048, 1408, 60, 4, 24, 151936),
    "bailing_moe": (2048, 1408, 64, 6, 28, 126464),
    "dbrx": (6144, 10752, 16, 4, 40, 100352),
}


def sizes(config: dict[str, Any]) -> tuple[int, ...]:
    """The columns of REAL, from the fields of any family."""
    flat = {**config, **config.get("ffn_config", {})}

    def first(*names: str) -> int:
        return next(flat[name] for name in names if name in flat)

    return (
        first("hidden_size", "d_model"),
        first("moe_intermediate_size", "ffn_hidden_size", "intermediate_size"),
        first("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts"),
        first("num_experts_per_tok", "moe_top_k"),
        first("num_hidden_layers", "n_layers"),
        first("vocab_size"),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_preset_has_the_real_sizes(family: str) -> None:
    layers = REAL[family][4]
    assert sizes(preset(family, f"layers={layers}")) == REAL[family]
    assert sizes(preset(family, "layers=2")) == (*REAL[family][:4], 2, REAL[family][5])


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_preset_can_be_quantized_everywhere(family: str) -> None:
    hidden, width, *_ = sizes(preset(family, "tiny"))
    assert hidden % 64 == width % 64 == 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", ["tiny", "small", "layers=1"])
def test_presets_are_what_moefast_and_mlx_lm_take(family: str, size: str) -> None:
    config = preset(family, size)
    model, args = get_classes(config)
    ours = model(args.from_dict(config))
    assert len(ours.layers) == config[layers_field(config)]


def test_tiny_presets_keep_what_only_some_families_have() -> None:
    glm, bailing = preset("glm4_moe"), preset("bailing_moe")
    assert glm["n_group"] > glm["topk_group"]
    assert bailing["n_group"] > bailing["topk_group"]
    assert glm["first_k_dense_replace"] == bailing["first_k_dense_replace"] == 1
    assert glm["attention_bias"]
    assert bailing["moe_router_enable_expert_bias"]
    assert preset("qwen2_moe")["shared_expert_intermediate_size"]
    assert preset("granitemoe")["tie_word_embeddings"]


def test_presets_are_not_shared() -> None:
    preset("dbrx")["ffn_config"]["moe_top_k"] = 99
    assert preset("dbrx")["ffn_config"]["moe_top_k"] == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_small_preset_has_tens_of_millions_of_parameters(family: str) -> None:
    config = preset(family, "small")
    model, args = get_classes(config)
    count = sum(value.size for _, value in tree_flatten(model(args.from_dict(config)).parameters()))
    assert 3e7 < count < 1e8


@pytest.mark.parametrize("size", ["", "big", "layers=0", "layers=47", "layers=x", "layers=-1", "2"])
def test_preset_refuses_a_size(size: str) -> None:
    with pytest.raises(ValueError, match=r"\[preset\] size must be .* N in 1\.\.46, got "):
        preset("glm4_moe", size)


def test_preset_refuses_a_family() -> None:
    with pytest.raises(ValueError, match=r"\[preset\] family must be one of .*, got 'llama'\."):
        preset("llama")
