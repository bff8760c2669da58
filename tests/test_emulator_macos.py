"""The emulator built for macOS, of which there is none here: what the compiler makes is of the right kind,
and what it needs at run time is there. Nothing is run."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import mach_o
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),  # the first time the compiler's own library is built too
    pytest.mark.skipif(find_spec("ziglang") is None, reason="needs the compiler of moefast[emulator]"),
]

# A barrier, simdgroup and matrix operations, atomics, exp, both half types and a frame of several pages.
KERNEL = """#include <metal_stdlib>
using namespace metal;
kernel void k(device float* out [[buffer(0)]], const device float* x [[buffer(1)]],
              device atomic_uint* tally [[buffer(2)]], uint i [[thread_position_in_grid]],
              uint t [[thread_index_in_threadgroup]]) {
  threadgroup float s[64];
  volatile float large[8000];
  large[t] = s[t] = x[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  half h = half(s[63 - t]);
  bfloat b = bfloat(s[t]);
  simdgroup_float8x8 a = make_filled_simdgroup_matrix<float, 8, 8>(1.0f), product;
  simdgroup_multiply(product, a, a);
  atomic_fetch_add_explicit(tally, 1u, memory_order_relaxed);
  float sum = exp(simd_sum(s[63 - t])) + float(h * h + h) + float(b * b + b) + large[t];
  out[i] = sum + product.thread_elements()[0];
}
"""
# The emulator's own steps, on a machine that says it is a Mac.
BUILD = """
import platform, sys
from pathlib import Path
from moefast.emulator import pipeline, runtime
from moefast.emulator.instrument import instrument

machine, out = sys.argv[1], Path(sys.argv[2])
sys.platform, platform.machine = "darwin", lambda: machine
unit = pipeline.front_end(sys.stdin.read(), "k.metal", None, {}, [], {})
(out / "kernel.ll").write_text(unit.ir)
pipeline.library(unit.ir, out / "kernel-run", ["-O2"])
checked = instrument(pipeline.optimise(unit.ir, "-O1")).ir
pipeline.library(checked, out / "kernel-check", ["-O1", "-Xclang", "-disable-llvm-passes"])
pipeline.own_object(pipeline.PACKAGE / "msl" / "air.h", out / "air.o")
print(runtime.folder())
"""


@pytest.mark.parametrize("machine", ["arm64", "x86_64"])
def test_builds_for_macos(machine: str, tmp_path: Path) -> None:
    environment = {**os.environ, "MOEFAST_CACHE": str(tmp_path / "cache"), "MOEFAST_CLANG": ""}
    command = [sys.executable, "-c", BUILD, machine, str(tmp_path)]
    done = subprocess.run(command, input=KERNEL, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    runtime = Path(done.stdout.strip())
    files = {file.name: mach_o.read(file) for file in (runtime / "run.so", runtime / "child")}
    files |= {name: mach_o.read(tmp_path / name) for name in ("kernel-run", "kernel-check", "air.o")}
    assert {file.processor for file in files.values()} == {machine}
    kinds = {name: file.kind for name, file in files.items()}
    assert kinds.pop("child") == "program"
    assert kinds.pop("air.o") == "object"
    assert set(kinds.values()) == {"library"}
    if machine == "arm64":
        assert all(file.signed for name, file in files.items() if name != "air.o")

    assert "_msl_run" in files["run.so"].exported
    for kernel, program in (("kernel-run", "run.so"), ("kernel-check", "child")):
        assert {"_msl_entry", "_msl_parameters"} <= files[kernel].exported
        # All that a kernel asks for is the runtime's, and looked for in what is loaded.
        wanted = files[kernel].wanted
        of_runtime = {name for name in wanted if name.startswith(("_msl_", "___truncsfbf2"))}
        assert "_msl_threadgroup_barrier" in of_runtime
        assert all(wanted[name] for name in of_runtime)
        assert of_runtime <= files[program].exported
        of_system = set(wanted) - of_runtime
        assert of_system <= {"_memcpy", "_memset", "_memmove", "dyld_stub_binder"}, of_system
    # Its large frame is touched page by page.
    assert '"probe-stack"="inline-asm"' in (tmp_path / "kernel.ll").read_text()
    assert any(name.startswith("_msl_check_") for name in files["kernel-check"].wanted)
