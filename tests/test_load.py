"""Loading: the same model as mlx-lm's, from every layout a checkpoint comes in."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn
import pytest
from mlx.utils import tree_flatten

import moefast
from moefast.backends import registry

pytest.importorskip("mlx_lm")

import mlx_lm
from mlx_lm.sample_utils import make_sampler
from mlx_lm.utils import quantize_model, save_config, save_model

from moefast.lm import FAMILIES, generate, init_model, load

Weights = dict[str, mx.array]
Folder = Callable[..., Path]

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")

PROMPT = "Which experts?"
INDEX = "model.safetensors.index.json"


@pytest.fixture(autouse=True)
def default_backend() -> Iterator[None]:
    """A load may change the process's default."""
    former = registry.set_default(None)
    yield
    registry.set_default(former)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """``made(family, **options)``: a tiny checkpoint, made once per module; not to be changed."""
    root = tmp_path_factory.mktemp("made")

    def make(family: str, **options: Any) -> Path:
        path = root / "-".join([family, *map(str, options.values())])
        return path if path.exists() else init_model(family, path, **options).path

    return make


@pytest.fixture
def spoilt(made: Folder, tmp_path: Path) -> Folder:
    """A copy to break. qwen2_moe unless another family is named; quantized."""

    def copy(family: str = "qwen2_moe", **options: Any) -> Path:
        return Path(shutil.copytree(made(family, **options), tmp_path / "spoilt"))

    return copy


def parameters(model: mlx.nn.Module) -> Weights:
    return dict(tree_flatten(model.parameters()))


def stored(folder: Path) -> Weights:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in mx.load(str(file)).items()}


def rewrite(folder: Path, weights: Weights) -> Path:
    """The same checkpoint with other tensors, in one file and without an index."""
    mx.eval(weights)
    for file in [*folder.glob("*.safetensors"), folder / INDEX]:
        file.unlink()
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


def quantizations(model: mlx.nn.Module) -> dict[str, tuple[int, int, str]]:
    return {
        path: (module.bits, module.group_size, module.mode)
        for path, module in model.named_modules()
        if hasattr(module, "bits")
    }


def assert_same(first: mlx.nn.Module, second: mlx.nn.Module) -> None:
    a, b = parameters(first), parameters(second)
    assert a.keys() == b.keys()
    different = [k for k in a if a[k].dtype != b[k].dtype or not mx.array_equal(a[k], b[k])]
    assert not different


# ---- the same model as mlx-lm's ----------------------------------------------------------------------


def texts(path: Path, tokens: int = 24) -> list[tuple[str, str]]:
    """Greedy and sampled text of moefast, each with that of mlx-lm."""
    ours, theirs = load(path), mlx_lm.load(str(path))
    chat = theirs[1].apply_chat_template([{"role": "user", "content": PROMPT}], add_generation_prompt=True)
    pairs = []
    for temp in (0.0, 1.0):
        mine = generate(*ours, PROMPT, max_tokens=tokens, temp=temp, seed=7)
        mx.random.seed(7)
        stock = mlx_lm.generate(*theirs, chat, max_tokens=tokens, sampler=make_sampler(temp))
        pairs.append((mine, stock))
    return pairs


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [None, 4])
def test_generates_mlx_lms_text(family: str, bits: int | None, made: Folder) -> None:
    """In float32, where MLX's CPU is an oracle. Sampling notices differences that greedy text hides."""
    for mine, stock in texts(made(family, bits=bits, dtype="float32")):
        assert mine == stock
        assert mine


@pytest.mark.slow
def test_generates_mlx_lms_text_at_real_layer_sizes(tmp_path: Path) -> None:
    made = init_model("granitemoe", tmp_path / "m", size="layers=2", dtype="float32")
    for mine, stock in texts(made.path, 8):
        assert mine == stock


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_have_the_precision_that_mlx_lm_gives_them(family: str, made: Folder) -> None:
    path = made(family)
    ours, theirs = quantizations(load(path)[0]), quantizations(mlx_lm.load(str(path))[0])
    if family == "dbrx":  # whose experts mlx-lm keeps apart
        experts = r"\.experts\.\d+\.\w+$"
        assert {q for k, q in theirs.items() if re.search(experts, k)} == {(4, 64, "affine")}
        assert {q for k, q in ours.items() if "switch_mlp" in k} == {(4, 64, "affine")}
        theirs = {k: q for k, q in theirs.items() if not re.search(experts, k)}
        ours = {k: q for k, q in ours.items() if "switch_mlp" not in k}
    assert ours == theirs
    high = [path for path, (bits, *_) in ours.items() if bits == 8]
    assert bool(high) == (family in ("granitemoe", "bailing_moe"))


@pytest.mark.parametrize("says", ["per layer", "default only"])
def test_mixed_precision(says: str, made: Folder, tmp_path: Path) -> None:
    """Bits per layer out of config.json, or, where it does not tell, out of the shapes."""
    folder = Path(shutil.copytree(made("qwen2_moe", bits=None, dtype="float32"), tmp_path / "m"))
    model, _, config = mlx_lm.load(str(folder), return_config=True)
    wanted = {
        "model.layers.0.mlp.switch_mlp.up_proj": {"bits": 8, "group_size": 32},
        "model.layers.1.mlp.switch_mlp.down_proj": {"bits": 6, "group_size": 64},
        "model.layers.1.self_attn.q_proj": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
        "lm_head": False,
    }
    model, config = quantize_model(model, config, 64, 4, quant_predicate=lambda p, _: wanted.get(p, True))
    for file in folder.glob("model*"):
        file.unlink()
    save_model(folder, model)
    if says == "default only":
        config["quantization"] = {"bits": 4, "group_size": 64}
    save_config(config, folder / "config.json")
    found = quantizations(load(folder)[0])
    assert found["model.layers.0.mlp.switch_mlp.up_proj"] == (8, 32, "affine")
    assert found["model.layers.1.mlp.switch_mlp.down_proj"] == (6, 64, "affine")
    assert found["model.layers.1.self_attn.q_proj"] == (4, 32, "mxfp4")
    assert found["model.layers.0.mlp.switch_mlp.down_proj"] == (4, 64, "affine")
    assert "lm_head" not in found


# ---- layouts -----------------------------------------------------------------------------------------


def apart(weights: Weights) -> Weights:
    """Stacks as one tensor per expert, quantized or not: Qwen2-MoE, GLM, Bailing as their makers publish."""
    result: Weights = {}
    for name, value in weights.items():
        if ".switch_mlp." in name:
            for expert in range(value.shape[0]):
                result[name.replace(".switch_mlp.", f".experts.{expert}.")] = value[expert]
        else:
            result[name.replace(".gate.gate_proj.weight", ".gate.weight")] = value
    return result


def fused(weights: Weights) -> Weights:
    """Granite as published: gate and up in one ``input_linear``, down as ``output_linear``."""
    result = {k: v for k, v in weights.items() if ".switch_mlp." not in k}
    for name, gate in weights.items():
        block, found, part = name.partition(".switch_mlp.gate_proj.")
        if found:
            up, down = (weights[f"{block}.switch_mlp.{p}_proj.{part}"] for p in ("up", "down"))
            result[f"{block}.input_linear.{part}"] = mx.concatenate([gate, up], axis=1)
            result[f"{block}.output_linear.{part}"] = down
    return result


def flat(weights: Weights) -> Weights:
    """DBRX as published: a layer's experts in three matrices, w2 transposed."""
    result = {k: v for k, v in weights.items() if ".experts." not in k}
    for name in weights:
        if found := re.fullmatch(r"(.*\.experts)\.0\.(w1|v1|w2)\.weight", name):
            block, part = found.groups()
            experts = [weights[f"{block}.{e}.{part}.weight"] for e in range(8)]
            result[f"{block}.mlp.{part}"] = mx.concatenate([w.T if part == "w2" else w for w in experts])
    return result


def with_unused(weights: Weights) -> Weights:
    """What checkpoints carry along and no layer reads: GLM's multi-token prediction layer."""
    return {**apart(weights), "model.layers.3.eh_proj.weight": mx.zeros((2, 4))}


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("granitemoe", fused),
        ("glm4_moe", apart),
        ("glm4_moe", with_unused),
        ("qwen2_moe", apart),
        ("bailing_moe", apart),
        ("dbrx", flat),
    ],
)
def test_original_layouts(family: str, layout: Callable[[Weights], Weights], spoilt: Folder) -> None:
    folder = spoilt(family, bits=None, dtype="float16")
    expected, _ = load(folder)
    mx.eval(expected.parameters())
    model, _ = load(rewrite(folder, layout(stored(folder))))
    assert_same(model, expected)


@pytest.mark.parametrize("family", ["glm4_moe", "qwen2_moe", "bailing_moe"])
def test_quantized_experts_one_by_one(family: str, spoilt: Folder) -> None:
    folder = spoilt(family)
    expected, _ = load(folder)
    mx.eval(expected.parameters())
    weights = apart(stored(folder))
    if family == "bailing_moe":  # a quantized router keeps mlx-lm's name
        weights = {k.replace(".gate.weight", ".gate.gate_proj.weight"): v for k, v in weights.items()}
    model, _ = load(rewrite(folder, weights))
    assert_same(model, expected)


@pytest.mark.parametrize("bits", [None, 4])
def test_stacked_dbrx(bits: int | None, spoilt: Folder) -> None:
    folder = spoilt("dbrx", bits=bits)
    expected, _ = load(folder)
    model, _ = load(rewrite(folder, parameters(expected)))
    assert_same(model, expected)


def test_one_file_without_index(spoilt: Folder) -> None:
    folder = spoilt()
    expected, _ = load(folder)
    model, _ = load(rewrite(folder, stored(folder)))
    assert_same(model, expected)


def test_experts_that_cannot_be_arranged(spoilt: Folder) -> None:
    """They are named with their file and shape."""
    folder = spoilt("dbrx", bits=None, dtype="float16")
    name = "transformer.blocks.0.ffn.experts.mlp.w1"
    rewrite(folder, {**flat(stored(folder)), name: mx.zeros((1023, 256))})
    with pytest.raises(
        ValueError, match=rf"while arranging .*'{name}' of shape \[1023, 256\] in model\.safe"
    ):
        load(folder)


# ---- arguments ---------------------------------------------------------------------------------------


def test_the_model_is_ready_and_its_own_class(made: Folder) -> None:
    model, tokenizer = moefast.load(made("qwen2_moe"))
    assert not model.training
    assert type(model).__module__ == "moefast.models.qwen2_moe"
    assert not {"load_weights", "sanitize"} & vars(model).keys()
    assert tokenizer.eos_token_ids == {2}


def test_lazy_reads_nothing(made: Folder) -> None:
    path = made("qwen2_moe")
    mx.clear_cache()
    before = mx.get_active_memory()
    lazy, _ = load(path, lazy=True)
    assert mx.get_active_memory() - before < 100_000
    assert_same(lazy, load(path)[0])


def test_backend_becomes_the_default(made: Folder) -> None:
    load(made("qwen2_moe"))
    assert registry.default == "auto"
    load(made("qwen2_moe"), backend="reference")
    assert registry.default == "reference"


def test_an_unknown_backend_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\[backend\] backend must be one of .*, got 'cuda'\."):
        load(tmp_path / "nowhere", backend="cuda")


def test_an_unavailable_backend_is_refused_with_its_reason(
    made: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = moefast.registry.Backend("absent", {}, probe=lambda: "no such chip")
    monkeypatch.setattr(registry, "backends", (absent, *registry.backends))
    with pytest.raises(
        ValueError, match=r"\[load\] backend 'absent' must be able to run here, got no such chip\."
    ):
        load(made("qwen2_moe"), backend="absent")


@pytest.mark.parametrize("path", ["nowhere", "/no/where", "./a/b", "a/b/c", "~/no such place"])
def test_a_path_that_is_not_there(path: str) -> None:
    with pytest.raises(
        FileNotFoundError,
        match=re.escape(f"or a repository id owner/name, got {path!r}."),
    ):
        load(path)


def test_a_path_is_never_a_repository() -> None:
    with pytest.raises(FileNotFoundError, match="must be a directory"):
        load(Path("owner/name"))


def test_repositories_are_mlx_lms_to_fetch(made: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repo: str) -> Path:
        asked.append(repo)
        return made("qwen2_moe")

    monkeypatch.setattr(
        "mlx_lm.utils._download", lambda path, **_: path if Path(path).exists() else download(path)
    )
    load("owner/name")
    assert asked == ["owner/name"]


def test_a_file_is_no_checkpoint(made: Folder) -> None:
    with pytest.raises(
        ValueError, match=r"\[load\] path must be a directory with a config\.json, got .*config\.json\."
    ):
        load(made("qwen2_moe") / "config.json")


def test_weights_go_into_huge_pages(made: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[mlx.nn.Module] = []
    monkeypatch.setattr(sys.modules[load.__module__], "huge_pages", moved.append)
    model, _ = load(made("qwen2_moe"))
    assert [id(one) for one in moved] == [id(model)]
