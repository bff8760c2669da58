"""The Metal standard library of the emulator: arithmetic that rounds as on a GPU, vectors, simdgroups,
atomics."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from moefast import emulator
from moefast.env import settings

pytestmark = pytest.mark.skipif(
    find_spec("ziglang") is None and not settings.clang, reason="needs the compiler of moefast[emulator]"
)

THREADS = 64


def run(
    body: str, out: Any, *inputs: np.ndarray, header: str = "", result: str = "float", threads: int = THREADS
) -> Any:
    """The output of ``body`` in check mode, which computes the same as run mode; inputs are a, b and c."""
    names = {"float32": "float", "float16": "half", "uint32": "uint", "int32": "int", "uint16": "ushort"}
    parameters = "".join(
        f"const device {names[str(x.dtype)]}* {name} [[buffer({i})]], "
        for i, (name, x) in enumerate(zip("abc", inputs, strict=False), 1)
    )
    source = f"""#include <metal_stdlib>
using namespace metal;
{header}
[[kernel]] void k(device {result}* out [[buffer(0)]], {parameters}uint i [[thread_position_in_grid]]) {{
{body}
}}"""
    kernel = emulator.compile(source, "k")
    buffers = {0: emulator.Output((out[0],), out[1]), **dict(enumerate(inputs, 1))}
    results = []
    for mode in ("run", "check"):
        done = emulator.launch(kernel, buffers, (threads, 1, 1), (min(threads, 64), 1, 1), mode=mode)
        results.append(done.buffers[0])
    np.testing.assert_array_equal(*results)
    return results[0]


def halves(seed: int, n: int) -> np.ndarray:
    bits = np.random.default_rng(seed).integers(0, 0x7C00, n).astype(np.uint16)
    sign = np.random.default_rng(seed + 9).integers(0, 2, n).astype(np.uint16) << 15
    return (bits | sign).view(np.float16)


N = 1 << 14


def test_half_fma_rounds_once() -> None:
    # Products half way between two halves, which a third number far below them decides.
    rng = np.random.default_rng(0)
    a, b = (rng.uniform(1, 2, N).astype(np.float16) for _ in range(2))
    c = np.where(rng.integers(0, 2, N), np.float16(2.0**-24), np.float16(-(2.0**-24)))
    with np.errstate(over="ignore"):
        exact = (a.astype(np.float64) * b + c).astype(np.float16)
        twice = (a.astype(np.float32) * b.astype(np.float32) + c.astype(np.float32)).astype(np.float16)
    got = run("out[i] = fma(a[i], b[i], c[i]);", (N, np.float16), a, b, c, result="half", threads=N)
    np.testing.assert_array_equal(got, exact)
    assert (exact != twice).any()  # the inputs can tell


def test_products_and_sums_of_an_expression_are_fused_and_no_others() -> None:
    rng = np.random.default_rng(0)
    a, b, c = (rng.standard_normal(N).astype(np.float32) for _ in range(3))
    fused = (a.astype(np.float64) * b + c).astype(np.float32)
    apart = a * b + c
    assert (fused != apart).any()
    one = run("out[i] = a[i] * b[i] + c[i];", (N, np.float32), a, b, c, threads=N)
    np.testing.assert_array_equal(one, fused)
    two = run("float p = a[i] * b[i];\nout[i] = p + c[i];", (N, np.float32), a, b, c, threads=N)
    np.testing.assert_array_equal(two, apart)
    off = "#pragma METAL fp contract(off)"
    np.testing.assert_array_equal(
        run("out[i] = a[i] * b[i] + c[i];", (N, np.float32), a, b, c, header=off, threads=N), apart
    )


def test_half_rounds_after_every_operation() -> None:
    a, b, c = halves(0, N), halves(1, N), halves(2, N)
    with np.errstate(all="ignore"):
        expected = ((a + b).astype(np.float16) * c).astype(np.float16)
    got = run("half s = a[i] + b[i];\nout[i] = s * c[i];", (N, np.float16), a, b, c, result="half", threads=N)
    np.testing.assert_array_equal(got, expected)


def test_bfloat_rounds_to_nearest_even() -> None:
    a = np.array([1.0, 1.00390625, 1.01171875, 3.0e38, np.inf, -0.0], np.float32)
    got = run("out[i] = as_type<ushort>(bfloat(a[i]));", (6, np.uint16), a, result="ushort", threads=6)
    assert [hex(v) for v in got] == ["0x3f80", "0x3f80", "0x3f82", "0x7f62", "0x7f80", "0x8000"]


def test_precise_functions_of_half_stay_in_float() -> None:
    a = halves(3, 64)
    a = np.where(np.abs(a) < 8, a, np.float16(1))
    got = run("out[i] = precise::exp(a[i]);", (64, np.float32), a)
    np.testing.assert_array_equal(got, np.exp(a.astype(np.float64)).astype(np.float32))


@pytest.mark.parametrize(
    ("name", "function"),
    [
        (n, getattr(np, n))
        for n in ("exp", "exp2", "log", "log2", "log10", "sin", "cos", "tan", "tanh", "sqrt")
    ]
    + [("rsqrt", lambda x: 1 / np.sqrt(x)), ("sinpi", lambda x: np.sin(np.pi * x)), ("atan", np.arctan)],
)
def test_functions_are_rounded_correctly(name: str, function: Any) -> None:
    x = np.random.default_rng(0).uniform(0.1, 10, 4096).astype(np.float32)
    got = run(f"out[i] = {name}(a[i]);", (4096, np.float32), x, threads=4096)
    exact = function(x.astype(np.float64))
    # NumPy's double functions are themselves an ulp off: of double.
    assert np.abs(got - exact).max() <= (0.5000001 * np.spacing(np.abs(exact).astype(np.float32))).max()


def test_vectors() -> None:
    body = """
    float4 v = float4(float2(1, 2), 3, 4);
    v.xz = v.zx;
    half3 h = half3(v.xyz);
    uint2 u = uint2(5);
    packed_float3 p = packed_float3(v.xyz);
    float3 back = p * 2.0f;
    bool2 both = float2(1, 2) < float2(2, 1);
    short2 at(i, 7);
    vec<int, 2> k = vec<int, 2>(v.xy);
    out[i * 8 + 0] = v.x; out[i * 8 + 1] = h.z; out[i * 8 + 2] = u.y; out[i * 8 + 3] = back.y;
    out[i * 8 + 4] = both[0] + 2 * both[1]; out[i * 8 + 5] = at.y; out[i * 8 + 6] = k.x;
    out[i * 8 + 7] = dot(v, float4(1)) + any(v > 3.5f) + select(10.0f, 20.0f, v.y == 2.0f);
    """
    assert run(body, (8, np.float32), threads=1).tolist() == [3, 1, 5, 4, 1, 7, 3, 31]


def test_integer_functions() -> None:
    body = """
    out[0] = popcount(0xf0u); out[1] = clz(1u); out[2] = ctz(8u); out[3] = reverse_bits(1u);
    out[4] = mulhi(0x80000000u, 6u); out[5] = rotate(0x80000001u, 1u); out[6] = extract_bits(0xabcdu, 4u, 8u);
    out[7] = insert_bits(0xffffu, 0u, 4u, 8u); out[8] = addsat(0xffffffffu, 2u); out[9] = absdiff(3u, 5u);
    out[10] = uint(clz(short(1))); out[11] = uint(extract_bits(int(0xf0), 4u, 4u)); out[12] =
    hadd(0xffffffffu, 1u);
    out[13] = clamp(7u, 1u, 5u); out[14] = uint(abs(-3)); out[15] = median3(1u, 9u, 4u);
    """
    expected = [4, 31, 3, 1 << 31, 3, 3, 0xBC, 0xF00F, 0xFFFFFFFF, 2, 15, 0xFFFFFFFF, 0x80000000, 5, 3, 4]
    assert run(body, (16, np.uint32), result="uint", threads=1).tolist() == expected


def test_packing() -> None:
    body = """
    float4 v = float4(0, 1, 0.5f, -1); float2 w = float2(-0.25f, 2);
    out[0] = pack_float_to_unorm4x8(v); out[1] = pack_float_to_snorm4x8(v);
    out[2] = pack_float_to_unorm2x16(w); out[3] = pack_float_to_snorm2x16(w);
    out[4] = uint(255 * unpack_unorm4x8_to_float(0x00ff8001u).y);
    out[5] = 127 * unpack_snorm4x8_to_float(0x7f).x;
    out[6] = uint(65535 * unpack_unorm2x16_to_float(0x12340000u).y);
    out[7] = uint(2 + unpack_snorm2x16_to_float(0x8001u).x);
    """
    expected = [0x0080FF00, 0x81407F00, 0xFFFF0000, 0x7FFFE000, 0x80, 127, 0x1234, 1]
    assert run(body, (8, np.uint32), result="uint", threads=1).tolist() == expected


def test_geometric_functions() -> None:
    body = """
    float3 a = float3(1, 2, 2), b = float3(0, 3, 4);
    out[0] = dot(a, b); out[1] = length(a); out[2] = distance(a, float3(1, 2, 5)); out[3] = cross(a, b).x;
    out[4] = normalize(b).y; out[5] = reflect(float2(1, -1), float2(0, 1)).y;
    out[6] = faceforward(float2(1), float2(1), float2(1)).x;
    out[7] = refract(float2(0, -1), float2(0, 1), 0.5f).y;
    """
    got = run(body, (8, np.float32), threads=1)
    np.testing.assert_array_equal(got, np.array([14, 3, 3, 2, 0.6, 1, -1, -1], np.float32))


def test_simd_sum_is_added_in_the_documented_order() -> None:
    x = np.random.default_rng(0).standard_normal(32).astype(np.float32)
    values = x.copy()
    for apart in (16, 8, 4, 2, 1):
        values[:apart] += values[apart : 2 * apart]
    got = run("out[i] = simd_sum(a[i]);", (32, np.float32), x, threads=32)
    np.testing.assert_array_equal(got, np.full(32, values[0]))


LANE = np.arange(32)
SIMD = {
    "simd_product(1u + i % 2)": np.full(32, 1 << 16),
    "simd_max(i)": np.full(32, 31),
    "simd_min(i + 3)": np.full(32, 3),
    "simd_and(i | 8u)": np.full(32, 8),
    "simd_or(i)": np.full(32, 31),
    "simd_xor(i + 1)": np.full(32, 32),
    "simd_prefix_inclusive_sum(i)": np.cumsum(LANE),
    "simd_prefix_exclusive_sum(i)": np.cumsum(LANE) - LANE,
    "simd_prefix_inclusive_product(1u + i / 31)": np.where(LANE == 31, 2, 1),
    "simd_broadcast(i, ushort(5))": np.full(32, 5),
    "simd_broadcast_first(i + 7)": np.full(32, 7),
    "simd_shuffle(i, ushort(31 - i))": 31 - LANE,
    "simd_shuffle_down(i, ushort(3))": np.where(LANE < 29, LANE + 3, LANE),
    "simd_shuffle_up(i, ushort(3))": np.where(LANE >= 3, LANE - 3, LANE),
    "simd_shuffle_xor(i, ushort(9))": LANE ^ 9,
    "simd_shuffle_rotate_down(i, ushort(3))": (LANE + 3) % 32,
    "simd_shuffle_rotate_up(i, ushort(3))": (LANE - 3) % 32,
    "simd_shuffle_and_fill_down(i, i + 100, ushort(3))": np.where(LANE < 29, LANE + 3, LANE - 29 + 100),
    "simd_shuffle_and_fill_up(i, i + 100, ushort(3))": np.where(LANE >= 3, LANE - 3, LANE + 29 + 100),
    "uint(ulong(simd_ballot(i % 2 == 0)))": np.full(32, 0x55555555),
    "simd_any(i == 3)": np.ones(32),
    "simd_all(i != 3)": np.zeros(32),
    "simd_is_first()": LANE == 0,
    "quad_sum(i)": LANE // 4 * 16 + 6,
    "quad_product(1u + i % 4)": np.full(32, 24),
    "quad_min(i)": LANE // 4 * 4,
    "quad_and(i | 12u)": np.full(32, 12) | LANE // 4 * 4,
    "quad_or(i)": LANE | 3,
    "quad_xor(i % 4 + 1)": np.full(32, 1 ^ 2 ^ 3 ^ 4),
    "quad_prefix_inclusive_sum(i % 4)": np.cumsum(np.arange(4))[LANE % 4],
    "quad_prefix_exclusive_sum(i % 4 + 1)": np.array([0, 1, 3, 6])[LANE % 4],
    "quad_prefix_inclusive_product(i % 4 + 1)": np.array([1, 2, 6, 24])[LANE % 4],
    "quad_prefix_exclusive_product(i % 4 + 1)": np.array([1, 1, 2, 6])[LANE % 4],
    "quad_broadcast_first(i)": LANE // 4 * 4,
    "quad_shuffle(i, ushort(3 - i % 4))": LANE // 4 * 4 + 3 - LANE % 4,
    "quad_shuffle_up(i, ushort(1))": np.where(LANE % 4 > 0, LANE - 1, LANE),
    "quad_shuffle_rotate_down(i, ushort(1))": LANE // 4 * 4 + (LANE + 1) % 4,
    "quad_shuffle_and_fill_down(i, i + 100, ushort(3))": LANE // 4 * 4
    + np.array([3, 100, 101, 102])[LANE % 4],
    "quad_shuffle_and_fill_up(i, i + 100, ushort(3))": LANE // 4 * 4 + np.array([101, 102, 103, 0])[LANE % 4],
    "simd_shuffle_and_fill_up(i, i + 100, ushort(1), ushort(8))": np.where(LANE % 8, LANE - 1, LANE + 107),
    "quad_any(i % 8 == 3)": LANE % 8 < 4,
    "quad_all(i % 8 < 4)": LANE % 8 < 4,
    "quad_is_first()": LANE % 4 == 0,
    "uint(quad_vote::vote_t(quad_ballot(i % 4 > 1)))": np.full(32, 12),
    "uint(quad_vote::vote_t(quad_active_threads_mask()))": np.full(32, 15),
    "uint(simd_vote::vote_t(simd_active_threads_mask()))": np.full(32, 2**32 - 1),
    "simd_prefix_exclusive_product(1u + i / 31)": np.ones(32),
    "quad_max(i)": LANE // 4 * 4 + 3,
    "quad_broadcast(i, ushort(2))": LANE // 4 * 4 + 2,
    "quad_shuffle_xor(i, ushort(1))": LANE ^ 1,
    "quad_shuffle_down(i, ushort(1))": np.where(LANE % 4 < 3, LANE + 1, LANE),
    "quad_shuffle_rotate_up(i, ushort(1))": LANE // 4 * 4 + (LANE - 1) % 4,
    "simd_sum(uint2(i, 1)).y": np.full(32, 32),
}


@pytest.mark.parametrize("call", SIMD)
def test_simdgroup_functions(call: str) -> None:
    got = run(f"out[i] = {call};", (32, np.uint32), result="uint", threads=32)
    np.testing.assert_array_equal(got, SIMD[call].astype(np.uint32))


@pytest.mark.parametrize("kind", ["half", "bfloat", "float"])
@pytest.mark.parametrize("transpose", ["false", "true"])
def test_matrices(kind: str, transpose: str) -> None:
    a, b = (np.random.default_rng(s).integers(-8, 8, (16, 12)).astype(np.float32) for s in (0, 1))
    body = f"""
    threadgroup {kind} left[16 * 12], right[16 * 12];
    for (uint k = i; k < 16 * 12; k += 32) {{
      left[k] = {kind}(a[k]);
      right[k] = {kind}(b[k]);
    }}
    threadgroup_barrier(mem_flags::mem_threadgroup);
    simdgroup_matrix<{kind}, 8, 8> x, y;
    simdgroup_matrix<float, 8, 8> sum = make_filled_simdgroup_matrix<float, 8, 8>(1.0f);
    simdgroup_load(x, left, 12, ulong2(2, 3), {transpose});
    simdgroup_load(y, right, 12);
    simdgroup_multiply_accumulate(sum, x, y, sum);
    simdgroup_store(sum, out, 8);
    """
    got = run(body, (64, np.float32), a.ravel(), b.ravel(), threads=32).reshape(8, 8)
    left = a[3:11, 2:10]
    np.testing.assert_array_equal(got, (left.T if transpose == "true" else left) @ b[:8, :8] + 1)


def test_identity_matrix_and_thread_elements() -> None:
    body = """
    simdgroup_float8x8 one(1.0f);
    out[i * 2] = one.thread_elements()[0];
    out[i * 2 + 1] = one.thread_elements()[1];
    """
    got = run(body, (64, np.float32), threads=32)
    lane = np.arange(32)
    row = (lane // 4 & 4) + lane // 2 % 4
    column = (lane // 4 & 2) * 2 + lane % 2 * 2
    matrix = np.zeros((8, 8), np.float32)
    matrix[row, column], matrix[row, column + 1] = got[::2], got[1::2]
    np.testing.assert_array_equal(matrix, np.eye(8))


def test_atomics() -> None:
    body = """
    threadgroup atomic_int low;
    threadgroup atomic_float total;
    if (i == 0) {
      atomic_store_explicit(&low, 100, memory_order_relaxed);
      atomic_store_explicit(&total, 0.5f, memory_order_relaxed);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    atomic_fetch_min_explicit(&low, int(i) - 3, memory_order_relaxed);
    atomic_fetch_add_explicit(&total, 2.0f, memory_order_relaxed);
    device atomic_uint* count = (device atomic_uint*)out;
    uint seen = atomic_load_explicit(count + 2, memory_order_relaxed);
    while (!atomic_compare_exchange_weak_explicit(
        count + 2, &seen, seen + 1, memory_order_relaxed, memory_order_relaxed)) {
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (i == 0) {
      out[0] = atomic_load_explicit(&low, memory_order_relaxed);
      out[1] = atomic_exchange_explicit(&total, 1.0f, memory_order_relaxed);
    }
    """
    source = f"""#include <metal_stdlib>
using namespace metal;
[[kernel]] void k(device float* out [[buffer(0)]], uint i [[thread_position_in_grid]]) {{ {body} }}"""
    kernel = emulator.compile(source, "k")
    for mode in ("run", "check"):
        out = np.zeros(3, np.float32)
        emulator.launch(kernel, {0: out}, (64, 1, 1), (64, 1, 1), mode=mode)
        assert out[:2].tolist() == [-3, 128.5]
        assert out.view(np.uint32)[2] == 64


def test_threadgroup_arguments() -> None:
    source = """#include <metal_stdlib>
using namespace metal;
kernel void k(device float* out, threadgroup float* s [[threadgroup(0)]], uint i [[thread_position_in_grid]])
{
  s[i] = i;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  out[i] = s[63 - i];
}"""
    kernel = emulator.compile(source)
    for mode in ("run", "check"):
        out = np.zeros(64, np.float32)
        emulator.launch(kernel, [out], (64, 1, 1), (64, 1, 1), mode=mode, threadgroup_bytes={0: 256})
        np.testing.assert_array_equal(out, np.arange(64)[::-1])
    with pytest.raises(emulator.EmulatorError, match="reads 4 bytes of s at byte"):
        emulator.launch(kernel, [out], (64, 1, 1), (64, 1, 1), mode="check", threadgroup_bytes={0: 128})
    with pytest.raises(ValueError, match="needs threadgroup_bytes of"):
        emulator.launch(kernel, [out], (64, 1, 1), (64, 1, 1))


def test_divergent_loop_with_simd_operation_meets_again() -> None:
    # Legal on a GPU, where the lanes left over vote among themselves; check mode reports it, run mode
    # computes it.
    source = """#include <metal_stdlib>
using namespace metal;
kernel void k(device uint* out, uint i [[thread_position_in_grid]]) {
  uint rounds = 0;
  for (uint k = 0; k < i % 4; k++) rounds += simd_sum(1u);
  out[i] = rounds + 1000 * simd_sum(1u);
}"""
    out = np.zeros(32, np.uint32)
    emulator.launch(emulator.compile(source), [out], (32, 1, 1), (32, 1, 1))
    np.testing.assert_array_equal(out, 32000 + np.array([0, 24, 40, 48] * 8))


def test_cache_sees_changed_headers(tmp_path: Any) -> None:
    (tmp_path / "value.h").write_text("constant int value = 1;")
    source = '#include "value.h"\nkernel void k(device int* out) { out[0] = value; }'
    for value in (1, 22, 22, 1):
        (tmp_path / "value.h").write_text(f"constant int value = {value};")
        out = np.zeros(1, np.int32)
        emulator.launch(emulator.compile(source, include_dirs=[tmp_path]), [out], (1, 1, 1), (1, 1, 1))
        assert out[0] == value


@pytest.mark.parametrize(
    ("buffers", "message"),
    [
        ({}, r"needs buffers 0 \(out\)"),
        ({0: [1.0]}, "must be a NumPy array or an Output, got list"),
        ({0: np.zeros((4, 4), np.float32).T[1:]}, "must be C-contiguous"),
    ],
)
def test_bad_buffers(buffers: Any, message: str) -> None:
    kernel = emulator.compile("kernel void k(device float* out) { out[0] = 0; }")
    with pytest.raises(ValueError, match=message):
        emulator.launch(kernel, buffers, (1, 1, 1), (1, 1, 1))


def test_touched_headers_of_the_library_change_nothing() -> None:
    """An installation sets the times of files; what was compiled from the same contents stays good."""
    import os
    from pathlib import Path

    header = Path(emulator.__file__).parent / "msl" / "types.h"
    os.utime(header)
    assert run("out[i] = 6.5f;", (1, np.float32), threads=1).tolist() == [6.5]


def test_half_and_bfloat_convert_into_each_other_in_templates() -> None:
    header = """
template <typename U, typename T>
U to(T x) { return static_cast<U>(x); }
template <typename U, typename T>
U element(const device T* x, uint i) { return static_cast<U>(x[i]); }
"""
    a = halves(3, THREADS)
    body = "bfloat b = element<bfloat>(a, i); out[i] = b == bfloat(a[i]) ? as_type<ushort>(to<half>(b)) : 1;"
    got = run(body, (THREADS, np.uint16), a, header=header, result="ushort")
    rounded = mx.array(a.astype(np.float32)).astype(mx.bfloat16).astype(mx.float32)
    np.testing.assert_array_equal(got, np.array(rounded).astype(np.float16).view(np.uint16))


@pytest.mark.parametrize(
    "source",
    [
        # A class that ends a namespace does not go on into the kernel.
        "namespace mine { struct S { int a; }; }\n"
        "[[kernel]] void k(device int* y [[buffer(0)]]) { y[0] = 1; }",
        # The text ends with what might begin a declaration.
        "template <typename T> [[kernel]] void of(device int* y [[buffer(0)]]) { y[0] = 1; }\n"
        'template [[host_name("k")]] [[kernel]] decltype(of<bfloat>) of<bfloat>;',
    ],
    ids=["namespace", "end"],
)
def test_where_declarations_end(source: str) -> None:
    text = f"#include <metal_stdlib>\nusing namespace metal;\n{source}"
    result = emulator.launch(
        emulator.compile(text, "k"), [emulator.Output((1,), np.int32)], (1, 1, 1), (1, 1, 1)
    )
    assert result.buffers[0].tolist() == [1]
