"""The emulator on arm64, under qemu: the same bits as here. Cross-compiled, linked statically, so nothing
is installed."""

from __future__ import annotations

import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moefast import emulator
from moefast.emulator import contraction, pipeline, reflect, toolchain
from moefast.emulator.lexer import Source
from moefast.emulator.structure import read
from moefast.emulator.translate import translate

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),  # the first time the C library is built too
    pytest.mark.skipif(find_spec("ziglang") is None, reason="needs the compiler of moefast[emulator]"),
    pytest.mark.skipif(shutil.which("qemu-aarch64") is None, reason="needs qemu-aarch64"),
]

N = 128
KERNEL = """#include <metal_stdlib>
using namespace metal;
kernel void k(device float* out [[buffer(0)]], const device float* x [[buffer(1)]],
              uint i [[thread_position_in_grid]], uint t [[thread_index_in_threadgroup]]) {
  threadgroup float s[64];
  s[t] = x[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  half h = half(s[63 - t]);
  bfloat b = bfloat(s[t]);
  simdgroup_float8x8 a = make_filled_simdgroup_matrix<float, 8, 8>(1.0f), product;
  simdgroup_multiply(product, a, a);
  out[i] = simd_sum(s[63 - t]) + float(h * h + h) + float(b * b + b) + product.thread_elements()[0];
}
"""
# Arguments and results are denormals, now and then: those of half stay.
FLUSHING = """#include <metal_stdlib>
using namespace metal;
kernel void k(device float* out [[buffer(0)]], const device float* x [[buffer(1)]],
              uint i [[thread_position_in_grid]], uint t [[thread_index_in_threadgroup]]) {
  float small = x[i] * exp2(-129.0f);
  half h = as_type<half>((ushort)(i + 1)) * half(2.0f);
  float sum = small * 0.5f + small, positive = float(small > 0.0f);
  out[i] = i % 4 == 0 ? small : i % 4 == 1 ? positive : i % 4 == 2 ? float(h) : sum;
}
"""
MAIN = """
#include "abi.h"
#include <stdio.h>
using namespace emulator;
extern "C" int msl_run(const Launch*, Outcome*);
extern "C" void msl_entry(void**, const Context*);
static float out[128], x[128];
static void* arguments[kArguments];
int main() {
  for (int i = 0; i < 128; i++) x[i] = (float)(i * 37 % 101) * 0.25f;
  arguments[0] = out;
  arguments[1] = x;
  Launch launch = {};
  launch.entry = (uint64_t)(Entry)msl_entry;
  launch.arguments = (uint64_t)arguments;
  launch.seconds = 60;
  launch.grid[0] = 128;
  launch.threadgroup[0] = 64;
  launch.grid[1] = launch.grid[2] = launch.threadgroup[1] = launch.threadgroup[2] = 1;
  launch.os_threads = 2;
  launch.meets = 1;
  launch.flush = FLUSH;
  Outcome outcome = {};
  if (msl_run(&launch, &outcome) || outcome.status != kFinished) return 1;
  return fwrite(out, sizeof out, 1, stdout) == 1 ? 0 : 1;
}
"""


@pytest.mark.parametrize(("kernel", "denormals"), [(KERNEL, "keep"), (FLUSHING, "keep"), (FLUSHING, "flush")])
def test_same_bits_on_arm64(kernel: str, denormals: Any, tmp_path: Path) -> None:
    zig = toolchain.toolchain().clang[0]
    target = ("-target", "aarch64-linux-musl")
    text = pipeline.preprocess(kernel, "k.metal", [], {}, pipeline.Shown("k.metal", kernel))
    source = Source(text)
    structure = read(source)
    signature = reflect.find(source, structure, None, {})
    translated = translate(source, structure, {}).text + reflect.entry(signature)
    library = str(pipeline.PACKAGE / "msl" / "library.h")
    front = [
        zig,
        "clang",
        *target,
        *pipeline._LANGUAGE,
        "-include",
        library,
        "-S",
        "-emit-llvm",
        "-",
        "-o",
        "-",
    ]
    ir = contraction.contract(toolchain.must(front, translated))
    back = [zig, "clang", *target, "-x", "ir", "-O2", "-fPIC", "-Wno-override-module", "-c", "-"]
    toolchain.must([*back, "-o", str(tmp_path / "k.o")], ir)
    runtime = pipeline.PACKAGE / "runtime"
    (tmp_path / "main.cpp").write_text(MAIN)
    names = ("worker.cpp", "schedule.cpp", "context_switch.cpp", "math.cpp", "half.cpp", "run.cpp")
    sources = [*(str(runtime / name) for name in names), str(tmp_path / "main.cpp"), str(tmp_path / "k.o")]
    flags = ("-static", "-std=c++17", "-O2", "-fno-exceptions", "-fno-rtti", "-nostdinc++", f"-I{runtime}")
    flags += (f"-DFLUSH={int(denormals == 'flush')}",)
    program = str(tmp_path / "program")
    libraries = ("-lm", "-lpthread", "-o", program)
    toolchain.must([zig, "cc", *target, *flags, "-fno-sanitize=all", *sources, *libraries])
    there = subprocess.run(["qemu-aarch64", program], capture_output=True, check=True).stdout

    x = (np.arange(N) * 37 % 101).astype(np.float32) * np.float32(0.25)
    outputs = {0: emulator.Output((N,), np.float32), 1: x}
    here = emulator.launch(emulator.compile(kernel), outputs, (N, 1, 1), (64, 1, 1), denormals=denormals)
    assert there == here.buffers[0].tobytes()
