"""The command line: help, exit codes, one line per error."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import moefast
from moefast.cli import main

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("lm", "generate", "verify", "init-model", "doctor", "bench")

pytest.importorskip("mlx_lm")


def error(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr, without its start."""
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    return err.removeprefix("moefast: error: ").removesuffix("\n")


def run(*arguments: str, stdin: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """The command as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "moefast", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **variables},
        timeout=100,
    )


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"moefast {moefast.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert "examples:" in out
    assert f"moefast {command}" in out


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(command in out for command in COMMANDS)


@pytest.mark.parametrize("arguments", [[], ["sing"], ["generate"], ["init-model", "--family", "dbrx"]])
def test_bad_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "usage: moefast" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "generate --model /no/where",
            "[load] path must be a directory, or a repository id owner/name, got '/no",
        ),
        ("generate --model . --backend cuda", "[backend] backend must be one of "),
        ("init-model --family gpt2 --out {tmp}/m", "[preset] family must be one of "),
        ("init-model --family dbrx --out {tmp}", "[init_model] out must be empty or new"),
        ("init-model --family dbrx --out {tmp}/m --bits 7", "[QuantSpec] bits must be one of "),
        (
            "init-model --family dbrx --out {tmp}/m --bits four",
            "[init-model] --bits must be a number or none, got 'fo",
        ),
        ("init-model --family dbrx --out {tmp}/m --size layers=99", "[preset] size must be "),
    ],
)
def test_errors_are_one_line(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").touch()
    assert main(arguments.format(tmp=tmp_path).split()) == 2
    assert error(capsys).startswith(message)


def test_paragraphs_of_libraries_become_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("repository not found\n\n  Please log in.\n")

    # By import_module: as an attribute of the package, load is the function.
    monkeypatch.setattr(import_module("moefast.lm.load"), "folder_of", fail)
    assert main(["generate", "--model", "owner/name"]) == 2
    assert error(capsys) == "repository not found Please log in."


def test_interrupt(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moefast.doctor.run", interrupt)
    assert main(["doctor"]) == 130


WITHOUT = """
import sys
sys.modules[sys.argv[1]] = None  # importing it fails
from moefast.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("package", "command"),
    [
        ("mlx_lm", "generate --model {tmp}"),
        ("mlx_lm", "init-model --family dbrx --out {tmp}/m"),
        ("mlx_lm", "bench"),
        ("safetensors", "generate --model {tmp}"),
        ("safetensors", "init-model --family dbrx --out {tmp}/m"),
    ],
)
def test_a_missing_extra_is_named(package: str, command: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "dbrx"}')
    (tmp_path / "model.safetensors").touch()
    arguments = command.format(tmp=tmp_path).split()
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, package, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"moefast: error: {arguments[0]} needs {package}: install moefast with")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "m").exists()


def test_other_import_errors_are_told_as_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: object) -> None:
        raise ImportError("libmlx.so: cannot open shared object file", name="mlx.core")

    monkeypatch.setattr("moefast.doctor.run", fail)
    assert main(["doctor"]) == 2
    assert error(capsys) == "libmlx.so: cannot open shared object file"


def test_bench_gets_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[argparse.Namespace] = []
    fake = ModuleType("moefast.lm.bench.cli")
    fake.add_arguments = lambda parser: parser.add_argument("--laps", type=int)  # type: ignore[attr-defined]
    fake.run = lambda arguments: seen.append(arguments) or 7  # type: ignore[attr-defined]
    import moefast.lm.bench

    monkeypatch.setitem(sys.modules, "moefast.lm.bench.cli", fake)
    monkeypatch.setattr(moefast.lm.bench, "cli", fake, raising=False)
    assert main(["bench", "--laps", "3"]) == 7
    assert seen[0].laps == 3


def test_from_a_shell(tmp_path: Path) -> None:
    """A checkpoint made, generated with, and refused a second time; all as a user would."""
    out = str(tmp_path / "m")
    made = run("init-model", "--family", "bailing_moe", "--out", out, "--bits", "none", "--dtype", "float16")
    assert made.returncode == 0, made.stderr
    assert made.stdout == f"{out}: 4.6 million parameters, 9.2 MB in 4 files\n"
    assert not made.stderr  # no bar where stderr is no terminal

    # mlx-lm sets the second one in this process; here the command must do so for itself.
    variables = {"MOEFAST_BACKEND": "reference", "TRANSFORMERS_NO_ADVISORY_WARNINGS": ""}
    said = run("generate", "--model", out, "-p", "-", "-m", "4", stdin="hello", **variables)
    assert said.returncode == 0, said.stderr
    assert said.stdout.strip()
    # The report alone: nothing of families or libraries that transformers does not find.
    assert said.stderr.startswith("prompt:      11 tokens")
    assert "generation:  4 tokens" in said.stderr

    again = run("init-model", "--family", "bailing_moe", "--out", out)
    assert again.returncode == 2
    assert again.stderr.startswith("moefast: error: [init_model] out must be empty or new")
    assert not again.stdout


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m moefast doctor | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0
    assert not done.stderr


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", {"bits": 4, "group_size": 64, "mode": "affine"}),
        ("--bits 8 --group-size 32", {"bits": 8, "group_size": 32, "mode": "affine"}),
        ("--mode mxfp8", {"bits": 8, "group_size": 32, "mode": "mxfp8"}),
        ("--mode nvfp4", {"bits": 4, "group_size": 16, "mode": "nvfp4"}),
        ("--bits none", None),
        ("--bits 16", None),
    ],
)
def test_init_model_options(
    flags: str, expected: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from moefast.lm.verify import read_json

    assert main(["init-model", "--family", "qwen2_moe", "--out", str(tmp_path / "m"), *flags.split()]) == 0
    assert read_json(tmp_path / "m" / "config.json").get("quantization") == expected
