"""python -m moefast.emulator: what it prints, and its exit status."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from moefast.emulator.__main__ import main
from moefast.env import settings

pytestmark = pytest.mark.skipif(
    find_spec("ziglang") is None and not settings.clang, reason="needs the compiler of moefast[emulator]"
)

SOURCE = """#include <metal_stdlib>
using namespace metal;
constant int shift [[function_constant(0)]];
kernel void scale(const device float* x [[buffer(0)]], device float* y [[buffer(1)]],
                  constant int& n [[buffer(2)]], uint i [[thread_position_in_grid]]) {
  y[i] = x[i + shift] * n;
}
"""
BUFFERS = ["--buffer", "0=normal:float32:64", "--buffer", "1=empty:float32:64", "--buffer", "2=3:int32"]


@pytest.fixture
def metal(tmp_path: Path) -> str:
    file = tmp_path / "scale.metal"
    file.write_text(SOURCE)
    return str(file)


def test_signature(metal: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([metal, "--constant", "0=0"]) == 0
    assert "[[buffer(1)]] device y, written" in capsys.readouterr().out


def test_clean(metal: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    kept = tmp_path / "y.npy"
    options = ["--grid", "64", "--seeds", "2", "--save", f"1={kept}"]
    command = [metal, "--constant", "shift=0", *options, *BUFFERS]
    assert main(command) == 0
    assert "scale: 0 findings, 64 threads" in capsys.readouterr().out
    np.testing.assert_array_equal(
        np.load(kept), np.random.default_rng(0).standard_normal(64).astype(np.float32) * np.float32(3)
    )


def test_findings(metal: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([metal, "--constant", "0=1", "--grid", "64", *BUFFERS]) == 1
    assert f"{metal}:6: device-read-out-of-bounds" in capsys.readouterr().out


def test_findings_as_json(metal: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([metal, "--constant", "0=1", "--grid", "64", "--json", *BUFFERS]) == 1
    report = json.loads(capsys.readouterr().out)
    assert [finding["kind"] for finding in report["findings"]] == ["device-read-out-of-bounds"]
    assert report["counters"]["buffers"]["y"]["stored"] == 256


def test_does_not_compile(metal: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path(metal).write_text(SOURCE.replace("y[i] =", "y[i] = nothing +"))
    assert main([metal, "--constant", "0=0"]) == 2
    assert "y[i] = nothing +" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--grid", "64"], ["--grid", "64", "--buffer", "0"]])
def test_bad_launch(metal: str, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([metal, "--constant", "0=0", *options]) == 2
    assert capsys.readouterr().err


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "examples:" in capsys.readouterr().out
