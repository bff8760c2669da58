"""Checkpoints in their original layouts give the model that stacked ones give, bit for bit."""

from __future__ import annotations

import re
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.utils import load_model, quantize_model, save_config, save_model
from model_builders import Weights, ours, parameters, random_weights, theirs, tokens
from model_cases import BASE, FULL, Case, Config, sizes

from moefast.models import get_classes
from moefast.models.checkpoints import stack_experts
from moefast.testing import assert_logits_close

pytestmark = pytest.mark.usefixtures("cpu")

cases = pytest.mark.parametrize("case", FULL, ids=str)


def original_layout(case: Case, weights: Weights) -> Weights:
    """What the authors of the model published: the inverse of ``sanitize``, written from their code."""
    result: Weights = {}
    for path, value in weights.items():
        block, _, name = path.partition(".switch_mlp.")
        if case.family == "granitemoe":
            if name == "gate_proj.weight":
                up = weights[f"{block}.switch_mlp.up_proj.weight"]
                result[f"{block}.input_linear.weight"] = mx.concatenate([value, up], axis=1)
            elif name == "down_proj.weight":
                result[f"{block}.output_linear.weight"] = value
            elif not name:
                result[path] = value
        elif case.family == "dbrx" and name:
            w = {"gate_proj.weight": "w1", "up_proj.weight": "v1", "down_proj.weight": "w2"}[name]
            rows = value.swapaxes(1, 2) if w == "w2" else value  # w2 multiplies from the right
            result[f"{block}.experts.mlp.{w}"] = rows.reshape(-1, rows.shape[-1])
        elif name:
            result |= {f"{block}.experts.{e}.{name}": matrix for e, matrix in enumerate(value)}
        else:
            result[path.replace("gate.gate_proj.weight", "gate.weight")] = value
    return result


def assert_loads_as(original: Weights, stacked: Weights, config: Config) -> None:
    """Both layouts load strictly, into equal models."""
    got, want = ours(config, original), ours(config, stacked)
    mine, other = parameters(got), parameters(want)
    assert mine.keys() == other.keys()
    assert all(mx.array_equal(mine[path], other[path]) for path in mine)
    x = tokens(2, 20)
    assert mx.array_equal(got(x), want(x))


@cases
def test_original_layout(case: Case) -> None:
    stacked = random_weights(ours(case.config, {}))
    original = original_layout(case, stacked)
    assert not any("switch_mlp" in path for path in original)
    assert_loads_as(original, stacked, case.config)


@cases
def test_original_layout_is_also_mlx_lms(case: Case) -> None:
    # Their sanitize reads what original_layout writes: two readers agree on it.
    original = original_layout(case, random_weights(ours(case.config, {})))
    x = tokens(2, 20)
    mine, other = ours(case.config, original), theirs(case.config, original)
    assert_logits_close(mine(x), other(x), **sizes(case.config))


@cases
def test_stray_tensors_are_dropped(case: Case) -> None:
    stacked = random_weights(ours(case.config, {}))
    layers = "transformer.blocks" if case.family == "dbrx" else "model.layers"
    count = case.config.get("num_hidden_layers") or case.config["n_layers"]
    strays = [
        f"{layers}.0.self_attn.rotary_emb.inv_freq",  # saved by old versions of transformers
        "model.rotary_emb.inv_freq",
    ]
    config = case.config
    if case.family in ("glm4_moe", "bailing_moe"):
        # Multi-token prediction: one extra layer in GLM-4.5, more of them elsewhere.
        config = {**config, "num_nextn_predict_layers": 2}
        strays += [
            f"{layers}.{count}.eh_proj.weight",
            f"{layers}.{count}.mlp.experts.0.up_proj.weight",
            f"{layers}.{count + 1}.shared_head.norm.weight",
        ]
    assert_loads_as({**stacked, **{path: mx.ones((2, 2)) for path in strays}}, stacked, config)


@cases
def test_other_surplus_layers_are_not_dropped(case: Case) -> None:
    """A configuration with fewer layers than the checkpoint must not load in silence."""
    layers = "transformer.blocks" if case.family == "dbrx" else "model.layers"
    surplus = f"{layers}.99.input_layernorm.weight"
    assert surplus in ours(case.config, {}).sanitize({surplus: mx.ones((2,))})


@pytest.mark.parametrize("family", ["granitemoe", "glm4_moe", "qwen2_moe", "bailing_moe"])
@pytest.mark.parametrize("bits", [None, 4])
def test_copies_of_tied_embeddings_are_dropped(family: str, bits: int | None) -> None:
    config = {**BASE[family], "tie_word_embeddings": True}
    stacked = parameters(ours(config, bits=bits))
    embedding = "word_embeddings" if family == "bailing_moe" else "embed_tokens"
    copies = {
        path.replace(f"model.{embedding}", "lm_head"): value
        for path, value in stacked.items()
        if embedding in path
    }
    assert len(copies) == (3 if bits else 1)
    assert ours(config, {}).sanitize({**stacked, **copies}).keys() == stacked.keys()


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("case", FULL[1:], ids=str)  # Granite's experts were never published one by one
def test_quantized_experts_one_by_one(case: Case, mode: str, tmp_path: Path) -> None:
    # mlx_lm.convert before the experts were stacked, and of DBRX to this day.
    model, config = ours(case.config), dict(case.config)
    model, config = quantize_model(model, config, group_size=None, bits=None, mode=mode)
    model.eval()  # the layers that quantization makes begin in training
    stacked = parameters(model)
    apart: Weights = {}
    for path, value in stacked.items():
        block, _, name = path.partition(".switch_mlp.")
        if case.family == "dbrx":
            for former, later in (("gate_proj", "w1"), ("up_proj", "v1"), ("down_proj", "w2")):
                name = name.replace(former, later)
        apart |= (
            {f"{block}.experts.{e}.{name}": part for e, part in enumerate(value)} if name else {path: value}
        )
    save_weights(tmp_path, apart, config)
    loaded, _ = load_model(tmp_path, get_model_classes=get_classes)
    got = parameters(loaded)
    assert got.keys() == stacked.keys()
    assert all(mx.array_equal(got[path], stacked[path]) for path in got)
    x = tokens(1, 20)
    assert mx.array_equal(loaded(x), model(x))


def test_dbrx_of_mlx_lm(tmp_path: Path) -> None:
    # What mlx_lm.convert wrote: quantized layers of a Python list of experts.
    other = theirs(BASE["dbrx"], random_weights(ours(BASE["dbrx"], {})))
    other, config = quantize_model(other, dict(BASE["dbrx"]), group_size=64, bits=4)
    save_model(tmp_path, other)
    save_config(config, tmp_path / "config.json")
    loaded, _ = load_model(tmp_path, get_model_classes=get_classes)
    x = tokens(1, 20)
    assert_logits_close(loaded(x), other(x), **sizes(BASE["dbrx"]))


def test_global_scales_are_stacked() -> None:
    weights = {f"experts.{e}.gate_proj.global_scale": mx.array(float(e)) for e in range(3)}
    stack_experts(weights, "experts", "switch_mlp", 3)
    assert weights.keys() == {"switch_mlp.gate_proj.global_scale"}
    assert weights["switch_mlp.gate_proj.global_scale"].tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("case", FULL[1:4], ids=str)
def test_a_gap_among_the_experts_is_reported(case: Case) -> None:
    original = original_layout(case, random_weights(ours(case.config, {})))
    lost = next(path for path in original if re.search(r"experts\.3\.up_proj\.weight", path))
    del original[lost]
    with pytest.raises(ValueError, match=r"experts\.0\.up_proj\.weight|switch_mlp\.up_proj"):
        ours(case.config, original)


@cases
def test_sanitize_leaves_its_own_layout_alone(case: Case) -> None:
    model: nn.Module = ours(case.config, bits=4)
    saved = parameters(model)
    again = model.sanitize(dict(saved))
    assert again.keys() == saved.keys()
    assert all(mx.array_equal(again[path], saved[path]) for path in saved)


def save_weights(folder: Path, weights: Weights, config: Config) -> None:
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    save_config(config, folder / "config.json")
