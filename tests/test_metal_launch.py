"""How kernels reach a compiler: one text without includes, one kernel object, every launch on record."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from metal import emulated, needs_emulator

from moefast import emulator
from moefast.backends import metal
from moefast.backends.metal import launch, source
from moefast.emulator import EmulatorError
from moefast.paths import kernels_dir

pytestmark = needs_emulator

KERNELS = sorted(kernels_dir().glob("*.metal"))

DOUBLE = launch.Function(
    name="double",
    file="common.h",
    inputs=("x",),
    outputs=("y",),
    body="uint i = thread_position_in_grid.x; y[i] = x[i + OFF] + x[i + OFF];",
)


def double(x: mx.array, offset: int = 0) -> mx.array:
    (y,) = DOUBLE(
        [x],
        template=[("OFF", offset)],
        grid=(x.size, 1, 1),
        threadgroup=(min(x.size, 32), 1, 1),
        outputs=[(x.shape, x.dtype)],
    )
    return y


@pytest.mark.parametrize("size", [1, 7, 8, 64])  # fewer than 8 are constant
def test_a_function_runs_and_is_recorded(size: int) -> None:
    x = mx.arange(size, dtype=mx.float32)
    with emulated() as launches:
        y = double(x)
    assert np.array_equal(np.array(y), 2 * np.arange(size))
    (made,) = launches
    assert made.name == "double"
    assert made.inputs["x"] is x
    assert made.outputs["y"] is y
    assert made.result is not None
    assert made.result.counters.buffers["y"].stored == 4 * size


def test_checks_raise() -> None:
    with emulated(), pytest.raises(EmulatorError, match="device-read-out-of-bounds"):
        double(mx.arange(32.0), offset=1)


def test_outside_of_the_block_there_is_no_metal_here() -> None:
    with emulated():
        assert metal.METAL.unavailable is None
    if not mx.metal.is_available():
        assert "no Metal device" in (metal.METAL.unavailable or "")


def test_includes_are_put_in_place_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.h").write_text('#include "b.h"\nint a;\n')
    (tmp_path / "b.h").write_text("#include <metal_stdlib>\nint b;\n")
    (tmp_path / "k.metal").write_text('#include "a.h"\n#include "b.h"\nint k;\n')
    monkeypatch.setattr(source, "kernels_dir", lambda: tmp_path)
    text = source.header_of.__wrapped__("k.metal")
    assert [line for line in text.splitlines() if line] == [
        "#define MOEFAST_JIT",
        "#include <metal_stdlib>",
        "int b;",
        "int a;",
        "int k;",
    ]


@pytest.mark.parametrize("file", KERNELS, ids=lambda file: file.name)
def test_every_file_is_a_translation_unit_with_entry_points(file: Path) -> None:
    text = file.read_text()
    names = [line.split('host_name("')[1].split('"')[0] for line in text.splitlines() if "host_name(" in line]
    assert names, f"{file.name} has no entry points"
    assert "#ifndef MOEFAST_JIT" in text
    for name in names:
        emulator.compile(text, name, include_dirs=[kernels_dir()], name=file.name)


def test_contraction_is_off() -> None:
    multiply = launch.Function(
        name="multiply_add", file="common.h", inputs=("x",), outputs=("y",), body="y[0] = x[0] * x[1] + x[2];"
    )
    third = np.float32(1 / 3)
    with emulated():
        (y,) = multiply(
            [mx.array([float(third), 3.0, -1.0])],
            template=[],
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
            outputs=[((1,), mx.float32)],
        )
    assert float(y[0]) == 0.0  # fused, it would be what the product is short of 1


def test_writes_of_one_value_are_races_here() -> None:
    """MLX's kernels have them, and the emulator would let them pass; ours do without."""
    everyone = launch.Function(
        name="everyone", file="common.h", inputs=("x",), outputs=("y",), body="y[0] = x[0];"
    )
    with emulated(), pytest.raises(EmulatorError, match="device-equal-writes"):
        everyone(
            [mx.array([1.0])],
            template=[],
            grid=(64, 1, 1),
            threadgroup=(32, 1, 1),
            outputs=[((1,), mx.float32)],
        )


@pytest.mark.parametrize("file", sorted(kernels_dir().glob("*.*")), ids=lambda file: file.name)
def test_sources_are_ascii(file: Path) -> None:
    """MLX hands them to Apple's compiler as such."""
    assert file.read_text().isascii()
