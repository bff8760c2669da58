"""What Apple's compiler rejects does not compile, and the error shows the user's line; valid code does."""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

import pytest
from emulator_refusals import ROWS

from moefast import emulator
from moefast.env import settings

pytestmark = pytest.mark.skipif(
    find_spec("ziglang") is None and not settings.clang, reason="needs the compiler of moefast[emulator]"
)

KERNEL = """#include <metal_stdlib>
using namespace metal;
{outside}
[[kernel]] void probe(device float* out [[buffer(0)]], const device float* x [[buffer(1)]],
                      constant int& n [[buffer(2)]], uint i [[thread_position_in_grid]]) {{
  threadgroup float shared[32];
  {inside}
}}
"""


class Case(NamedTuple):
    """``shown`` is part of the user's line that the error quotes; empty: any line of the user's."""

    name: str
    outside: str
    inside: str
    shown: str = ""


REFUSED = [
    Case(
        "device pointer as thread parameter",
        "inline void f(thread float* p) { p[0] = 1; }",
        "f(out);",
        "f(out)",
    ),
    Case("device pointer to threadgroup", "", "threadgroup float* p = out; out[i] = p[0];", "p = out"),
    Case("thread array to device pointer", "", "float a[4]; device float* p = a; out[i] = p[0];", "p = a"),
    Case("local pointer without space", "", "float* p = out; p[0] = 1;", "float* p"),
    Case(
        "parameter pointer without space",
        "inline float f(const float* p) { return p[0]; }",
        "out[i] = f(x);",
        "f(",
    ),
    Case(
        "reference without space", "inline float f(const float& p) { return p; }", "out[i] = f(x[0]);", "f("
    ),
    Case(
        "kernel buffer without space",
        "[[kernel]] void other(float* o [[buffer(0)]]) { o[0] = 1; }",
        "out[i] = 0;",
        "float* o",
    ),
    Case("write through const", "", "((const device float*)out)[0] = 1;", "= 1"),
    Case("write to constant", "", "n = 3;", "n = 3"),
    Case("const dropped", "inline void f(device float* p) { p[0] = 1; }", "f(x);", "f(x)"),
    Case("double", "", "double d = 1.0; out[i] = d;", "double d"),
    Case("recursion", "inline float f(int k) { return k ? f(k - 1) + 1 : 0; }", "out[i] = f(n);", "f(k - 1)"),
    Case("throw", "", "throw 1;", "throw"),
    Case("try and catch", "", "try { out[i] = 1; } catch (...) {}", "try"),
    Case("virtual", "struct V { virtual float f() { return 1; } };", "V v; out[i] = v.f();", "virtual"),
    Case(
        "function pointer",
        "inline float f(float a) { return a; }",
        "float (*p)(float) = f; out[i] = p(1);",
        "(*p)",
    ),
    Case("new", "", "thread float* p = new float[3]; out[i] = p[0];", "new"),
    Case("typeid", "struct A {};", "out[i] = typeid(A) == typeid(A);", "typeid"),
    Case("thread_local", "thread_local int q;", "out[i] = q;", "thread_local"),
    Case("static local", "", "static int q = 0; out[i] = q++;", "static"),
    Case("goto", "", "goto end; end: out[i] = 1;", "goto"),
    Case("float to bfloat", "", "bfloat b = x[i]; out[i] = float(b);", "bfloat b"),
    Case("bfloat to half", "", "bfloat b = bfloat(x[i]); half h = b; out[i] = h;", "half h"),
    Case("float4 to half4", "", "float4 v = float4(1); half4 h = v; out[i] = h.x;", "half4 h"),
    Case("uint3 to uint", "", "uint3 v = uint3(i); uint q = v; out[i] = q;", "uint q"),
    Case("min(int, uint)", "", "out[i] = min(n, i);", "min(n, i)"),
    Case("exp(int)", "", "out[i] = metal::exp(n);", "exp(n)"),
    Case("global variable", "float g = 3.0f;", "out[i] = g;", "float g"),
    Case("constexpr global", "constexpr float g = 3.0f;", "out[i] = g;", "float g"),
    Case("threadgroup initialiser", "", "threadgroup float t = 1.0f; out[i] = t;", "t = 1.0f"),
    Case(
        "threadgroup outside a kernel",
        "inline float f() { threadgroup float t[2]; t[0] = 1; return t[0]; }",
        "out[i] = f();",
        "threadgroup float t",
    ),
    Case("standard header", "#include <vector>", "out[i] = 0;", "<vector>"),
    Case("std::exp", "", "out[i] = std::exp(x[i]);", "std::exp"),
    Case("as_type of another size", "", "out[i] = as_type<float>((half)1);"),
    Case("swizzle out of range", "", "float2 v = float2(1, 2); out[i] = v.z;", "v.z"),
    Case(
        "reinterpret_cast across spaces",
        "",
        "threadgroup float* p = reinterpret_cast<threadgroup float*>(out); out[i] = p[0];",
        "reinterpret_cast",
    ),
    Case(
        "misspelt attribute",
        "[[kernel]] void other(device float* o [[buffer(0)]], uint i [[thread_positon_in_grid]]) {}",
        "out[i] = 0;",
        "thread_positon_in_grid",
    ),
    Case("printf", "", 'printf("x"); out[i] = 0;', "printf"),
    # Beyond the experiment's.
    Case(
        "pointer without space to a thread's own", "", "float a[2]; float* p = a; out[i] = p[0];", "float* p"
    ),
    Case("pointer member without space", "struct S { float* p; };", "out[i] = 0;", "float* p"),
    Case(
        "pointer to a class without space", "struct S { float v; };", "S s; S* p = &s; out[i] = p->v;", "S* p"
    ),
    Case(
        "mutual recursion",
        "float g(int k); float f(int k) { return k ? g(k - 1) : 0; } float g(int k) { return f(k) + 1; }",
        "out[i] = f(n);",
        "f(k",
    ),
    Case("half to bfloat", "", "half h = half(x[i]); bfloat b = h; out[i] = float(b);", "bfloat b"),
    Case("bfloat sum in float", "", "bfloat b = bfloat(0.0f); b = b + x[i]; out[i] = float(b);", "b + x"),
    Case("long in simd_sum", "", "long v = i; out[i] = float(simd_sum(v));", "simd_sum(v)"),
    Case(
        "parameter without attribute",
        "[[kernel]] void other(device float* o, uint i) {}",
        "out[i] = 0;",
        "uint i",
    ),
    Case("delete", "", "delete out;", "delete"),
    Case("atomic of an unsupported type", "", "threadgroup atomic<short> a; out[i] = 0;"),
    Case("too many values for a vector", "", "float2 v = float2(1, 2, 3); out[i] = v.x;"),
    Case("too few values for a vector", "", "float4 v = float4(1, 2); out[i] = v.x;"),
    Case("device to constant", "", "constant float* p = x; out[i]=p[0];"),
    Case("constant without init", "constant float g;", "out[i] = g;"),
    Case("device global", "device float g[4];", "out[i] = g[0];"),
    Case("threadgroup global", "threadgroup float g[4];", "g[0] = 1; out[i] = g[0];"),
    Case("static global", "static float g = 1;", "out[i] = g;"),
    Case("const global", "const float g = 1;", "out[i] = g;"),
    Case("device local var", "", "device float q = 1; out[i] = q;"),
    Case("double cast", "", "out[i] = (double)x[i];"),
    Case("long double", "", "long double d = 1; out[i]=d;"),
    Case("double L suffix", "", "out[i] = 1.0L;"),
    Case(
        "recursion member", "struct S { int f(int k) { return k ? f(k-1)+1 : 0; } };", "S s; out[i] = s.f(n);"
    ),
    Case(
        "recursion template",
        "template <typename T> T f(int k) { return k ? f<T>(k-1)+1 : 0; }",
        "out[i] = f<float>(n);",
    ),
    Case(
        "recursion via lambda",
        "",
        "auto f = [](auto self, int k) -> int { return k ? self(self, k-1)+1 : 0; }; out[i] = f(f, n);",
    ),
    Case(
        "function pointer param",
        "inline float f() { return 1; } inline float g(float (*p)()) { return p(); }",
        "out[i] = g(f);",
    ),
    Case(
        "function pointer array",
        "inline float f() { return 1; }",
        "float (*p[2])() = {f, f}; out[i] = p[i&1]();",
    ),
    Case(
        "member fn pointer",
        "struct S { float f() { return 1; } };",
        "float (S::*p)() = &S::f; S s; out[i] = (s.*p)();",
    ),
    Case("malloc", "", "thread int* p = (thread int*)malloc(4); out[i] = *p;"),
    Case(
        "dynamic_cast",
        "struct B {}; struct D : B {};",
        "D d; thread B* b = &d; out[i] = dynamic_cast<thread D*>(b) != nullptr;",
    ),
    Case("using namespace std", "using namespace std;", "out[i] = 1;"),
    Case("include cmath", "#include <cmath>", "out[i] = 1;"),
    Case("sqrtf", "", "out[i] = sqrtf(x[i]);"),
    Case("float to bfloat arg", "inline void f(bfloat b) {}", "f(x[i]); out[i]=1;"),
    Case("float to bfloat return", "inline bfloat f(float a) { return a; }", "out[i] = f(x[i]);"),
    Case("float to bfloat store", "", "device bfloat* b = (device bfloat*)out; b[i] = x[i];"),
    Case("bfloat literal float", "", "bfloat b = 1.5f; out[i] = b;"),
    Case("bfloat += float", "", "bfloat b = bfloat(1.0f); b += x[i]; out[i] = b;"),
    Case("bfloat * half", "", "bfloat b = bfloat(1.0f); half h = 1; out[i] = b * h;"),
    Case("int4 to float4 implicit", "", "float4 a = int4(1); out[i]=a.x;"),
    Case("half4 + float4", "", "out[i] = (half4(1) + float4(1)).x;"),
    Case("if on vector", "", "if (float2(1,2) > 1.0f) out[i] = 1;"),
    Case("swizzle dup assign", "", "float4 a(1); a.xx = float2(1); out[i]=a.x;"),
    Case("ctor vec too many", "", "float3 a = float3(float2(1), float2(2)); out[i]=a.x;"),
    Case("min int float", "", "out[i] = min(1, x[i]);"),
    Case("max half float", "", "out[i] = max(half(1), x[i]);"),
    Case("simd_and float", "", "out[i] = simd_and(x[i]);"),
    Case("matrix 16x16", "", "simdgroup_matrix<float,16,16> m; out[i]=1;"),
    Case("matrix load wrong type", "", "simdgroup_half8x8 m; simdgroup_load(m, x, 8); out[i]=1;"),
    Case("atomic plain assign", "", "threadgroup atomic_int a; a = 1; out[i] = 1;"),
    Case("atomic on plain", "", "atomic_fetch_add_explicit(out, 1.0f, memory_order_relaxed);"),
    Case(
        "atomic seq_cst",
        "",
        "atomic_fetch_add_explicit((device atomic_int*)out, 1, memory_order_seq_cst);",
    ),
    Case(
        "atomic float max",
        "",
        "atomic_fetch_max_explicit((device atomic_float*)out, 1.0f, memory_order_relaxed);",
    ),
    Case(
        "atomic thread local",
        "",
        "atomic_int a; atomic_store_explicit(&a, 1, memory_order_relaxed); out[i]=1;",
    ),
    Case(
        "int64 atomic add",
        "",
        "atomic_fetch_add_explicit((device atomic_ulong*)out, 1ul, memory_order_relaxed);",
    ),
    Case("barrier without args", "", "threadgroup_barrier(); out[i]=1;"),
    Case("OpenCL barrier", "", "barrier(CLK_LOCAL_MEM_FENCE); out[i]=1;"),
    Case("get_global_id", "", "out[i] = get_global_id(0);"),
    Case("OpenCL __global", "", "__global float* p = out; p[i] = 1;"),
    Case("OpenCL convert", "", "out[i] = convert_float4(int4(1)).x;"),
    Case(
        "tg var in lambda",
        "",
        "auto f = [&]() { threadgroup float q[2]; q[0] = 1; return q[0]; }; out[i] = f();",
    ),
    Case("tg member", "struct S { threadgroup float a[4]; };", "S s; out[i] = 1;"),
    Case("tg VLA", "", "threadgroup float q[n]; out[i] = q[0];"),
    Case("VLA", "", "float q[n]; out[i] = q[0];"),
    Case("kernel returns float", "[[kernel]] float o2(device float* o) { return 1; }", "out[i]=1;"),
    Case(
        "kernel by value buffer",
        "[[kernel]] void o2(device float* o, float v [[buffer(1)]]) { o[0] = v; }",
        "out[i]=1;",
    ),
    Case(
        "kernel thread ptr",
        "[[kernel]] void o2(device float* o, thread float* v [[buffer(1)]]) { o[0] = v[0]; }",
        "out[i]=1;",
    ),
    Case(
        "kernel dup buffer",
        "[[kernel]] void o2(device float* o [[buffer(0)]], device float* p [[buffer(0)]]) { o[0] = p[0]; }",
        "out[i]=1;",
    ),
    Case("kernel buffer 31", "[[kernel]] void o2(device float* o [[buffer(31)]]) { o[0] = 1; }", "out[i]=1;"),
    Case(
        "builtin wrong type float",
        "[[kernel]] void o2(device float* o, float t [[thread_position_in_grid]]) { o[0] = t; }",
        "out[i]=1;",
    ),
    Case(
        "builtin int",
        "[[kernel]] void o2(device float* o, int t [[thread_position_in_grid]]) { o[0] = t; }",
        "out[i]=1;",
    ),
    Case(
        "builtin uint4",
        "[[kernel]] void o2(device float* o, uint4 t [[thread_position_in_grid]]) { o[0] = t.x; }",
        "out[i]=1;",
    ),
    Case(
        "builtin scalar as uint3",
        "[[kernel]] void o2(device float* o, uint3 t [[thread_index_in_simdgroup]]) { o[0] = t.x; }",
        "out[i]=1;",
    ),
    Case(
        "attr threadgroup on device",
        "[[kernel]] void o2(device float* o [[threadgroup(0)]]) { o[0] = 1; }",
        "out[i]=1;",
    ),
    Case(
        "attr buffer on threadgroup",
        "[[kernel]] void o2(device float* o, threadgroup float* s [[buffer(1)]]) { o[0] = 1; }",
        "out[i]=1;",
    ),
    Case("misspelt kernel attr", "[[kernal]] void o2(device float* o) { o[0] = 1; }", "out[i]=1;"),
    Case(
        "call kernel from kernel", "[[kernel]] void o2(device float* o) { o[0] = 1; }", "o2(out); out[i] = 1;"
    ),
    Case("pointer cast no AS", "", "out[i] = *(float*)(x);"),
    Case("pointer cast no AS reint", "", "out[i] = *reinterpret_cast<const float*>(x);"),
    Case("pointer typedef no AS", "typedef float* P;", "P p = out; p[i] = 1;"),
    Case("using ptr no AS", "using P = float*;", "P p = out; p[i] = 1;"),
    Case("lambda ref param no AS", "", "auto f = [](float& a) { a = 1; }; float q; f(q); out[i] = q;"),
    Case("dot int", "", "out[i] = dot(int3(1), int3(1));"),
    Case(
        "call nonconst device method",
        "struct S { float v; void f() { v = 1; } };",
        "device S* s = (device S*)out; s->f(); ",
    ),
    Case(
        "call method on tg struct no qual",
        "struct S { float v; void f() { v = 1; } };",
        "threadgroup S s; s.f(); out[i] = 1;",
    ),
    Case(
        "call method on constant struct no qual",
        "struct S { float v; float f() const { return v; } }; constant S c = {1};",
        "out[i] = c.f();",
    ),
    Case("texture", "[[kernel]] void o2(texture2d<float> t [[texture(0)]]) {}", "out[i]=1;"),
    Case("float8", "", "float8 a; out[i] = 1;"),
    Case("as_type bool", "", "out[i] = as_type<uint>(true);"),
    Case("reinterpret scalar", "", "out[i] = reinterpret_cast<float>(n);"),
    Case("mod float", "", "out[i] = x[i] % 2.0f;"),
    Case(
        "this address",
        "struct S { float v; float f() { S* p = this; return p->v; } };",
        "S s; out[i] = s.f();",
    ),
]

ALLOWED = [
    Case("the frame itself", "", "shared[i] = x[i]; out[i] = shared[i] * 1.5 + n;"),
    Case("64-bit shift", "", "out[i] = float(1ull << 40);"),
    Case(
        "product of what is named as a type elsewhere",
        "template <typename T> T f(T a) { return a; }",
        "float T = 2; out[i] = (T * x[i]);",
    ),
    Case("explicit bfloat", "", "bfloat b = bfloat(x[i]); b += bfloat(1.0f); out[i] = float(b);"),
    Case("half from float", "", "half h = x[i]; out[i] = h;"),
    Case("lambda", "", "auto f = [&](float a) { return a + out[0]; }; out[i] = f(1);"),
    Case(
        "references with a space",
        "inline void f(thread float& a, device float& b) { b = a; }",
        "float a = 1; f(a, out[i]);",
    ),
    Case(
        "methods of thread and device",
        "struct S { float v; float get() const thread { return v; } float get() const device; };",
        "S s; s.v = 1; out[i] = s.get();",
    ),
    Case(
        "deleted function",
        "struct S { float v; S() = default; S(float) = delete; };",
        "S s; s.v = 2; out[i] = s.v;",
    ),
    Case(
        "loop that is written as a call",
        "struct L { int at; void go(int k) thread { at += k; if (k > 0) { go(k - 1); } } };",
        "L l; l.at = 0; l.go(n); out[i] = l.at;",
    ),
    Case(
        "constant table",
        "constant float table[2] = {1, 2};\nconstexpr constant int two = 2;",
        "out[i] = table[i % two];",
    ),
    Case("bool counts as int in simd_sum", "", "out[i] = simd_sum(x[i] > 0);"),
    Case("contraction pragma", "#pragma METAL fp contract(off)", "out[i] = x[i] * x[i] + x[i];"),
    Case("pointer to pointer", "", "device float* p = out; device float* thread* q = &p; (*q)[i] = 1;"),
    Case("metal:: without using", "", "out[i] = metal::fma(x[i], 2.0f, metal::float2(1, 2).x);"),
]


def compile_case(case: Case) -> None:
    emulator.compile(KERNEL.format(outside=case.outside, inside=case.inside), "probe", name="probe.metal")


@pytest.mark.parametrize("case", [*REFUSED, *(Case(*row) for row in ROWS)], ids=lambda case: case.name)
def test_refused(case: Case) -> None:
    with pytest.raises(emulator.CompileError) as caught:
        compile_case(case)
    own = [d for d in caught.value.diagnostics if d.file == "probe.metal" and d.text]
    assert own, str(caught.value)
    if case.shown:
        assert any(case.shown in d.text for d in own), str(caught.value)
        assert case.shown in str(caught.value)


@pytest.mark.parametrize("case", ALLOWED, ids=lambda case: case.name)
def test_allowed(case: Case) -> None:
    compile_case(case)


def test_too_many_buffers() -> None:
    def source(buffers: int) -> str:
        parameters = ", ".join(f"device int* p{i}" for i in range(buffers))
        return f"kernel void k({parameters}) {{ p0[0] = 1; }}"

    assert len(emulator.compile(source(31)).signature.buffers) == 31
    with pytest.raises(emulator.CompileError, match="at most 31 buffers"):
        emulator.compile(source(32))


def test_line_and_column_are_the_users() -> None:
    with pytest.raises(emulator.CompileError) as caught:
        compile_case(Case("", "\n\n", "float4 v = float4(1);\n  out[i] = v.q;"))
    diagnostic = caught.value.diagnostics[0]
    assert (diagnostic.line, diagnostic.text.strip()) == (10, "out[i] = v.q;")


def test_every_reason_is_listed() -> None:
    with pytest.raises(emulator.CompileError) as caught:
        compile_case(Case("", "", "goto end; end: double d = 1;"))
    assert len(caught.value.diagnostics) == 3  # goto, its label, double


def test_unknown_kernel_names_those_there_are() -> None:
    with pytest.raises(emulator.CompileError, match="no kernel 'missing': it has probe"):
        emulator.compile(KERNEL.format(outside="", inside="out[i] = 0;"), "missing")


@pytest.mark.parametrize(
    "rest", ["typedef float t", "using t = float", "struct S {", "template <typename", "["]
)
def test_source_that_ends_too_soon(rest: str) -> None:
    with pytest.raises(emulator.CompileError):
        emulator.compile(KERNEL.format(outside="", inside="out[i] = 0;") + rest, "probe")


def test_function_constant_without_value() -> None:
    source = KERNEL.format(outside="constant int k [[function_constant(3)]];", inside="out[i] = k;")
    with pytest.raises(emulator.CompileError, match="function constant 'k'"):
        emulator.compile(source, "probe")
    assert emulator.compile(source, "probe", function_constants={3: 7}).signature.kernel == "probe"


CONSTANTS = """constant int n [[function_constant(0)]];
constant bool given = is_function_constant_defined(n);
constant int m = given ? n : 2;
constant int fixed = 4;
template <int N> struct S { float v[N]; };
"""


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ("float a[n]; a[0] = 1; o[0] = a[0];", 7),
        ("float a[2][\nm + 1]; a[0][0] = 1; o[0] = a[0][0];", 8),
        ("threadgroup float a[n * 2]; a[0] = 1; o[0] = a[0];", 7),
        ("S<2> s[m]; s[0].v[0] = 1; o[0] = s[0].v[0];", 7),
        ("float a[fixed]; a[m] = 1; o[n] = a[m];", None),
        ("float a[2] = {1, 2}; float b = 2 * a[n]; o[0] = b; o[m] = a[n] + o[n * 2];", None),
        ("const device float* p = o; float a[3]; a[p[n] > 1 ? n : 0] = 1; o[0] = a[0];", None),
        ("auto f = [=](int i) { return o[n + i]; }; o[0] = f(1);", None),
    ],
)
def test_function_constant_as_the_size_of_an_array(body: str, line: int | None) -> None:
    source = f"{CONSTANTS}kernel void k(device float* o [[buffer(0)]]) {{\n{body}\n}}\n"
    if line is None:
        emulator.compile(source, "k", function_constants={"n": 1})
        return
    with pytest.raises(emulator.CompileError, match="cannot be the size of an array") as caught:
        emulator.compile(source, "k", function_constants={"n": 1})
    assert [reason.line for reason in caught.value.diagnostics] == [line]
