"""Random checkpoints: the files, the tokenizer, and that nothing is ever half written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from moefast import QuantSpec

pytest.importorskip("mlx_lm")

from mlx_lm.utils import load_model
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from moefast.lm import FAMILIES, init_model, preset
from moefast.lm import checkpoint as checkpoint_module
from moefast.lm.presets import layers_field
from moefast.lm.random_weights import draw

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")

ROOT = Path(__file__).resolve().parents[1]

MODES = [
    *(QuantSpec(bits=bits) for bits in (2, 3, 4, 5, 6, 8)),
    QuantSpec(group_size=32),
    QuantSpec(group_size=128),
    QuantSpec(bits=4, group_size=32, mode="mxfp4"),
    QuantSpec(bits=8, group_size=32, mode="mxfp8"),
    QuantSpec(bits=4, group_size=16, mode="nvfp4"),
]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


# ---- files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_layout(family: str, tmp_path: Path) -> None:
    """One file per layer and one for the rest; an index that says so; sizes as announced."""
    made = init_model(family, tmp_path / "new" / "model")
    config = read(made.path / "config.json")
    index = read(made.path / "model.safetensors.index.json")
    files = sorted(path.name for path in made.path.glob("*.safetensors"))
    assert len(files) == made.num_files == config[layers_field(config)] + 1
    assert files[0] == f"model-00001-of-{made.num_files:05d}.safetensors"
    held = {name: file for file in files for name in mx.load(str(made.path / file))}
    assert index["weight_map"] == held
    stored = [value for file in files for value in mx.load(str(made.path / file)).values()]
    assert index["metadata"]["total_size"] == made.num_bytes == sum(value.nbytes for value in stored)
    model, _ = load_model(made.path, lazy=True)
    from mlx_lm.utils import get_total_parameters

    assert made.num_parameters >= get_total_parameters(model)  # which forgets raw gates
    assert not list(made.path.parent.glob(".*"))
    assert all(path.stat().st_mode & 0o777 == 0o666 & ~umask() for path in made.path.iterdir())


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize(
    ("family", "suffixes"),
    [
        ("granitemoe", ("block_sparse_moe.router.layer", "self_attn.o_proj", "switch_mlp.down_proj")),
        ("bailing_moe", ("mlp.gate.gate_proj",)),
        ("glm4_moe", ()),  # its gate is no layer
        ("qwen2_moe", ()),
        ("dbrx", ()),
    ],
)
def test_config_says_what_each_layer_gets(family: str, suffixes: tuple[str, ...], tmp_path: Path) -> None:
    config = read(init_model(family, tmp_path / "m").path / "config.json")
    quantization = config["quantization"]
    assert config["quantization_config"] == quantization
    assert {k: quantization.pop(k) for k in ("bits", "group_size", "mode")} == QuantSpec().mlx_arguments()
    assert all(entry == {"bits": 8, "group_size": 64} for entry in quantization.values())
    assert all(path.endswith(suffixes) for path in quantization)
    assert bool(quantization) == bool(suffixes)


@pytest.mark.parametrize("quant", MODES, ids=repr)
def test_every_format_loads_in_stock_mlx_lm(quant: QuantSpec, tmp_path: Path) -> None:
    made = init_model("glm4_moe", tmp_path / "m", **quant.mlx_arguments())
    model, _ = load_model(made.path)
    down = model.model.layers[2].mlp.switch_mlp.down_proj
    assert (down.bits, down.group_size, down.mode) == (quant.bits, quant.group_size, quant.mode)
    assert mx.isfinite(model(mx.array([[1, 2, 3]]))).all()


@pytest.mark.parametrize("bits", [None, 16])
def test_unquantized(bits: int | None, tmp_path: Path) -> None:
    made = init_model("dbrx", tmp_path / "m", bits=bits, dtype="float16")
    config = read(made.path / "config.json")
    assert "quantization" not in config
    assert config["torch_dtype"] == "float16"
    model, _ = load_model(made.path)
    assert {value.dtype for _, value in tree_flatten(model.parameters())} == {mx.float16}


def test_equal_arguments_give_equal_files(tmp_path: Path) -> None:
    first, second, other = (
        init_model("bailing_moe", tmp_path / name, seed=seed).path
        for name, seed in (("a", 5), ("b", 5), ("c", 6))
    )
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)
    last = names[-4]
    assert last.endswith(".safetensors")
    assert (first / last).read_bytes() != (other / last).read_bytes()


# ---- tokenizer ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = init_model("bailing_moe", tmp_path_factory.mktemp("tokenizer") / "m").path
    return AutoTokenizer.from_pretrained(path, local_files_only=True)


@pytest.mark.parametrize(
    "text",
    ["", "Hello, world!", "  two  spaces\n\ttabs\r\n", "Grüße, 你好 🦜", "<eos>?", "\x00\x7f", "a" * 999],
)
def test_text_comes_back(tokenizer: Any, text: str) -> None:
    if "<eos>" in text:  # what looks like a special token is one, as with any tokenizer
        assert tokenizer.decode(tokenizer.encode(text)) == f"<bos>{text}"
    else:
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_tokenizer_is_complete(tokenizer: Any) -> None:
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert len(tokenizer) == preset("bailing_moe")["vocab_size"]
    words = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    assert len(set(words[262:])) == len(words) - 262  # past specials and bytes, all different
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == ("<pad>", "<bos>", "<eos>")


def test_chat_template(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<bos><|user|>\nhi\n<|assistant|>\n"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == 8  # the marks are one token each


def test_config_names_the_tokenizers_ids(tmp_path: Path) -> None:
    path = init_model("qwen2_moe", tmp_path / "m").path
    for file in ("config.json", "generation_config.json"):
        content = read(path / file)
        assert [content[f"{name}_token_id"] for name in ("pad", "bos", "eos")] == [0, 1, 2]


# ---- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"family": "gpt2"}, r"\[preset\] family must be one of .*, got 'gpt2'"),
        ({"size": "huge"}, r"\[preset\] size must be"),
        ({"bits": 7}, r"\[QuantSpec\] bits must be one of"),
        ({"group_size": 48}, r"\[QuantSpec\] group_size must be one of"),
        ({"mode": "int4"}, r"\[init_model\] mode must be one of .*, got 'int4'"),
        ({"mode": "mxfp8"}, r"\[QuantSpec\] mode 'mxfp8' needs bits=8"),
        ({"bits": None, "mode": "mxfp4"}, r"\[init_model\] bits=None takes no mode"),
        ({"bits": 16, "group_size": 32}, r"\[init_model\] bits=16 takes no mode and no group_size"),
        ({"dtype": "float64"}, r"dtype must be one of .*, got 'float64'"),
        ({"seed": -1}, r"\[init_model\] seed must be a whole number of at least 0, got -1"),
    ],
)
def test_refusals_leave_nothing(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        init_model(**{"family": "qwen2_moe", "out": tmp_path / "m", **arguments})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_noticed_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr(checkpoint_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"must have \d+ bytes free, got 1000\."):
        init_model("qwen2_moe", tmp_path / "m")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("force", [False, True])
def test_failure_leaves_no_half_checkpoint(
    error: type[BaseException], force: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "m"
    if force:
        init_model("qwen2_moe", target, seed=1)
    former = {path.name: path.read_bytes() for path in target.iterdir()} if force else {}
    drawn = 0

    def fail(*_: Any) -> dict[str, Any]:
        nonlocal drawn
        drawn += 1
        if drawn == 25:  # within the second file
            raise error
        return draw(*_)

    monkeypatch.setattr(checkpoint_module, "draw", fail)
    with pytest.raises(error):
        init_model("qwen2_moe", target, seed=2, force=force)
    assert [path.name for path in tmp_path.iterdir()] == (["m"] if force else [])
    if force:
        assert {path.name: path.read_bytes() for path in target.iterdir()} == former


def be_new(folder: Path) -> None:
    folder.rmdir()


def hold_a_checkpoint(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "old.safetensors").write_text("old")


def hold_other_files(folder: Path) -> None:
    (folder / "thesis.tex").write_text("years")


def hold_folders(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "photos").mkdir()


def be_a_file(folder: Path) -> None:
    folder.rmdir()
    folder.write_text("text")


@pytest.mark.parametrize(
    ("state", "without_force", "with_force"),
    [
        (be_new, None, None),
        (lambda folder: None, None, None),  # an empty folder is as good as none
        (hold_a_checkpoint, "must be empty or new", None),
        (hold_other_files, "must be empty or new", "force replaces only a checkpoint"),
        (hold_folders, "must be empty or new", "force replaces only a checkpoint"),
        (be_a_file, "out must be a directory", "out must be a directory"),
    ],
)
@pytest.mark.parametrize("force", [False, True])
def test_only_a_checkpoint_is_ever_replaced(
    state: Callable[[Path], None],
    without_force: str | None,
    with_force: str | None,
    force: bool,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    state(folder)
    before = sorted(tmp_path.rglob("*"))
    message = with_force if force else without_force
    if message is None:
        init_model("qwen2_moe", folder, force=force)
        assert (folder / "model.safetensors.index.json").is_file()
        assert not (folder / "old.safetensors").exists()
        assert [path.name for path in tmp_path.iterdir()] == ["m"]
    else:
        with pytest.raises(ValueError, match=message):
            init_model("qwen2_moe", folder, force=force)
        assert sorted(tmp_path.rglob("*")) == before


# ---- memory ------------------------------------------------------------------------------------------

MEASURE = """
import resource, sys
from moefast.lm import init_model
import mlx_lm.models.granitemoe, tokenizers, safetensors
init_model("granitemoe", sys.argv[1] + "-warm")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
made = init_model("granitemoe", sys.argv[1], size="layers=5")
unit = 1 if sys.platform == "darwin" else 1024
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit, made.num_bytes)
"""


def test_memory_is_that_of_a_layer(tmp_path: Path) -> None:
    out = tmp_path / "m"
    command = [sys.executable, "-c", MEASURE, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert done.returncode == 0, done.stderr
    grown, num_bytes = map(int, done.stdout.split())
    largest = max(path.stat().st_size for path in out.glob("*.safetensors"))
    assert num_bytes > 4 * largest
    # What a tensor needs while it is drawn comes on top, and what the allocator keeps.
    assert grown < 1.6 * largest
