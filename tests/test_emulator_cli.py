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


def test_reasons_as_json(metal: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path(metal).write_text(SOURCE.replace("y[i] =", "y[i] = nothing +"))
    assert main([metal, "--constant", "0=0", "--json"]) == 2
    (diagnostic,) = json.loads(capsys.readouterr().out)["diagnostics"]
    assert (diagnostic["file"], diagnostic["line"]) == (metal, 6)
    assert "nothing" in diagnostic["message"]


def test_time_limit_as_json(metal: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path(metal).write_text("kernel void k(volatile device int* x) { while (x[0] == 0) {} }")
    command = [metal, "--grid", "1", "--buffer", "0=0:int32", "--time-limit", "0.5", "--json"]
    assert main(command) == 1
    assert [f["kind"] for f in json.loads(capsys.readouterr().out)["findings"]] == ["time-limit"]


@pytest.mark.parametrize(
    ("what", "kind", "expected"),
    [
        ("9007199254740993:int64", "long", [9007199254740993]),  # no double in between
        ("0x10,-1:int32", "int", [16, -1]),
        ("1.5,2:float16", "half", [1.5, 2]),
        ("true,false:bool", "bool", [True, False]),
        ("1.00390625,-3:bfloat16", "ushort", [0x3F80, 0xC040]),
        ("zeros:uint8:2x3", "uchar", [[0, 0, 0], [0, 0, 0]]),
    ],
)
def test_buffers(what: str, kind: str, expected: list[object], metal: str, tmp_path: Path) -> None:
    Path(metal).write_text(f"kernel void k(device {kind}* x) {{ x[0] = x[0]; }}")
    kept = tmp_path / "x.npy"
    assert main([metal, "--grid", "1", "--buffer", f"0={what}", "--save", f"0={kept}"]) == 0
    assert np.load(kept).tolist() == expected


def test_defines_and_constants(metal: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path(metal).write_text(
        "constant float f [[function_constant(2)]];\n#if !defined(A) || B != 7\n#error no\n#endif\n"
        "kernel void k(device float* x) { x[0] = f; }"
    )
    command = [metal, "-D", "A", "-D", "B=7", "--constant", "2=2.5", "--grid", "1"]
    assert main([*command, "--buffer", "0=empty:float32:1"]) == 0
    capsys.readouterr()


def test_equal_writes_are_races_unless_allowed(metal: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path(metal).write_text("kernel void k(device float* x) { x[0] = 1; }")
    command = [metal, "--grid", "64", "--buffer", "0=zeros:float32:1"]
    assert main([*command, "--allow-equal-writes"]) == 0
    assert main(command) == 1
    assert "device-equal-writes" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        ["--grid", "64"],
        ["--grid", "64", "--buffer", "0"],
        ["--grid", "64", "--buffer", "0=zeros:nothing:4"],
        ["--grid", "64", "--buffer", "0=zeros:float32"],
        ["--grid", "64", "--buffer", "0=missing.npy"],
        ["--kernel", "other"],
    ],
    ids=str,
)
def test_bad_launch(metal: str, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([metal, "--constant", "0=0", *options]) == 2
    assert capsys.readouterr().err


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "examples:" in capsys.readouterr().out
