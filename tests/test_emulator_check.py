"""Check mode: for each kind of finding a kernel with that one bug, found at its line, and a clean twin,
silent."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import pytest

from moefast import emulator
from moefast.env import settings

pytestmark = pytest.mark.skipif(
    find_spec("ziglang") is None and not settings.clang, reason="needs the compiler of moefast[emulator]"
)

THREADS = 64

KERNEL = """#include <metal_stdlib>
using namespace metal;
constant float table[4] = {1, 2, 3, 4};
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
    """``line`` is the text of the line that must be named; ``groups``: threadgroups of 64 threads."""

    kind: str
    bad: str
    good: str
    line: str
    groups: int = 1
    buffer: str = ""


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
        "struct S { float4 a[3]; };\n((device S*)scratch)[t % 2] = *(const device S*)x; out[i] = 0;",
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


def run(body: str, groups: int, **options: Any) -> Any:
    kernel = emulator.compile(KERNEL.replace("BODY", body), "probe", name="probe.metal")
    n = groups * THREADS
    x = np.arange(n, dtype=np.float32)
    buffers = [np.zeros(n, np.float32), x, emulator.Output((n,), np.float32), np.zeros(4, np.uint32)]
    return emulator.launch(kernel, buffers, (n, 1, 1), (THREADS, 1, 1), mode="check", raises=False, **options)


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_bug_is_found_at_its_line(bug: Bug) -> None:
    source = KERNEL.replace("BODY", bug.bad).split("\n")
    found = [f for f in run(bug.bad, bug.groups).findings if f.kind == bug.kind]
    assert found
    places = [place for f in found for place in (f.place, f.other_place) if place]
    assert any(place.file == "probe.metal" and bug.line in source[place.line - 1] for place in places), found
    assert all(f.buffer == bug.buffer for f in found if bug.buffer), found


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_clean_twin_is_silent(bug: Bug) -> None:
    assert run(bug.good, bug.groups).findings == ()


def test_every_kind_has_a_bug() -> None:
    # Tests of their own, below.
    elsewhere = {"too-many-threads", "time-limit", "crash", "device-same-writes", "threadgroup-same-writes"}
    assert {bug.kind for bug in BUGS.values()} | elsewhere == set(emulator.KINDS)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("scratch[0] = 1;\nout[i] = 0;", "device-same-writes"),
        (f"threadgroup float s[1];\ns[0] = 1;\n{BARRIER} out[i] = s[0];", "threadgroup-same-writes"),
    ],
)
def test_writes_of_the_same_value_are_findings_if_asked_for(body: str, kind: str) -> None:
    assert run(body, 2).findings == ()
    (found,) = run(body, 2, strict_races=True).findings
    assert found.kind == kind
    assert "unordered with a write by thread 0 of threadgroup (0, 0, 0)" in found.message
    other = body.replace("= 1;", "= t;")
    assert {f.kind for f in run(other, 2).findings} == {kind.replace("same-writes", "race")}


def test_missing_trailing_barrier_leaves_the_values_right_and_is_found() -> None:
    bug = BUGS["barrier in a loop missing, values right"]
    bad, good = run(bug.bad, 1), run(bug.good, 1)
    np.testing.assert_array_equal(bad.buffers[0], good.buffers[0])
    assert {f.kind for f in bad.findings} == {"threadgroup-race"}


def test_all_findings_are_raised_together() -> None:
    body = "out[i * 2] = x[i + 1];\nout[i] = scratch[i];"
    kernel = emulator.compile(KERNEL.replace("BODY", body), "probe", name="probe.metal")
    n = THREADS
    buffers = [
        np.zeros(n, np.float32),
        np.zeros(n, np.float32),
        emulator.Output((n,), np.float32),
        np.zeros(4, np.uint32),
    ]
    with pytest.raises(emulator.EmulatorError) as caught:
        emulator.launch(kernel, buffers, (n, 1, 1), (n, 1, 1), mode="check")
    kinds = {f.kind for f in caught.value.findings}
    assert kinds >= {"device-read-out-of-bounds", "device-write-out-of-bounds", "device-uninitialised"}
    for finding in caught.value.findings:
        assert f"probe.metal:{finding.place.line}" in str(caught.value)


def test_bounds_tell_who_where_and_by_how_much() -> None:
    (found,) = run("out[i] = x[i + 1];", 2).findings
    assert (found.thread, found.threadgroup, found.buffer, found.offset) == (63, (1, 0, 0), "x", 512)
    assert "4 bytes beyond its 512" in found.message


def test_race_tells_both_sides() -> None:
    (found,) = run("scratch[t] = x[i]; out[i] = 0;", 2).findings
    assert found.other_threadgroup == (0, 0, 0)
    assert found.threadgroup == (1, 0, 0)
    assert found.other_thread == found.thread == 0
    assert found.other_place == found.place
    assert found.count == THREADS


def test_findings_are_json() -> None:
    import json

    (found,) = run("out[i] = x[i + 1];", 1).findings
    assert json.loads(json.dumps(found.data()))["place"]["line"] == found.place.line


def test_atomic_traffic_is_no_race() -> None:
    result = run("atomic_fetch_add_explicit(tally, 1u, memory_order_relaxed); out[i] = 0;", 4)
    assert result.findings == ()
    assert result.buffers[3][0] == 4 * THREADS
    assert result.counters.atomics == 4 * THREADS


def test_order_dependent_kernel_shows_under_shuffling() -> None:
    # Which threadgroup comes first decides; no access races, the sum of all tickets is the same.
    body = (
        "uint ticket = atomic_fetch_add_explicit(tally, 1u, memory_order_relaxed);\nout[i] = float(ticket);"
    )
    runs = {tuple(run(body, 4, seed=seed).buffers[0]) for seed in (None, 1, 2, 3)}
    assert len(runs) > 1
    assert len({sum(values) for values in runs}) == 1
    np.testing.assert_array_equal(run(body, 4, seed=1).buffers[0], run(body, 4, seed=1).buffers[0])


@pytest.mark.parametrize("mode", ["run", "check"])
def test_too_many_threads(mode: str) -> None:
    kernel = emulator.compile(KERNEL.replace("BODY", "out[i] = x[i];"), "probe")
    arrays = [np.zeros(2048, np.float32) for _ in range(3)] + [np.zeros(4, np.uint32)]
    with pytest.raises(emulator.EmulatorError, match="1025"):
        emulator.launch(kernel, arrays, (2048, 1, 1), (1025, 1, 1), mode=mode)
    emulator.launch(kernel, arrays, (2048, 1, 1), (1024, 1, 1), mode=mode)


@pytest.mark.parametrize("mode", ["run", "check"])
def test_kernel_that_declares_fewer_threads(mode: str) -> None:
    source = "kernel [[max_total_threads_per_threadgroup(64)]] void k(device int* out) { out[0] = 1; }"
    kernel = emulator.compile(source)
    emulator.launch(kernel, [np.zeros(1, np.int32)], (64, 1, 1), (64, 1, 1), mode=mode)
    with pytest.raises(emulator.EmulatorError, match="96x1x1 threads in a threadgroup, more than 64"):
        emulator.launch(kernel, [np.zeros(1, np.int32)], (96, 1, 1), (96, 1, 1), mode=mode)


@pytest.mark.parametrize("mode", ["run", "check"])
def test_hang_is_stopped(mode: str) -> None:
    body = "while (atomic_load_explicit(tally, memory_order_relaxed) == 0) {\n}\nout[i] = 1;"
    kernel = emulator.compile(KERNEL.replace("BODY", body), "probe")
    arrays = [np.zeros(THREADS, np.float32) for _ in range(3)] + [np.zeros(4, np.uint32)]
    with pytest.raises(emulator.EmulatorError, match=r"longer than its 0\.5 s"):
        emulator.launch(kernel, arrays, (THREADS, 1, 1), (THREADS, 1, 1), mode=mode, time_limit=0.5)
    # The process is as it was: the next launch works.
    clean = emulator.compile(KERNEL.replace("BODY", "out[i] = 1;"), "probe")
    emulator.launch(clean, arrays, (THREADS, 1, 1), (THREADS, 1, 1), mode=mode)
    assert arrays[0].sum() == THREADS


@pytest.mark.parametrize("mode", ["run", "check"])
def test_wild_store_does_not_kill_the_caller(mode: str) -> None:
    # Through a thread pointer, which nothing checks.
    body = "*(thread float*)(size_t(i) + 64) = 1;\nout[i] = 0;"
    kernel = emulator.compile(KERNEL.replace("BODY", body), "probe")
    arrays = [np.zeros(THREADS, np.float32) for _ in range(3)] + [np.zeros(4, np.uint32)]
    with pytest.raises(emulator.EmulatorError, match="SIGSEGV"):
        emulator.launch(kernel, arrays, (THREADS, 1, 1), (THREADS, 1, 1), mode=mode)


@pytest.mark.parametrize("mode", ["run", "check"])
@pytest.mark.parametrize("barrier", ["", BARRIER], ids=["alone", "fibers"])
def test_too_large_variables_are_told(mode: str, barrier: str) -> None:
    # The array is used far from its end only: without a probe of every page it would hit another thread's.
    body = f"volatile float a[60000]; a[t] = 1; {barrier}\nout[i] = a[t];"
    kernel = emulator.compile(KERNEL.replace("BODY", body), "probe")
    arrays = [np.zeros(THREADS, np.float32) for _ in range(3)] + [np.zeros(4, np.uint32)]
    with pytest.raises(emulator.EmulatorError, match=r"more than \d+ bytes of variables"):
        emulator.launch(kernel, arrays, (THREADS, 1, 1), (THREADS, 1, 1), mode=mode)
    small = emulator.compile(KERNEL.replace("BODY", body.replace("60000", "20000")), "probe")
    emulator.launch(small, arrays, (THREADS, 1, 1), (THREADS, 1, 1), mode=mode)
    assert arrays[0].sum() == THREADS


def test_three_dimensional_grid_with_smaller_threadgroups_at_its_edges() -> None:
    source = """#include <metal_stdlib>
using namespace metal;
kernel void k(device uint* out, uint3 p [[thread_position_in_grid]], uint3 size [[threads_per_grid]],
              uint3 q [[thread_position_in_threadgroup]], uint3 g [[threadgroup_position_in_grid]],
              uint3 full [[dispatch_threads_per_threadgroup]], uint3 threads [[threads_per_threadgroup]],
              uint t [[thread_index_in_threadgroup]]) {
  uint at = (p.z * size.y + p.y) * size.x + p.x;
  bool right = all(p == g * full + q) && t == (q.z * threads.y + q.y) * threads.x + q.x;
  out[at] += right ? at : 9999;
}"""
    grid, threadgroup = (7, 5, 3), (4, 2, 2)
    for mode in ("run", "check"):
        out = np.zeros(7 * 5 * 3, np.uint32)
        emulator.launch(emulator.compile(source), [out], grid, threadgroup, mode=mode)
        np.testing.assert_array_equal(out, np.arange(out.size))


def test_many_threadgroups() -> None:
    kernel = emulator.compile(KERNEL.replace("BODY", "if (i < 64) out[i] = 1;"), "probe")
    arrays = [np.zeros(THREADS, np.float32) for _ in range(3)] + [np.zeros(4, np.uint32)]
    for mode, threads in (("run", 1 << 24), ("check", 1 << 20)):
        done = emulator.launch(kernel, arrays, (threads, 1, 1), (THREADS, 1, 1), mode=mode)
        assert done.counters.threads == threads
        assert done.counters.threadgroups == threads // THREADS


def test_counters() -> None:
    body = f"""threadgroup float s[64];
s[t] = x[i] + x[0];
{BARRIER}
out[i] = simd_sum(s[t]);
simdgroup_float8x8 a = make_filled_simdgroup_matrix<float, 8, 8>(1.0f), b;
simdgroup_multiply(b, a, a);
out[i] = b.thread_elements()[0];"""
    c = run(body, 2).counters
    assert (c.threads, c.threadgroups, c.barriers) == (128, 2, 2)
    assert (c.simd_operations, c.multiplies) == (4, 4)
    assert (c.threadgroup_loaded, c.threadgroup_stored) == (512, 512)
    x = c.buffers["x"]
    assert (x.loaded, x.loads, x.unique, x.per_threadgroup) == (1024, 256, 512, 256 + 260)
    assert c.buffers["out"].stored in (512, 1024)  # the compiler may drop the first of two stores
    assert c.buffers["scratch"].unique == 0
    assert c.loaded == 1024
