"""docs/emulator.md tried as a new user would: its Python runs, its commands print what it says."""

from __future__ import annotations

import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moefast import emulator
from moefast.emulator.__main__ import main
from moefast.env import settings

pytestmark = pytest.mark.skipif(
    find_spec("ziglang") is None and not settings.clang, reason="needs the compiler of moefast[emulator]"
)

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "emulator.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def test_python_and_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks("python"):
        exec(compile(block, "docs/emulator.md", "exec"), names)
    assert names["y"].tolist() == [2.0 * i for i in range(64)]
    np.testing.assert_array_equal(names["result"].buffers[1], names["x"])
    (console,) = blocks("console")
    command, *expected = console.splitlines()
    program, *arguments = shlex.split(command)[1:]
    assert [program, *arguments[:2]] == ["python", "-m", "moefast.emulator"]
    assert main(arguments[2:]) == 1  # findings
    for printed, written in zip(capsys.readouterr().out.splitlines(), expected, strict=False):
        assert printed.startswith(written.removesuffix("..."))


def test_kinds_are_those_there_are() -> None:
    table = TEXT[TEXT.index("| kind | meaning |") :]
    rows = table[: table.index("\n\n")].splitlines()[2:]
    assert {kind for row in rows for kind in re.findall(r"`([a-z-]+)`", row.split("|")[1])} == set(
        emulator.KINDS
    )
