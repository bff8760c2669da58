"""Counters of a launch: those counted by hand."""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

import pytest
from emulator_bugs import ADD, BARRIER, SIMD_BARRIER, run

from moefast.env import settings

pytestmark = pytest.mark.skipif(
    find_spec("ziglang") is None and not settings.clang, reason="needs the compiler of moefast[emulator]"
)


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


class Counted(NamedTuple):
    """By hand, of two threadgroups of 64 threads; ``x`` and ``out``: bytes loaded or stored,
    accesses, unique bytes, bytes distinct in each threadgroup."""

    body: str
    x: tuple[int, int, int, int]
    out: tuple[int, int, int, int]
    others: dict[str, int] = {}  # noqa: RUF012 (read only)


COUNTED = {
    "vectors": Counted(
        "if (i < 32) ((device float4*)out)[i] = ((const device float4*)x)[i];",
        (32 * 16, 32, 512, 512),
        (32 * 16, 32, 512, 512),
    ),
    "packed vectors": Counted(
        "if (i < 42) ((device packed_float3*)out)[i] = ((const device packed_float3*)x)[i];",
        (42 * 12, 42, 504, 504),
        (42 * 12, 42, 504, 504),
    ),
    "halves": Counted(
        "((device half*)out)[i] = ((const device half*)x)[i];", (256, 128, 256, 256), (256, 128, 256, 256)
    ),
    "one for all": Counted("out[i] = x[3];", (128 * 4, 128, 4, 2 * 4), (512, 128, 512, 512)),
    "both threadgroups the same": Counted("out[i] = x[t];", (512, 128, 256, 512), (512, 128, 512, 512)),
    "structures": Counted(
        "struct S { float v[8]; };\nif (t < 8) ((device S*)out)[t + 8 * group] = ((const device S*)x)[t];",
        (16 * 32, 16, 256, 512),
        (16 * 32, 16, 512, 512),
    ),
    "atomics": Counted(
        f"{ADD} atomic_load_explicit(tally + 1, memory_order_relaxed);\n"
        "threadgroup atomic_uint s; if (t == 0) atomic_store_explicit(&s, 0u, memory_order_relaxed);\n"
        f"{BARRIER} atomic_fetch_max_explicit(&s, t, memory_order_relaxed); out[i] = 0;",
        (0, 0, 0, 0),
        (512, 128, 512, 512),
        {"atomics": 128 + 128 + 2 + 128, "barriers": 2, "threadgroup_loaded": 0},
    ),
    "threadgroup vectors": Counted(
        f"threadgroup float4 s[64]; s[t] = float4(x[i]);\n{BARRIER} out[i] = s[63 - t].y;",
        (512, 128, 512, 512),
        (512, 128, 512, 512),
        {"threadgroup_stored": 128 * 16, "threadgroup_loaded": 128 * 4, "barriers": 2},
    ),
    "simd operations": Counted(
        "float v = x[i];\nout[i] = simd_sum(v) + simd_shuffle_xor(v, 1) + quad_sum(v) + simd_any(v > 3);",
        (512, 128, 512, 512),
        (512, 128, 512, 512),
        {"simd_operations": 4 * 4, "multiplies": 0, "simd_barriers": 0},
    ),
    "matrices": Counted(
        "simdgroup_float8x8 a, b;\nsimdgroup_load(a, x, 8); simdgroup_load(b, x, 8, ulong2(0), true);\n"
        f"simdgroup_multiply_accumulate(a, a, b, a); {SIMD_BARRIER}\n"
        "simdgroup_store(a, out + 64 * group, 8);",
        (4 * 2 * 256, 4 * 2 * 64, 256, 512),
        (4 * 256, 4 * 64, 512, 512),
        {"simd_operations": 4 * 3, "multiplies": 4, "simd_barriers": 4},
    ),
}


@pytest.mark.parametrize("case", COUNTED.values(), ids=COUNTED)
def test_counters_are_those_counted_by_hand(case: Counted) -> None:
    c = run(case.body, 2).counters
    x, out = c.buffers["x"], c.buffers["out"]
    assert (x.loaded, x.loads, x.unique, x.per_threadgroup) == case.x
    assert (out.stored, out.stores, out.unique, out.per_threadgroup) == case.out
    assert {name: getattr(c, name) for name in case.others} == case.others


def test_more_threadgroups_than_the_runtime_has_marks_for() -> None:
    """It tells them apart by 16 bits, of which it keeps two values and uses the others again."""
    marks, groups = (1 << 16) - 2, (1 << 16) + 100
    c = run(f"if (t == 0) out[group] = x[group % {marks}];", groups).counters
    x, out = c.buffers["x"], c.buffers["out"]
    assert (x.unique, x.per_threadgroup) == (4 * marks, 4 * groups)
    assert (out.unique, out.per_threadgroup) == (4 * groups, 4 * groups)
