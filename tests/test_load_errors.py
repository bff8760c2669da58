"""What is said of a checkpoint that does not fit its model. What files alone tell: test_verify."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from moefast.backends import registry

pytest.importorskip("mlx_lm")

from moefast.lm import init_model, load

Weights = dict[str, mx.array]
Spoil = Callable[[Path], object]

INDEX = "model.safetensors.index.json"
SECOND = "model-00002-of-00003.safetensors"  # the first layer's file


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``sound(family)``: a tiny quantized checkpoint of two layers, made once."""
    root = tmp_path_factory.mktemp("sound")

    def make(family: str) -> Path:
        path = root / family
        return path if path.exists() else init_model(family, path).path

    return make


@pytest.fixture
def copy(sound: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """``copy(family)``: one to break."""
    return lambda family: Path(shutil.copytree(sound(family), tmp_path / "copy"))


@pytest.fixture(autouse=True)
def default_backend() -> Iterator[None]:
    former = registry.set_default(None)
    yield
    registry.set_default(former)


LAYER = "model.layers.0"
NORM, UP = f"{LAYER}.input_layernorm", f"{LAYER}.mlp.switch_mlp.up_proj"


def case(name: str, spoil: Spoil, message: str, error: type[Exception] = ValueError) -> Any:
    """A row of a table: how to break a checkpoint, and (a regular expression for) what is said of it."""
    return pytest.param(spoil, error, message, id=name)


def tensors(change: Callable[[Weights], Weights]) -> Spoil:
    """Rewrite the first layer's file, and drop the index that no longer fits."""

    def apply(folder: Path) -> None:
        weights = change(mx.load(str(folder / SECOND)))
        mx.eval(weights)
        mx.save_safetensors(str(folder / SECOND), weights)
        (folder / INDEX).unlink()

    return apply


def without(*names: str) -> Spoil:
    return tensors(lambda weights: {k: v for k, v in weights.items() if k not in names})


def having(name: str, value: mx.array) -> Spoil:
    return tensors(lambda weights: {**weights, name: value})


def renamed(former: str, name: str) -> Spoil:
    return tensors(lambda weights: {k.replace(former, name): v for k, v in weights.items()})


def edit_config(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **changes}))


def config(**changes: Any) -> Spoil:
    return lambda folder: edit_config(folder, **changes)


def quantization(layer: str, **entry: Any) -> Spoil:
    def apply(folder: Path) -> None:
        former = json.loads((folder / "config.json").read_text())["quantization"]
        edit_config(folder, quantization={**former, layer: entry})

    return apply


def write(name: str, text: str) -> Spoil:
    return lambda folder: (folder / name).write_text(text)


def remove(name: str) -> Spoil:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        # configuration
        case("no config", remove("config.json"), r"must hold a config\.json, got none", FileNotFoundError),
        case("bad JSON", write("config.json", '{"model_type": '), r"config\.json must be valid JSON, got "),
        case("a list", write("config.json", "[]"), r"config\.json must be a JSON object, got list"),
        case("other family", config(model_type="llama"), "model_type must be one of .*, got 'llama'"),
        case("no family", config(model_type=None), "model_type must be one of .*, got None"),
        case("own code", config(model_file="model.py"), "custom module"),
        # files
        case("no file", remove(SECOND), f"its index names, got no {SECOND}", FileNotFoundError),
        case("truncated", lambda folder: os.truncate(folder / SECOND, 500_000), f"{SECOND} .* 500000 bytes"),
        case("no header", write(SECOND, "0123456789"), f"{SECOND} must be a whole safetensors file"),
        # tensors
        case(
            "missing",
            without(f"{LAYER}.self_attn.q_proj.bias"),
            rf"no '{LAYER}\.self_attn\.q_proj\.bias' \(the rest of its layer is in {SECOND}\)",
        ),
        case("missing scales", without(f"{UP}.scales"), rf"tensor '{UP}\.scales' must be there"),
        case("missing offsets", without(f"{UP}.biases"), rf"no '{UP}\.biases'"),
        case("extra", having(f"{LAYER}.ghost", mx.zeros(2)), rf"unknown '{LAYER}\.ghost' in {SECOND}"),
        case(
            "misspelt",
            renamed("input_layernorm", "input_layer_norm"),
            rf"no '{NORM}\.weight' \(nearest: '{LAYER}\.input_layer_norm\.weight' in {SECOND}\); unknown",
        ),
        case(
            "shape",
            having(f"{NORM}.weight", mx.zeros(255)),
            rf"'{NORM}\.weight' in {SECOND} as float32 \[255\] instead of float32 \[256\]",
        ),
        case(
            "an fp8 weight, which MLX reads as bytes",
            having(f"{NORM}.weight", mx.zeros(256, mx.uint8)),
            rf"'{NORM}\.weight' in {SECOND} as uint8 \[256\] instead of float32",
        ),
        case(
            "other bits than the configuration's",
            quantization(UP, bits=8, group_size=64),
            rf"'{UP}\.weight' in {SECOND} as uint32 \[12, 128, 32\] instead of uint32 \[12, 128, 64\]",
        ),
        case(
            "a whole layer", tensors(lambda _: {"ghost": mx.zeros(1)}), "; and [0-9]+ more like it; unknown"
        ),
        # tokenizer: transformers would make one up
        case("no tokenizer", remove("tokenizer.json"), "must hold a tokenizer", FileNotFoundError),
        case("bad tokenizer", write("tokenizer.json", "{}"), "the tokenizer in .* must be readable"),
    ],
)
def test_broken(spoil: Spoil, error: type[Exception], message: str, copy: Callable[[str], Path]) -> None:
    folder = copy("qwen2_moe")
    spoil(folder)
    with pytest.raises(error, match=message):
        load(folder, backend="reference")
    assert registry.default == "auto"


def test_a_missing_setting(copy: Callable[[str], Path]) -> None:
    folder = copy("qwen2_moe")
    content = json.loads((folder / "config.json").read_text())
    del content["num_experts"]
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"\[qwen2_moe\] .*num_experts"):
        load(folder)


def test_a_layers_last_expert_is_missing(copy: Callable[[str], Path]) -> None:
    """Nothing says that there were more: it shows when the others cannot make a stack."""
    folder = copy("dbrx")
    tensors(lambda w: {k: v for k, v in w.items() if ".experts.7." not in k})(folder)
    rule = r"no '.*switch_mlp\.down_proj\.weight' \(nearest: 'transformer\.blocks\.0\.ffn\.experts\."
    with pytest.raises(ValueError, match=rule):
        load(folder)
