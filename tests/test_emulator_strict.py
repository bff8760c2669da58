"""What Apple's compiler rejects does not compile, and the error shows the user's line; valid code does."""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

import pytest

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
    """``shown`` is part of the user's line that the error quotes; empty: any line of the source."""

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


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_refused(case: Case) -> None:
    with pytest.raises(emulator.CompileError) as caught:
        compile_case(case)
    own = [d for d in caught.value.diagnostics if d.file == "probe.metal" and d.text]
    if case.shown:
        assert any(case.shown in d.text for d in own), str(caught.value)
        assert case.shown in str(caught.value)


@pytest.mark.parametrize("case", ALLOWED, ids=lambda case: case.name)
def test_allowed(case: Case) -> None:
    compile_case(case)


def test_line_and_column_are_the_users() -> None:
    with pytest.raises(emulator.CompileError) as caught:
        compile_case(Case("", "\n\n", "float4 v = float4(1);\n  out[i] = v.q;"))
    diagnostic = caught.value.diagnostics[0]
    assert (diagnostic.line, diagnostic.text.strip()) == (10, "out[i] = v.q;")


def test_every_reason_is_listed() -> None:
    with pytest.raises(emulator.CompileError) as caught:
        compile_case(Case("", "", "goto end; end: double d = 1;"))
    assert len(caught.value.diagnostics) == 2


def test_unknown_kernel_names_those_there_are() -> None:
    with pytest.raises(emulator.CompileError, match="no kernel 'missing': it has probe"):
        emulator.compile(KERNEL.format(outside="", inside="out[i] = 0;"), "missing")


def test_function_constant_without_value() -> None:
    source = KERNEL.format(outside="constant int k [[function_constant(3)]];", inside="out[i] = k;")
    with pytest.raises(emulator.CompileError, match="function constant 'k'"):
        emulator.compile(source, "probe")
    assert emulator.compile(source, "probe", function_constants={3: 7}).signature.kernel == "probe"
