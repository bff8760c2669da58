"""The GGUF files of ``benchmarks/peers``: the model's weights, under llama.cpp's names and in its order."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from moefast.lm.bench.models import build, draw_weights
from moefast.lm.presets import FAMILIES, preset

gguf = pytest.importorskip("gguf")

FOLDER = Path(__file__).parents[1] / "benchmarks" / "peers"
# What llama.cpp has of the families: the real models', not every feature of the tiny ones.
PLAIN: dict[str, dict[str, Any]] = {
    "glm4_moe": {"n_group": 1, "topk_group": 1},
    "bailing_moe": {
        "use_qk_norm": False,
        "moe_router_enable_expert_bias": False,
        "score_function": "softmax",
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "partial_rotary_factor": 1.0,
        "first_k_dense_replace": 0,
    },
}


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    import gguf_file

    return gguf_file


def model_of(family: str, **changes: Any) -> tuple[Any, dict[str, Any]]:
    config = {**preset(family), **PLAIN.get(family, {}), **changes}
    model = build(config, 4, everywhere=True)
    draw_weights(model, 0)
    return model, config


def read(path: Path) -> dict[str, Any]:
    """Tensors by name, as floats."""
    reader = gguf.GGUFReader(path)
    return {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}


def values(layer: Any) -> Any:
    """Of a quantized layer."""
    scales, biases = layer.scales.astype(mx.float32), layer.biases.astype(mx.float32)
    return np.asarray(
        mx.dequantize(layer.weight, scales, biases, group_size=layer.group_size, bits=layer.bits)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_there(peers: ModuleType, tmp_path: Path, family: str) -> None:
    model, config = model_of(family)
    path = tmp_path / "model.gguf"
    peers.save(path, model, config, "f32")
    found = read(path)
    weights = sum(np.asarray(array).size for array in found.values())
    own = 0
    for _, module in model.named_modules():
        for name, array in module.items():
            if isinstance(array, mx.array) and name not in ("scales", "biases"):
                packed = name == "weight" and "scales" in module
                own += array.size * (8 if packed else 1)
    assert weights == own
    reader = gguf.GGUFReader(path)
    architecture = reader.get_field("general.architecture").contents()
    assert reader.get_field(f"{architecture}.block_count").contents() == len(model.layers)
    assert reader.get_field(f"{architecture}.vocab_size").contents() == config["vocab_size"]


@pytest.mark.parametrize("form", ["f32", "q4_1", "q4_0"])
def test_weights_are_the_models(peers: ModuleType, tmp_path: Path, form: str) -> None:
    model, config = model_of("qwen2_moe")
    peers.save(tmp_path / "model.gguf", model, config, form)
    found = read(tmp_path / "model.gguf")
    layer = model.layers[1]
    for name, own in (
        ("blk.1.ffn_gate_exps.weight", layer.mlp.switch_mlp.gate_proj),
        ("blk.1.ffn_down_exps.weight", layer.mlp.switch_mlp.down_proj),
        ("blk.1.attn_q.weight", layer.self_attn.q_proj),
        ("token_embd.weight", model.model.embed_tokens),
    ):
        want = values(own)
        # q4_1 rounds scales and offsets to float16; q4_0, alike on both sides of 0, cuts one end by a step.
        step = np.abs(np.asarray(own.scales.astype(mx.float32))).max()
        tolerance = {"f32": 0.0, "q4_1": 1e-3 * step, "q4_0": 1.1 * step}[form]
        assert np.abs(found[name] - want).max() <= tolerance
    assert np.array_equal(found["blk.1.ffn_gate_inp.weight"], values(layer.mlp.gate))  # in any form
    norm = np.asarray(layer.input_layernorm.weight.astype(mx.float32))
    assert np.array_equal(found["blk.1.attn_norm.weight"], norm)


def test_rotated_rows_are_neighbours(peers: ModuleType, tmp_path: Path) -> None:
    model, config = model_of("granitemoe")
    peers.save(tmp_path / "model.gguf", model, config, "f32")
    found = read(tmp_path / "model.gguf")
    attention = model.layers[0].self_attn
    heads, half = config["num_attention_heads"], attention.head_dim // 2
    want, got = values(attention.q_proj), found["blk.0.attn_q.weight"]
    for head in range(heads):
        for pair in range(half):
            row = head * 2 * half + 2 * pair
            assert np.array_equal(got[row], want[head * 2 * half + pair])
            assert np.array_equal(got[row + 1], want[head * 2 * half + half + pair])
    assert np.array_equal(found["blk.0.attn_v.weight"], values(attention.v_proj))


def test_fused_projections_come_apart(peers: ModuleType, tmp_path: Path) -> None:
    model, config = model_of("bailing_moe")
    peers.save(tmp_path / "model.gguf", model, config, "f32")
    found = read(tmp_path / "model.gguf")
    fused = values(model.layers[0].attention.query_key_value)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    rows = [len(found[f"blk.0.attn_{name}.weight"]) for name in "qkv"]
    head_dim = len(fused) // (heads + 2 * kv_heads)
    assert rows == [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    assert np.array_equal(found["blk.0.attn_v.weight"], fused[-rows[2] :])


def test_refuses_what_llama_cpp_has_not(peers: ModuleType, tmp_path: Path) -> None:
    model, config = model_of("bailing_moe", use_qk_norm=True)
    with pytest.raises(ValueError, match=r"\[peers\] llama.cpp's bailingmoe must have .* got .*layernorm"):
        peers.save(tmp_path / "model.gguf", model, config, "f32")


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_the_same(peers: ModuleType, tmp_path: Path, family: str) -> None:
    pytest.importorskip("llama_cpp")
    from subjects import LlamaCpp

    model, config = model_of(family)
    path = tmp_path / "model.gguf"
    peers.save(path, model, config, "f32")
    llama = LlamaCpp(path, 2, 64)
    alike = []
    for length in (2, 3, 5, 9, 17):
        tokens = [(7 * i + length) % config["vocab_size"] for i in range(length)]
        got = llama.logits(tokens)
        want = np.asarray(model(mx.array([tokens]))[0, -1].astype(mx.float32))
        alike.append(got @ want / np.sqrt((got @ got) * (want @ want)))
    assert np.median(alike) > 0.999
