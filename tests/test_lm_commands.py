"""``moefast lm``: mlx-lm's commands as real processes, with the results of mlx-lm."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import mlx.core as mx
import mlx_lm
import mlx_lm.cli
import mlx_lm.utils
import pytest
from mlx.utils import tree_flatten

from moefast.acceleration import hook
from moefast.cli import main
from moefast.lm import init_model
from moefast.lm.hand_over import ACCELERATED, UNTOUCHED

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "Once upon a time"
SUMMARY = re.compile(r"^moefast: \d+ MoE blocks.*$", re.MULTILINE)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In float32: the texts of two implementations are the same."""
    return init_model("qwen2_moe", tmp_path_factory.mktemp("lm") / "m", dtype="float32").path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set to train on."""
    folder = tmp_path_factory.mktemp("data")
    lines = [json.dumps({"text": f"The {word} is {word}."}) for word in ("sea", "sky", "sun", "moon")]
    for name in ("train", "valid", "test"):
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def unhooked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a command that runs in this process has changed, undone."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    yield
    hook.uninstall()


def lm(*arguments: object, stdin: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """``moefast lm ...`` as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "moefast", "lm", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **variables},
        timeout=110,
    )


def passed(done: subprocess.CompletedProcess[str], *, accelerated: bool = True) -> str:
    """Standard output of a command that went well."""
    assert done.returncode == 0, done.stderr
    assert (SUMMARY.search(done.stderr) is not None) == accelerated, done.stderr
    return done.stdout


def train(checkpoint: Path, data: Path, adapters: Path, **variables: str) -> str:
    """Two steps of LoRA on the last layer."""
    done = lm(
        *("lora", "--model", checkpoint, "--data", data, "--adapter-path", adapters, "--train", "--test"),
        *("--iters", 2, "--batch-size", 2, "--num-layers", 1, "--steps-per-eval", 1, "--val-batches", 1),
        MLX_DISABLE_COMPILE="1",  # on a CPU it takes half a minute
        **variables,
    )
    return passed(done, accelerated=not variables)


def losses(text: str) -> list[float]:
    """Of validation and test."""
    plain = re.sub("\x1b\\[[0-9;]*m", "", text)
    return [float(loss) for loss in re.findall(r"(?:val|Test loss) +(\d+\.\d+)", plain)]


def test_every_command_of_mlx_lm_has_its_place() -> None:
    scripts = [e.name for e in entry_points(group="console_scripts") if e.name.startswith("mlx_lm.")]
    assert {name.removeprefix("mlx_lm.") for name in scripts} == {*ACCELERATED, *UNTOUCHED}
    assert not set(ACCELERATED) & set(UNTOUCHED)


@pytest.mark.parametrize("arguments", [["lm"], ["lm", "--help"], ["lm", "-h"]])
def test_list(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: object = main(arguments)
    except SystemExit as exit_:
        code = exit_.code
    assert code == 0
    out = capsys.readouterr().out
    assert all(command in out for command in (*ACCELERATED, *UNTOUCHED))
    assert "examples:" in out


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lm", "sing"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("moefast: error: [lm] the command must be one of ('generate', ")
    assert err.count("\n") == 1


def test_arguments_are_mlx_lm_s(unhooked: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(mlx_lm.cli, "main", lambda: seen.append(list(sys.argv)))
    assert main(["lm", "generate", "--model", "x", "--help", "-p", "a  b", "--"]) == 0
    assert seen == [["moefast lm generate", "generate", "--model", "x", "--help", "-p", "a  b", "--"]]


def test_help_is_mlx_lm_s(unhooked: None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["lm", "perplexity", "--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: moefast lm perplexity ")
    assert "--sequence-length" in out


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), ValueError("x"), BrokenPipeError()])
def test_ends_as_mlx_lm_does(error: BaseException, unhooked: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(mlx_lm.cli, "main", fail)
    with pytest.raises(type(error)) as raised:
        main(["lm", "generate"])
    assert raised.value is error


@pytest.mark.parametrize("command", UNTOUCHED)
def test_what_writes_weights_has_no_hook(
    command: str, unhooked: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooked = []
    monkeypatch.setattr(
        mlx_lm.cli, "main", lambda: hooked.append(isinstance(mlx_lm.utils.load_model, hook.Hook))
    )
    hook.install()
    assert main(["lm", command]) == 0
    assert main(["lm", "chat"]) == 0
    assert hooked == [False, True]


WITHOUT = """
import sys
sys.modules[sys.argv[1]] = None  # importing it fails
from moefast.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("package", "command", "extra"),
    [("mlx_lm", "generate", "extra lm"), ("lm_eval", "evaluate", "mlx-lm[evaluate]")],
)
def test_a_missing_extra_is_named(package: str, command: str, extra: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, package, "lm", command, "--model", "x"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=100,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"moefast: error: lm {command} needs {package}: ")
    assert extra in done.stderr
    assert done.stderr.count("\n") == 1


def test_generate(checkpoint: Path) -> None:
    arguments = ("generate", "--model", checkpoint, "--prompt", PROMPT, "-m", 12, "--verbose", "false")
    text = passed(lm(*arguments, "--ignore-chat-template"))
    model, tokenizer = mlx_lm.load(str(checkpoint))
    assert text == mlx_lm.generate(model, tokenizer, prompt=PROMPT, max_tokens=12) + "\n"


def test_benchmark(checkpoint: Path) -> None:
    out = passed(lm("benchmark", "--model", checkpoint, "-p", 16, "-g", 4, "-n", 1, "-b", 2))
    averages = dict(re.findall(r"(\w+)=([\d.]+)", out.split("Averages:")[1]))
    assert float(averages["generation_tps"]) > 0


def test_convert(checkpoint: Path, tmp_path: Path) -> None:
    """What is written is stock mlx-lm's, and so are the names."""
    source = init_model("dbrx", tmp_path / "dbrx", bits=None, dtype="float32").path
    passed(
        lm("convert", "--hf-path", source, "--mlx-path", tmp_path / "q", "-q", "--q-group-size", 32),
        accelerated=False,
    )
    model, _ = mlx_lm.utils.load_model(tmp_path / "q")
    names = dict(tree_flatten(model.parameters()))
    assert "transformer.blocks.0.ffn.experts.3.w1.scales" in names
    assert mx.isfinite(model(mx.array([[1, 2, 3]]))).all()


def test_lora(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    """Training is the original's, to the bit; validation, and what runs the adapters, are accelerated."""
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    got, want = train(checkpoint, data, mine), train(checkpoint, data, theirs, MOEFAST="0")
    assert len(losses(got)) == len(losses(want)) >= 3
    assert losses(got) == pytest.approx(losses(want), abs=1.5e-3)  # printed with three digits
    adapters = [mx.load(str(folder / "adapters.safetensors")) for folder in (mine, theirs)]
    assert adapters[0].keys() == adapters[1].keys()
    assert any("switch_mlp" in name for name in adapters[0])
    assert all(mx.array_equal(array, adapters[1][name]) for name, array in adapters[0].items())


def test_perplexity(checkpoint: Path, tmp_path: Path) -> None:
    """On a data set that takes the place of the package that would download one."""
    (tmp_path / "datasets.py").write_text(
        "class exceptions:\n    DatasetNotFoundError = OSError\n"
        "def load_dataset(name, split, **_):\n"
        "    return [{'text': f'{name} {n} ' + 'and so on ' * 4} for n in range(8)]\n"
    )
    arguments = ("perplexity", "--model", checkpoint, "--sequence-length", 24, "--num-samples", 4)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {"PYTHONPATH": path, "MLX_DISABLE_COMPILE": "1"}
    out = [passed(lm(*arguments, **variables, **off), accelerated=not off) for off in ({}, {"MOEFAST": "0"})]
    perplexity = [float(re.search(r"Perplexity: ([\d.]+)", text)[1]) for text in out]  # type: ignore[index]
    assert perplexity[0] == pytest.approx(perplexity[1], abs=1.5e-3 * perplexity[1])
    assert perplexity[0] > 1


@pytest.mark.skipif(find_spec("datasets") is not None, reason="datasets is installed")
def test_a_package_that_is_missed_later_is_named(checkpoint: Path) -> None:
    done = lm("perplexity", "--model", checkpoint)
    assert done.returncode == 2
    assert done.stderr.endswith("moefast: error: lm perplexity needs datasets: install mlx-lm[train]\n")


@pytest.mark.slow
def test_off(checkpoint: Path) -> None:
    done = lm("generate", "--model", checkpoint, "-p", PROMPT, "-m", 2, MOEFAST="0")
    passed(done, accelerated=False)
    assert "moefast: MOEFAST=0: generate runs as in mlx-lm" in done.stderr


@pytest.mark.slow
def test_errors_of_mlx_lm_are_its_own(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    done = lm("convert", "--hf-path", checkpoint, "--mlx-path", tmp_path / "taken")
    assert done.returncode == 1
    assert "ValueError" in done.stderr


@pytest.mark.slow
def test_chat(checkpoint: Path) -> None:
    arguments = ("chat", "--model", checkpoint, "--max-tokens", 8)
    out = [
        passed(lm(*arguments, stdin="hello\nq\n", **off), accelerated=not off)
        for off in ({}, {"MOEFAST": "0"})
    ]
    assert out[0] == out[1]


@pytest.mark.slow
def test_cached_prompt(checkpoint: Path, tmp_path: Path) -> None:
    """Made accelerated, used by either."""
    cache = tmp_path / "cache.safetensors"
    passed(lm("cache_prompt", "--model", checkpoint, "--prompt", "Long ago", "--prompt-cache-file", cache))
    arguments = ("generate", "--prompt-cache-file", cache, "-p", PROMPT, "-m", 8, "--verbose", "false")
    out = [passed(lm(*arguments, **off), accelerated=not off) for off in ({}, {"MOEFAST": "0"})]
    assert out[0] == out[1]


@pytest.mark.slow
def test_adapters_and_fuse(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    train(checkpoint, data, tmp_path / "a")
    fused = tmp_path / "fused"
    passed(
        lm("fuse", "--model", checkpoint, "--adapter-path", tmp_path / "a", "--save-path", fused),
        accelerated=False,
    )
    with_adapters = ("generate", "--model", checkpoint, "--adapter-path", tmp_path / "a")
    rest = ("-p", PROMPT, "-m", 12, "--verbose", "false")
    text = passed(lm(*with_adapters, *rest))
    assert text == passed(lm(*with_adapters, *rest, MOEFAST="0"), accelerated=False)
    passed(lm("generate", "--model", fused, *rest))
    model, _ = mlx_lm.utils.load_model(fused)
    assert type(model).__module__ == "mlx_lm.models.qwen2_moe"


@pytest.mark.slow
def test_adapters_of_dbrx_are_for_mlx_lm_s_names(data: Path, tmp_path: Path) -> None:
    checkpoint = init_model("dbrx", tmp_path / "m", dtype="float32").path
    done = lm(
        *("lora", "--model", checkpoint, "--data", data, "--adapter-path", tmp_path / "a", "--train"),
        *("--iters", 1, "--batch-size", 1, "--num-layers", 1, "--val-batches", 1),
        MLX_DISABLE_COMPILE="1",
    )
    assert "moefast: DBRX is left to mlx-lm" in done.stderr
    assert done.returncode == 0, done.stderr
    model, _ = mlx_lm.load(str(checkpoint), adapter_path=str(tmp_path / "a"))
    assert type(model).__module__ == "mlx_lm.models.dbrx"
