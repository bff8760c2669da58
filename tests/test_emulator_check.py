"""Check mode: for each kind of finding a kernel with that one bug, found at its line, and a clean twin,
silent."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
from emulator_bugs import BARRIER, BUGS, THREADS, Bug, run, source
from emulator_unusual_bugs import UNUSUAL

from moefast import emulator
from moefast.env import settings

pytestmark = pytest.mark.skipif(
    find_spec("ziglang") is None and not settings.clang, reason="needs the compiler of moefast[emulator]"
)


ALL = {**BUGS, **UNUSUAL}


@pytest.mark.parametrize("bug", ALL.values(), ids=ALL)
def test_bug_is_found_at_its_line(bug: Bug) -> None:
    lines = source(bug.bad, bug.before).split("\n")
    found = [f for f in run(bug.bad, bug.groups, bug.before).findings if f.kind == bug.kind]
    assert found
    places = [place for f in found for place in (f.place, f.other_place) if place]
    assert any(place.file == "probe.metal" and bug.line in lines[place.line - 1] for place in places), found
    assert all(f.buffer == bug.buffer for f in found if bug.buffer), found


@pytest.mark.parametrize("bug", ALL.values(), ids=ALL)
def test_clean_twin_is_silent(bug: Bug) -> None:
    assert run(bug.good, bug.groups, bug.before).findings == ()


def test_every_kind_has_a_bug() -> None:
    # Tests of their own, below.
    elsewhere = {"too-many-threads", "time-limit", "crash", "device-equal-writes", "threadgroup-equal-writes"}
    assert {bug.kind for bug in BUGS.values()} | elsewhere == set(emulator.KINDS)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("scratch[0] = 1;\nout[i] = 0;", "device-equal-writes"),
        (f"threadgroup float s[1];\ns[0] = 1;\n{BARRIER} out[i] = s[0];", "threadgroup-equal-writes"),
    ],
)
def test_writes_of_the_same_value_are_findings_unless_allowed(body: str, kind: str) -> None:
    assert run(body, 2, allow_equal_writes=True).findings == ()
    (found,) = run(body, 2).findings
    assert found.kind == kind
    assert "unordered with a write by thread 0 of threadgroup (0, 0, 0)" in found.message
    # Other values are a race, also where some of their bytes are the same, and allowed by nothing.
    other = body.replace("= 1;", "= t;")
    for allow in (False, True):
        assert {f.kind for f in run(other, 2, allow_equal_writes=allow).findings} == {
            kind.replace("equal-writes", "race")
        }


def test_barrier_in_a_function_names_both_paths() -> None:
    bug = UNUSUAL["barrier in a function, called from two branches"]
    (found,) = run(bug.bad, 1, bug.before).findings
    lines = source(bug.bad, bug.before).split("\n")
    calls = [i + 1 for i, line in enumerate(lines) if "  meet(s, t);" in line]
    assert found.called_from[0].line == calls[0]
    assert found.message.endswith(f"called from probe.metal:{calls[1]}")


def test_barrier_in_a_function_that_calls_itself_is_refused() -> None:
    again = f"void again(uint n) {{\n  {BARRIER}\n  if (n > 0) again(n - 1);\n}}"
    with pytest.raises(emulator.CompileError, match="must not call itself"):
        run("again(uint(x[0]));\nout[i] = 0;", 1, again)


@pytest.mark.parametrize("body", ["s[1] = V;", "for (uint k = 0; k < 64; k++) s[k] = V;"])
@pytest.mark.parametrize("kind", ["uchar", "half", "float3", "float4", "Odd"])
def test_equal_writes_of_any_type(kind: str, body: str) -> None:
    """Scalars and vectors, whole structs, memory that is filled: what is written is compared."""
    before = "struct Odd { float a; char b[5]; };"
    value = "Odd{7, {1, 2, 3, 4, 5}}" if kind == "Odd" else f"{kind}(7)"
    whole = f"threadgroup {kind} s[64];\n{body.replace('V', value)}\nout[i] = 0;"
    assert {f.kind for f in run(whole, 1, before).findings} == {"threadgroup-equal-writes"}
    assert run(whole, 1, before, allow_equal_writes=True).findings == ()


def test_missing_trailing_barrier_leaves_the_values_right_and_is_found() -> None:
    bug = BUGS["barrier in a loop missing, values right"]
    bad, good = run(bug.bad, 1), run(bug.good, 1)
    np.testing.assert_array_equal(bad.buffers[0], good.buffers[0])
    assert {f.kind for f in bad.findings} == {"threadgroup-race"}


def test_all_findings_are_raised_together() -> None:
    body = "out[i * 2] = x[i + 1];\nout[i] = scratch[i];"
    kernel = emulator.compile(source(body), "probe", name="probe.metal")
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
    kernel = emulator.compile(source("out[i] = x[i];"), "probe")
    arrays = [np.zeros(2048, np.float32) for _ in range(3)] + [np.zeros(4, np.uint32)]
    with pytest.raises(emulator.EmulatorError, match="1025"):
        emulator.launch(kernel, arrays, (2048, 1, 1), (1025, 1, 1), mode=mode)
    emulator.launch(kernel, arrays, (2048, 1, 1), (1024, 1, 1), mode=mode)


@pytest.mark.parametrize("mode", ["run", "check"])
def test_kernel_that_declares_fewer_threads(mode: str) -> None:
    arguments = "device int* out, uint i [[thread_position_in_grid]]"
    source = f"kernel [[max_total_threads_per_threadgroup(64)]] void k({arguments}) {{ out[i] = 1; }}"
    kernel = emulator.compile(source)
    emulator.launch(kernel, [np.zeros(64, np.int32)], (64, 1, 1), (64, 1, 1), mode=mode)
    with pytest.raises(emulator.EmulatorError, match="96x1x1 threads in a threadgroup, more than 64"):
        emulator.launch(kernel, [np.zeros(96, np.int32)], (96, 1, 1), (96, 1, 1), mode=mode)


@pytest.mark.parametrize("mode", ["run", "check"])
def test_hang_is_stopped(mode: str) -> None:
    body = "while (atomic_load_explicit(tally, memory_order_relaxed) == 0) {\n}\nout[i] = 1;"
    kernel = emulator.compile(source(body), "probe")
    arrays = [np.zeros(THREADS, np.float32) for _ in range(3)] + [np.zeros(4, np.uint32)]
    with pytest.raises(emulator.EmulatorError, match=r"longer than its 0\.5 s"):
        emulator.launch(kernel, arrays, (THREADS, 1, 1), (THREADS, 1, 1), mode=mode, time_limit=0.5)
    # The process is as it was: the next launch works.
    clean = emulator.compile(source("out[i] = 1;"), "probe")
    emulator.launch(clean, arrays, (THREADS, 1, 1), (THREADS, 1, 1), mode=mode)
    assert arrays[0].sum() == THREADS


@pytest.mark.parametrize("mode", ["run", "check"])
def test_wild_store_does_not_kill_the_caller(mode: str) -> None:
    # Through a thread pointer, which nothing checks.
    body = "*(thread float*)(size_t(i) + 64) = 1;\nout[i] = 0;"
    kernel = emulator.compile(source(body), "probe")
    arrays = [np.zeros(THREADS, np.float32) for _ in range(3)] + [np.zeros(4, np.uint32)]
    with pytest.raises(emulator.EmulatorError, match="SIGSEGV"):
        emulator.launch(kernel, arrays, (THREADS, 1, 1), (THREADS, 1, 1), mode=mode)


@pytest.mark.parametrize("mode", ["run", "check"])
@pytest.mark.parametrize("barrier", ["", BARRIER], ids=["alone", "fibers"])
def test_too_large_variables_are_told(mode: str, barrier: str) -> None:
    # The array is used far from its end only: without a probe of every page it would hit another thread's.
    body = f"volatile float a[60000]; a[t] = 1; {barrier}\nout[i] = a[t];"
    kernel = emulator.compile(source(body), "probe")
    arrays = [np.zeros(THREADS, np.float32) for _ in range(3)] + [np.zeros(4, np.uint32)]
    with pytest.raises(emulator.EmulatorError, match=r"more than \d+ bytes of variables"):
        emulator.launch(kernel, arrays, (THREADS, 1, 1), (THREADS, 1, 1), mode=mode)
    small = emulator.compile(source(body.replace("60000", "20000")), "probe")
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
    kernel = emulator.compile(source("if (i < 64) out[i] = 1;"), "probe")
    arrays = [np.zeros(THREADS, np.float32) for _ in range(3)] + [np.zeros(4, np.uint32)]
    for mode, threads in (("run", 1 << 24), ("check", 1 << 20)):
        done = emulator.launch(kernel, arrays, (threads, 1, 1), (THREADS, 1, 1), mode=mode)
        assert done.counters.threads == threads
        assert done.counters.threadgroups == threads // THREADS
