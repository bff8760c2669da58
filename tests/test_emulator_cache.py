"""The cache of compiled kernels: found again, shared by processes, made anew where it is damaged; and the
compiler that is missing or too old."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from moefast import emulator
from moefast.emulator import cache, toolchain
from moefast.env import settings

pytestmark = pytest.mark.skipif(
    find_spec("ziglang") is None and not settings.clang, reason="needs the compiler of moefast[emulator]"
)

SOURCE = "kernel void k(device float* out, uint i [[thread_position_in_grid]]) {{ out[i] = i + {}; }}"


def launches(value: int) -> None:
    kernel = emulator.compile(SOURCE.format(value))
    for mode in ("run", "check"):
        out = np.zeros(64, np.float32)
        emulator.launch(kernel, [out], (64, 1, 1), (64, 1, 1), mode=mode)
        np.testing.assert_array_equal(out, np.arange(64) + value)


def damage(file: Path, how: str) -> None:
    # A new file each time: the old one may be mapped.
    data = file.read_bytes()
    file.unlink()
    if how != "gone":
        file.write_bytes(b"" if how == "empty" else data[: len(data) // 2])


@pytest.mark.parametrize("how", ["gone", "empty", "short"])
def test_damaged_kernel_is_made_anew(how: str) -> None:
    value = 1000 + ["gone", "empty", "short"].index(how)  # a kernel each: they may run at once
    launches(value)
    folder = emulator.compile(SOURCE.format(value)).folder
    for name in (
        "kernel.json",
        "kernel.ll",
        "run/run.so",
        "check/check.so",
        "check/sites.json",
        "sizes.json",
    ):
        damage(folder / name, how)
        launches(value)
        assert cache.is_whole(folder)


@pytest.mark.parametrize("how", ["gone", "empty", "short"])
def test_damaged_index_is_made_anew(how: str) -> None:
    value = int.from_bytes(os.urandom(2))  # not there yet
    launches(value)
    folder = emulator.compile(SOURCE.format(value)).folder
    (index,) = (file for file in cache.root().glob("*.json") if folder.name in file.read_text())
    damage(index, how)
    launches(value)


def test_processes_that_build_the_same_kernel_at_once(tmp_path: Path) -> None:
    program = (
        "import numpy as np\nfrom moefast import emulator\n"
        f"kernel = emulator.compile({SOURCE.format(3)!r})\n"
        "for mode in ('run', 'check'):\n"
        "    out = np.zeros(64, np.float32)\n"
        "    emulator.launch(kernel, [out], (64, 1, 1), (64, 1, 1), mode=mode)\n"
        "    assert out[63] == 66\n"
    )
    # An empty cache: they build the library and the runtime at once, too.
    environment = {**os.environ, "MOEFAST_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", program]
    running = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) for _ in range(2)]
    for process in running:
        assert process.communicate()[1] == b""
        assert process.returncode == 0
    assert not list(tmp_path.glob(".*"))  # nothing half made is left


def test_several_that_repair_the_same_entry_at_once() -> None:
    """Each may take away what is broken just when another wants to."""

    def make(folder: Path) -> None:
        (folder / "made").write_text("whole")

    name = f"repaired-{os.urandom(8).hex()}"
    with ThreadPoolExecutor(8) as threads:
        for _ in range(50):
            place = cache.entry(name, make)
            damage(place / "made", "gone")
            for repaired in threads.map(lambda _: cache.entry(name, make), range(8)):
                assert (repaired / "made").read_text() == "whole"
    shutil.rmtree(place)


def test_cache_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    environment = {**os.environ, "MOEFAST_CACHE": str(file / "folder")}
    command = [sys.executable, "-c", "from moefast.emulator import cache; cache.root()"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"MOEFAST_CACHE must be a folder that can be written, got '{file}" in done.stderr


def test_no_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ziglang", None)
    with pytest.raises(emulator.ToolchainError, match=r"pip install 'moefast\[emulator\]'"):
        toolchain.toolchain.__wrapped__()


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("", "MOEFAST_CLANG must be a clang >= 19, got '.*missing'"),
        ("echo 'clang version 16.0.6'", "must be a clang >= 19, got 'clang version 16.0.6'"),
        ("echo 'gcc (GCC) 14.1'", "must be a clang >= 19, got 'gcc"),
        ("true", "must be a clang >= 19, got ''"),
        ("exit 3", "must be a clang >= 19, got '.*clang'"),
    ],
)
def test_bad_compilers_are_refused(program: str, message: str, tmp_path: Path) -> None:
    clang = tmp_path / ("clang" if program else "missing")
    if program:
        clang.write_text(f"#!/bin/sh\n{program}\n")
        clang.chmod(0o755)
    with pytest.raises(emulator.ToolchainError, match=message):
        toolchain._system_clang(str(clang), ())
