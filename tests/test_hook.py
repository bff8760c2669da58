"""The hook on mlx-lm's loading: what it changes, what it leaves, and that it goes away again."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import mlx_lm.utils
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

import moefast
from moefast.acceleration import hook
from moefast.acceleration.block import AcceleratedBlock
from moefast.lm import init_model
from moefast.testing import assert_logits_close

STOCK = mlx_lm.utils.load_model
PROMPT = mx.array([[3, 17, 200, 41, 5]])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``checkpoint(family, **options)``: the folder of a tiny one in float32, written once."""
    made: dict[str, Path] = {}

    def make(family: str, **options: Any) -> Path:
        key = f"{family}{sorted(options.items())}"
        if key not in made:
            folder = tmp_path_factory.mktemp(family) / "m"
            made[key] = init_model(family, folder, dtype="float32", **options).path
        return made[key]

    return make


@pytest.fixture(autouse=True)
def hooked() -> Iterator[None]:
    """Every test starts with the hook and leaves mlx-lm as it was."""
    assert hook.install()
    yield
    hook.uninstall()
    mlx_lm.utils.load_model = STOCK


def blocks(model: Any) -> list[Any]:
    return [m for _, m in model.named_modules() if isinstance(m, AcceleratedBlock)]


def names(model: Any) -> set[str]:
    return {name for name, _ in tree_flatten(model.parameters())}


def stock(path: Path, **options: Any) -> Any:
    return STOCK(path, **options)[0]


def assert_same(got: Any, want: Any, model: Any) -> None:
    layers = len(model.layers)
    assert_logits_close(got, want, layers=layers, hidden=128)
    assert mx.array_equal(got.argmax(-1), want.argmax(-1))


def test_load_accelerates(checkpoint: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkpoint("qwen2_moe")
    model, _ = mlx_lm.load(str(path))
    assert len(blocks(model)) == len(model.layers)
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith(f"moefast: {len(model.layers)} MoE blocks")
    assert err.count("\n") == 1
    assert_same(model(PROMPT), stock(path)(PROMPT), model)


def test_whole_report_in_the_log(
    checkpoint: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hook, "settings", replace(hook.settings, log=True))
    mlx_lm.load(str(checkpoint("qwen2_moe")))
    assert "model.layers.0.mlp" in capsys.readouterr().err


def test_installed_once(checkpoint: Any) -> None:
    assert hook.install()
    assert mlx_lm.utils.load_model.__wrapped__ is STOCK
    assert hook.uninstall()
    assert mlx_lm.utils.load_model is STOCK
    assert not hook.uninstall()
    assert not blocks(mlx_lm.load(str(checkpoint("qwen2_moe")))[0])


def test_wrapped_by_another(checkpoint: Any) -> None:
    """Theirs stays, and goes through ours while ours is on."""
    calls = []

    @wraps(mlx_lm.utils.load_model)
    def theirs(*arguments: Any, **named: Any) -> Any:
        calls.append(arguments)
        return ours(*arguments, **named)

    ours = mlx_lm.utils.load_model
    mlx_lm.utils.load_model = theirs
    path = str(checkpoint("qwen2_moe"))
    assert hook.install()
    assert mlx_lm.utils.load_model is theirs
    assert blocks(mlx_lm.load(path)[0])
    assert hook.uninstall()
    assert mlx_lm.utils.load_model is theirs
    assert not blocks(mlx_lm.load(path)[0])
    assert hook.install()
    assert blocks(mlx_lm.load(path)[0])
    assert len(calls) == 3


def test_replaced_by_another(checkpoint: Any) -> None:
    mlx_lm.utils.load_model = STOCK
    assert hook.install()
    assert blocks(mlx_lm.load(str(checkpoint("qwen2_moe")))[0])


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    hook.uninstall()
    monkeypatch.setattr(hook, "settings", replace(hook.settings, enabled=False))
    assert not hook.install()
    assert mlx_lm.utils.load_model is STOCK


def test_errors_are_those_of_mlx_lm(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_moe"}')
    with pytest.raises(FileNotFoundError, match="No safetensors"):
        mlx_lm.utils.load_model(tmp_path)
    with pytest.raises(TypeError, match="required positional argument"):
        mlx_lm.utils.load_model()


def test_lazy_loading_stays_lazy(checkpoint: Any) -> None:
    path = checkpoint("qwen2_moe", bits=None)
    mx.clear_cache()
    before = mx.get_active_memory()
    model, _ = mlx_lm.utils.load_model(path, lazy=True)
    size = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    assert mx.get_active_memory() - before < size / 20
    assert blocks(model)


def test_sharded_load(checkpoint: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Of one process; it loads twice and says so once."""
    path = checkpoint("glm4_moe")
    model, _ = mlx_lm.utils.sharded_load(str(path))
    assert capsys.readouterr().err.count("moefast:") == 1
    assert_same(model(PROMPT), stock(path)(PROMPT), model)


def test_adapters(checkpoint: Any, tmp_path: Path) -> None:
    """Loaded after the hook: adapted experts run as they are, the text is that of the plain model."""
    path = checkpoint("qwen2_moe")
    parameters = {"rank": 2, "scale": 1.0, "dropout": 0.0}
    adapted = stock(path)
    linear_to_lora_layers(adapted, 1, parameters)
    adapters = {
        name: mx.random.normal(array.shape) * 0.1
        for name, array in tree_flatten(adapted.parameters())
        if name.endswith(("lora_a", "lora_b"))
    }
    assert any("switch_mlp" in name for name in adapters)
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), adapters)
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"num_layers": 1, "lora_parameters": parameters})
    )
    model, _ = mlx_lm.load(str(path), adapter_path=str(tmp_path))
    hook.uninstall()
    plain, _ = mlx_lm.load(str(path), adapter_path=str(tmp_path))
    assert blocks(model)
    assert not blocks(plain)
    assert_same(model(PROMPT), plain(PROMPT), plain)
    assert not mx.array_equal(plain(PROMPT).argmax(-1), stock(path)(PROMPT).argmax(-1))


@pytest.mark.parametrize("bits", [None, 4])
def test_dbrx_has_stacked_experts(bits: int | None, checkpoint: Any, capsys: Any) -> None:
    path = checkpoint("dbrx", bits=bits)
    model, _ = mlx_lm.load(str(path))
    assert type(model).__module__ == "moefast.models.dbrx"
    assert "moefast.models.dbrx" in capsys.readouterr().err
    assert_same(model(PROMPT), stock(path)(PROMPT), model)


def test_dbrx_left_to_mlx_lm(checkpoint: Any, capsys: Any) -> None:
    path = checkpoint("dbrx")
    hook.install(dbrx=False)
    model, _ = mlx_lm.load(str(path))
    assert (
        dict(tree_flatten(model.parameters())).keys() == dict(tree_flatten(stock(path).parameters())).keys()
    )
    assert type(model).__module__ == "mlx_lm.models.dbrx"
    assert capsys.readouterr().err.startswith("moefast: DBRX is left to mlx-lm")


def test_dbrx_that_cannot_be_stacked(checkpoint: Any, tmp_path: Path) -> None:
    """An expert quantized unlike its neighbours loads in mlx-lm, and so it does here."""
    path = checkpoint("dbrx")
    model, config = STOCK(path)
    expert = model.layers[0].ffn.experts[1]
    weight = mx.dequantize(
        expert.w1.weight, expert.w1.scales, expert.w1.biases, expert.w1.group_size, expert.w1.bits
    )
    expert.w1.bits = 8
    expert.w1.weight, expert.w1.scales, expert.w1.biases = mx.quantize(weight, expert.w1.group_size, 8)
    mlx_lm.utils.save_model(tmp_path, model)
    mlx_lm.utils.save_config(config, tmp_path / "config.json")
    loaded, _ = mlx_lm.utils.load_model(tmp_path)
    assert type(loaded).__module__ == "mlx_lm.models.dbrx"
    assert_same(loaded(PROMPT), model(PROMPT), model)


def test_a_caller_s_own_classes_are_kept(checkpoint: Any) -> None:
    path = checkpoint("dbrx")
    asked = []

    def classes(config: dict[str, Any]) -> Any:
        asked.append(config["model_type"])
        return mlx_lm.utils._get_classes(config)

    model, _ = mlx_lm.utils.load_model(path, get_model_classes=classes)
    assert asked == ["dbrx"]
    assert type(model).__module__ == "mlx_lm.models.dbrx"
    positional, _ = mlx_lm.utils.load_model(path, False, True, None, classes)
    assert type(positional).__module__ == "mlx_lm.models.dbrx"


def test_models_of_moefast_are_left_alone(checkpoint: Any, capsys: Any) -> None:
    model, _ = moefast.load(checkpoint("qwen2_moe"))
    assert type(model).__module__ == "moefast.models.qwen2_moe"
    assert not blocks(model)
    assert not capsys.readouterr().err


AUTOLOAD = """
import sys
{before}
import moefast.autoload
assert {eager} == ("mlx_lm" in sys.modules), "imported by autoload"
import mlx_lm.utils
from moefast.acceleration.hook import Hook
print(isinstance(mlx_lm.utils.load_model, Hook), mlx_lm.utils.__loader__.__class__.__name__)
import moefast.autoload, importlib
importlib.reload(moefast.autoload)
assert not isinstance(getattr(mlx_lm.utils.load_model, "__wrapped__", None), Hook)
"""


@pytest.mark.parametrize("before", ["", "import mlx_lm"])
@pytest.mark.parametrize("enabled", ["1", "0"])
def test_autoload(before: str, enabled: str) -> None:
    program = AUTOLOAD.format(before=before, eager=bool(before))
    done = subprocess.run(
        [sys.executable, "-c", f"import os; os.environ['MOEFAST'] = '{enabled}'\n{program}"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[1],
        timeout=100,
    )
    assert (done.stderr, done.returncode) == ("", 0)
    assert done.stdout == f"{enabled == '1'} SourceFileLoader\n"
