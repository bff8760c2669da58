"""Valid Metal compiles, computes what it must in both modes, and is clean in check mode."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
from emulator_idioms import IDIOMS
from emulator_programs import PROGRAMS, Program

from moefast import emulator
from moefast.env import settings

pytestmark = pytest.mark.skipif(
    find_spec("ziglang") is None and not settings.clang, reason="needs the compiler of moefast[emulator]"
)

THREADS = 64
KERNEL = """#include <metal_stdlib>
using namespace metal;
{outside}
[[kernel]] void probe(device float* results [[buffer(0)]], const device float* x [[buffer(1)]],
                      constant int& n [[buffer(2)]], uint i [[thread_position_in_grid]],
                      uint lane [[thread_index_in_simdgroup]], uint t [[thread_index_in_threadgroup]]) {{
  threadgroup float shared[64];
{inside}
}}
"""
# Programs with nothing outside the kernel share one, which is built once.
TOGETHER = 20
ALL = [*PROGRAMS, *IDIOMS]
ALONE = [program for program in ALL if program.outside]
PLAIN = [program for program in ALL if not program.outside]
GROUPS = [
    *(PLAIN[i : i + TOGETHER] for i in range(0, len(PLAIN), TOGETHER)),
    *([program] for program in ALONE),
]
CONSTANTS = {0: True, 1: 3, 2: 2.5}


def results(programs: list[Program], mode: emulator.Mode) -> np.ndarray:
    room = 8 * THREADS  # some write vectors
    bodies = [
        f"  {{ device float* out = results + {room * k};\n{p.inside}\n  }}" for k, p in enumerate(programs)
    ]
    source = KERNEL.format(outside=programs[0].outside, inside="\n".join(bodies))
    constants = CONSTANTS if "[[function_constant" in source else None
    kernel = emulator.compile(source, "probe", name="programs.metal", function_constants=constants)
    out = np.zeros(room * len(programs), np.float32)
    x = np.linspace(0.1, 1, 2 * THREADS).astype(np.float32)
    buffers = [out, x, np.array([1], np.int32)]
    threads = (THREADS, 1, 1)
    # Most programs do the same in every thread, and some write it to memory that threads share.
    emulator.launch(kernel, buffers, threads, threads, mode=mode, time_limit=20, allow_equal_writes=True)
    return out.reshape(len(programs), room)


@pytest.mark.parametrize("programs", GROUPS, ids=lambda programs: programs[0].name)
def test_programs(programs: list[Program]) -> None:
    ran, checked = results(programs, "run"), results(programs, "check")
    np.testing.assert_array_equal(ran, checked)
    wanted = {p.name: p.result for p in programs if p.result is not None}
    got = {p.name: set(row[:THREADS].tolist()) for p, row in zip(programs, ran, strict=True)}
    assert {name: got[name] for name in wanted} == {name: {result} for name, result in wanted.items()}
