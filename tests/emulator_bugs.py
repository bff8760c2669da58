"""Kernels with one bug each, and their clean twins."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from moefast import emulator

THREADS = 64

KERNEL = """#include <metal_stdlib>
using namespace metal;
constant float table[4] = {1, 2, 3, 4};
BEFORE
[[kernel]] void probe(device float* out [[buffer(0)]], const device float* x [[buffer(1)]],
                      device float* scratch [[buffer(2)]], device atomic_uint* tally [[buffer(3)]],
                      uint i [[thread_position_in_grid]], uint t [[thread_index_in_threadgroup]],
                      uint group [[threadgroup_position_in_grid]], uint lane [[thread_index_in_simdgroup]]) {
BODY
}
"""
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
DEVICE_BARRIER = "threadgroup_barrier(mem_flags::mem_device);"


class Bug(NamedTuple):
    """``line`` is the text of the line that must be named; ``groups``: threadgroups of 64 threads;
    ``before``: what comes before the kernel."""

    kind: str
    bad: str
    good: str
    line: str
    groups: int = 1
    buffer: str = ""
    before: str = ""


SUM = f"""threadgroup float s[64];
s[t] = x[i];
{BARRIER}
for (uint k = 32; k > 0; k >>= 1) {{
  if (t < k) s[t] += s[t + k];
  {BARRIER}
}}
out[i] = s[0];"""

ROUNDS = f"""threadgroup float s[64]; float sum = 0;
for (uint k = 0; k < 4; k++) {{
  s[t] = x[i];
  {BARRIER}
  sum += s[63 - t];
  AGAIN
}}
out[i] = sum;"""

ADD = "atomic_fetch_add_explicit(tally, 1u, memory_order_relaxed);"
SIMD_BARRIER = "simdgroup_barrier(mem_flags::mem_threadgroup);"

BUGS = {
    "read beyond the end": Bug(
        "device-read-out-of-bounds", "out[i] = x[i + 1];", "out[i] = x[i];", "x[i + 1]", buffer="x"
    ),
    "read before the start": Bug(
        "device-read-out-of-bounds",
        "out[i] = x[int(i) - 1];",
        "out[i] = x[max(int(i) - 1, 0)];",
        "int(i) - 1",
        buffer="x",
    ),
    "read far beyond": Bug(
        "device-read-out-of-bounds", "out[i] = x[i + 100000000];", "out[i] = x[i];", "100000000", buffer="x"
    ),
    "write beyond the end": Bug(
        "device-write-out-of-bounds", "out[i * 2] = 1;", "out[i] = 1;", "out[i * 2]", buffer="out"
    ),
    "vector half outside": Bug(
        "device-read-out-of-bounds",
        "out[i] = i == 0 ? ((const device packed_float4*)(x + 62))[0][3] : 0;",
        "out[i] = i == 0 ? ((const device packed_float4*)(x + 60))[0][3] : 0;",
        "packed_float4",
        buffer="x",
    ),
    "threadgroup write outside": Bug(
        "threadgroup-write-out-of-bounds",
        f"threadgroup float s[64]; s[t] = 0; {BARRIER}\ns[t * 2] = x[i];\n{BARRIER} out[i] = s[t];",
        f"threadgroup float s[128]; s[t] = 0; {BARRIER}\ns[t * 2] = x[i];\n{BARRIER} out[i] = s[t * 2];",
        "s[t * 2]",
    ),
    "threadgroup read outside": Bug(
        "threadgroup-read-out-of-bounds",
        f"threadgroup float s[64]; s[t] = 0; {BARRIER}\nout[i] = s[t + 1];",
        f"threadgroup float s[64]; s[t] = 0; {BARRIER}\nout[i] = s[63 - t];",
        "s[t + 1]",
    ),
    "threadgroup read before it is written": Bug(
        "threadgroup-uninitialised",
        SUM.replace("s[t] = x[i];", "if (t < 60) s[t] = x[i];"),
        SUM,
        "s[t] += s[t + k]",
    ),
    "output read before it is written": Bug(
        "device-uninitialised",
        "out[i] = scratch[i] + x[i];",
        "scratch[i] = 1;\nout[i] = scratch[i] + x[i];",
        "scratch[i] + x[i]",
        buffer="scratch",
    ),
    "misaligned": Bug(
        "misaligned",
        "out[i] = i < 15 ? ((const device float4*)(x + 1))[i].x : 0;",
        "out[i] = i < 15 ? ((const device float4*)(x + 4))[i].x : 0;",
        "float4*",
        buffer="x",
    ),
    "first barrier missing": Bug("threadgroup-race", SUM.replace(BARRIER, "", 1), SUM, "s[t] += s[t + k]"),
    "barrier in a loop missing, values right": Bug(
        # Every round writes the same values: only the race itself tells.
        "threadgroup-race",
        ROUNDS.replace("AGAIN", ""),
        ROUNDS.replace("AGAIN", BARRIER),
        "s[t] = x[i]",
    ),
    "simdgroup barrier between simdgroups": Bug(
        "threadgroup-race",
        f"threadgroup float s[64]; s[t] = x[i];\n{SIMD_BARRIER}\nout[i] = s[t ^ 32];",
        f"threadgroup float s[64]; s[t] = x[i];\n{SIMD_BARRIER}\nout[i] = s[t ^ 1];",
        "s[t ^ 32]",
    ),
    "barrier that fences other memory": Bug(
        "threadgroup-race",
        f"threadgroup float s[64]; s[t] = x[i];\n{DEVICE_BARRIER}\nout[i] = s[t ^ 1];",
        f"threadgroup float s[64]; s[t] = x[i];\n{BARRIER}\nout[i] = s[t ^ 1];",
        "s[t ^ 1]",
    ),
    "device race within a threadgroup": Bug(
        "device-race",
        f"scratch[t] = x[i];\n{BARRIER}\nout[i] = scratch[t ^ 1];",
        f"scratch[t] = x[i];\n{DEVICE_BARRIER}\nout[i] = scratch[t ^ 1];",
        "scratch[t ^ 1]",
        buffer="scratch",
    ),
    "device race between threadgroups": Bug(
        "device-race",
        "scratch[t] = x[i]; out[i] = 0;",
        "scratch[i] = x[i]; out[i] = 0;",
        "scratch[t] = x[i]",
        groups=2,
        buffer="scratch",
    ),
    "write after another threadgroup's read": Bug(
        "device-race",
        "if (group == 0) { scratch[i] = 1;\n out[i] = scratch[i]; } else {\n out[i] = 0; scratch[t] = 2;\n}",
        "if (group == 0) { scratch[i] = 1;\n out[i] = scratch[i]; } else {\n out[i] = 0; scratch[i] = 2;\n}",
        "scratch[t] = 2",
        groups=2,
        buffer="scratch",
    ),
    "plain read of a tally": Bug(
        "device-race",
        "atomic_fetch_add_explicit(tally, 1u, memory_order_relaxed);\nout[i] = ((device uint*)tally)[0];",
        "atomic_fetch_add_explicit(tally, 1u, memory_order_relaxed);\nout[i] = 0;",
        "((device uint*)tally)[0]",
        groups=2,
        buffer="tally",
    ),
    "atomic and plain write": Bug(
        "device-race",
        f"{ADD}\nif (t == 5) ((device uint*)tally)[0] = 7u;",
        f"{ADD}\nif (t == 5) ((device uint*)tally)[1] = 7u;",
        "= 7u",
        buffer="tally",
    ),
    "atomic after another threadgroup's plain read": Bug(
        "device-race",
        f"if (group == 0) {{ out[i] = ((device uint*)tally)[0];\n}} else {{ out[i] = 0; {ADD} }}",
        f"if (group == 0) {{ out[i] = ((device uint*)tally)[1];\n}} else {{ out[i] = 0; {ADD} }}",
        "atomic_fetch_add",
        groups=2,
        buffer="tally",
    ),
    "vectors that overlap": Bug(
        "threadgroup-race",
        f"threadgroup float s[128];\nif (t < 32) *(threadgroup float4*)(s + 4 * t) = float4(1);\n"
        f"else s[(t - 32) * 4 + 3] = 2;\n{BARRIER} out[i] = s[t];",
        f"threadgroup float s[132];\nif (t < 32) *(threadgroup float4*)(s + 4 * t) = float4(1);\n"
        f"else s[128 + t % 4] = 2;\n{BARRIER} out[i] = s[t];",
        "(t - 32) * 4 + 3",
    ),
    "simd operation is no barrier": Bug(
        "threadgroup-race",
        "threadgroup float s[64]; s[t] = x[i];\nfloat v = simd_sum(x[i]);\nout[i] = v + s[t ^ 1];",
        "threadgroup float s[64]; s[t] = x[i];\nfloat v = simd_sum(x[i]);\n"
        f"{SIMD_BARRIER} out[i] = v + s[t ^ 1];",
        "s[t ^ 1]",
    ),
    "written by way of a cast": Bug(
        "read-only-write",
        "((device float*)x)[i] = 1; out[i] = 0;",
        "scratch[i] = 1; out[i] = 0;",
        "((device float*)x)",
        buffer="x",
    ),
    "index that wrapped": Bug(
        "device-read-out-of-bounds",
        "out[i] = x[i - 1];",
        "out[i] = x[max(i, 1u) - 1];",
        "x[i - 1]",
        buffer="x",
    ),
    "vector index that wrapped": Bug(
        "device-read-out-of-bounds",
        "out[i] = ((const device float4*)x)[i / 64 - 1].x;",
        "out[i] = ((const device float4*)x)[i / 64].x;",
        "i / 64 - 1",
        buffer="x",
    ),
    "constant read outside": Bug(
        "wild-access",
        "constant float* c = table;\nout[i] = c[t];",
        "constant float* c = table;\nout[i] = c[t % 4];",
        "c[t]",
    ),
    "output read where another lane of the vector was written": Bug(
        "device-uninitialised",
        "scratch[4 * (t / 4)] = 1;\n"
        "if (t % 4 == 0) out[i] = ((device float4*)scratch)[t / 4].w; else out[i] = 0;",
        "scratch[t] = 1;\nthreadgroup_barrier(mem_flags::mem_device);\n"
        "if (t % 4 == 0) out[i] = ((device float4*)scratch)[t / 4].w; else out[i] = 0;",
        "float4",
        buffer="scratch",
    ),
    "misaligned threadgroup vector": Bug(
        "misaligned",
        f"threadgroup float s[68]; s[t] = 1; if (t < 4) s[64 + t] = 1;\n{BARRIER}\n"
        "out[i] = ((threadgroup float4*)(s + 1))[t / 4].x;",
        f"threadgroup float s[68]; s[t] = 1; if (t < 4) s[64 + t] = 1;\n{BARRIER}\n"
        "out[i] = ((threadgroup packed_float4*)(s + 1))[t / 4][0];",
        "s + 1",
    ),
    "misaligned member": Bug(
        "misaligned",
        "struct S { float a; float4 b; };\n"
        "out[i] = t < 6 ? dot(((const device S*)(x + 1))[t].b, float4(1)) : 0;",
        "struct S { float a; packed_float4 b; };\nout[i] = t < 6 ? ((const device S*)(x + 1))[t].b[1] : 0;",
        "((const device S*)",
    ),
    "misaligned structure": Bug(
        "misaligned",
        "struct S { float4 a[3]; };\n((device S*)(scratch + 1))[t % 2] = *(const device S*)x; out[i] = 0;",
        "struct S { float4 a[3]; };\nif (t < 2) ((device S*)scratch)[t] = *(const device S*)x; out[i] = 0;",
        "device S*",
    ),
    "barriers in two branches that differ in nothing else": Bug(
        "barrier-divergence",
        f"if (t < 32) {{ {BARRIER}\n}} else {{ {BARRIER}\n}}\nout[i] = x[i];",
        f"{BARRIER} out[i] = x[i];",
        BARRIER,
    ),
    "barrier in a loop of different lengths": Bug(
        "barrier-divergence",
        f"for (uint k = 0; k < 1 + t / 32; k++) {{\n  {BARRIER}\n}} out[i] = x[i];",
        f"for (uint k = 0; k < 2; k++) {{\n  {BARRIER}\n}} out[i] = x[i];",
        BARRIER,
    ),
    "barrier after a return": Bug(
        "barrier-divergence",
        f"out[i] = x[i]; if (t == 40) return;\n{BARRIER} out[i] = 2;",
        f"out[i] = x[i];\n{BARRIER} if (t == 40) return; out[i] = 2;",
        BARRIER,
    ),
    "simdgroup barrier in a branch": Bug(
        "simd-partial",
        f"if (lane < 16) {{\n  {SIMD_BARRIER}\n}} out[i] = x[i];",
        f"{SIMD_BARRIER} out[i] = x[i];",
        SIMD_BARRIER,
    ),
    "simd operation in a loop of different lengths": Bug(
        "simd-partial",
        "float v = 0;\nfor (uint k = lane; k < 40; k += 32)\n  v += simd_sum(x[k]);\nout[i] = v;",
        "float v = 0;\nfor (uint k = lane; k < 64; k += 32)\n  v += simd_sum(x[k]);\nout[i] = v;",
        "simd_sum(x[k])",
    ),
    "quad operation in half a quad": Bug(
        "simd-partial",
        "float v = x[i];\nif (lane < 18) v = quad_sum(v);\nout[i] = v;",
        "float v = x[i];\nif (lane < 16) v = quad_sum(v);\nout[i] = v;",
        "quad_sum(v)",
    ),
    "matrix product in a branch": Bug(
        "simd-divergence",
        "simdgroup_float8x8 a(1.0f);\nif (lane < 16) simdgroup_multiply(a, a, a);\n"
        "out[i] = simd_sum(a.thread_elements()[0]);",
        "simdgroup_float8x8 a(1.0f);\nsimdgroup_multiply(a, a, a);\n"
        "out[i] = simd_sum(a.thread_elements()[0]);",
        "simdgroup_multiply",
    ),
    "barrier in a branch": Bug(
        "barrier-divergence",
        f"threadgroup float s[64]; s[t] = x[i];\nif (t < 32) {{\n  {BARRIER}\n}}\nout[i] = x[i];",
        f"threadgroup float s[64]; s[t] = x[i];\n{{\n  {BARRIER}\n}}\nout[i] = x[i];",
        BARRIER,
    ),
    "two barriers for one": Bug(
        "barrier-divergence",
        f"if (t < 32) {{\n  {BARRIER} out[i] = 1;\n}} else {{\n  {BARRIER} out[i] = 2;\n}}",
        f"{BARRIER} out[i] = 1;",
        BARRIER,
    ),
    "simd_sum in a branch": Bug(
        "simd-divergence",
        "float v = x[i];\nif (lane < 20) v = simd_sum(v);\nout[i] = simd_max(v);",
        "float v = x[i];\nv = simd_sum(lane < 20 ? v : 0);\nout[i] = simd_max(v);",
        "simd_sum(v)",
    ),
    "shuffle after lanes returned": Bug(
        "simd-partial",
        "if (t == 3) { out[i] = 0; return; }\nout[i] = simd_shuffle_down(x[i], 2);",
        "float v = simd_shuffle_down(x[i], 2);\nif (t == 3) { out[i] = 0; return; }\nout[i] = v;",
        "simd_shuffle_down",
    ),
    "too much threadgroup memory": Bug(
        "threadgroup-memory",
        "threadgroup float s[8193];\ns[t] = 1; out[i] = s[t];",
        "threadgroup float s[8192];\ns[t] = 1; out[i] = s[t];",
        "s[8193]",
    ),
    "pointer from nowhere": Bug(
        "wild-access",
        "out[i] = *(const device float*)(size_t(i) * 4 + 64);",
        "out[i] = *(const device float*)(size_t(x) + size_t(i) * 4);",
        "size_t(i) * 4 + 64",
    ),
}


def source(body: str, before: str = "") -> str:
    return KERNEL.replace("BEFORE", before).replace("BODY", body)


def run(body: str, groups: int, before: str = "", **options: Any) -> Any:
    kernel = emulator.compile(source(body, before), "probe", name="probe.metal")
    n = groups * THREADS
    x = np.arange(n, dtype=np.float32)
    buffers = [np.zeros(n, np.float32), x, emulator.Output((n,), np.float32), np.zeros(4, np.uint32)]
    return emulator.launch(kernel, buffers, (n, 1, 1), (THREADS, 1, 1), mode="check", raises=False, **options)
