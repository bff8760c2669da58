# ruff: noqa: E501 (a program a line)
"""More valid Metal: what compute kernels in the wild are written with, and what C++ for OpenCL would refuse."""

from __future__ import annotations

from emulator_programs import Program

_BLOCK = "typedef struct { half d; uchar q[4]; } block;"
_PARAMS = "struct Params { int n; float scale; packed_float3 v; float2x2 m; };"

# fmt: off
IDIOMS = [
    # Swizzles of packed and bool vectors.
    Program("packed swizzle read", 32, "packed_float3 p(1, 2, 3); float2 a = p.yz; float3 b = p.zyx; out[i] = a.x * 10 + a.y * 3 + b.x;"),
    Program("packed swizzle write", 54, "packed_float4 p(1, 2, 3, 4); p.xy = float2(50, 3); p.zw = p.xx; out[i] = p.x + p.xyzw.w * 0 + p.y + 1;"),
    Program("packed swizzle compound", 33, "packed_float3 p(1, 2, 3); p.xz *= 10; p.y -= 9; out[i] = p.x + p.y + p.z;"),
    Program("packed swizzle of half and uchar", 9, "packed_half4 h(1, 2, 3, 4); packed_uchar4 c(1, 2, 3, 4); out[i] = float(h.wz.x) + c.bgr.y + c.yz.y;"),
    Program("packed rgba", 7, "packed_float4 p(1, 2, 3, 4); p.rg = p.gr; out[i] = p.r + p.bgra.w + p.rg.y;"),
    Program("packed swizzle in device memory", None, "device packed_float3* p = (device packed_float3*)out; if (i < 8) { p[i].xyz = float3(1, 2, 3); p[i].xy += p[i].yz; p[i].z++; }"),
    Program("packed swizzle through a pointer", None, "device packed_float3* p = (device packed_float3*)out + i; p->xz = p->xz + 1; p->y = p->xz.x;"),
    Program("packed swizzle in threadgroup memory", 7, "threadgroup packed_float3 s[64]; s[t] = packed_float3(t, 2, 3); s[t].yx = float2(4, 3); threadgroup_barrier(mem_flags::mem_threadgroup); out[i] = s[63 - t].x + s[63 - t].yz.x;"),
    Program("packed member of constant memory", 5, "out[i] = f(c0);", "struct C { packed_float3 v; }; constant C c0 = {{1, 2, 3}}; inline float f(constant C& c) { return c.v.yz.x + c.v.zy.x; }"),
    Program("bool swizzle", 3, "bool4 b(true, false, true, true); bool2 c = b.zw; bool3 d = b.xyx; out[i] = c.x + c.y + d.x + d.y + d.z - 1;"),
    Program("bool swizzle write", 2, "bool4 b(true, true, true, true); b.xy = bool2(false); b.zw = b.wz; out[i] = b.x + b.y + b.z + b.w;"),
    Program("bool swizzle of a comparison", 1, "bool4 b = float4(1, 2, 3, 4) > 2.5f; out[i] = all(b.zw) && !any(b.xy) ? 1 : 0;"),
    Program("components as members", 6, "S s; s.lo = 1; s.hi = 2; s.s0 = 3; out[i] = s.lo + s.hi + s.s0;", "struct S { float lo, hi, s0; };"),
    # Packed vectors where a function wants a vector.
    Program("packed in functions", 34, "packed_float3 a(1, 2, 3), b(3, 2, 1); float3 c = 1; out[i] = dot(a, b) + dot(a, c) + dot(c, b) + max(a, b).x + clamp(a, 0.0f, 2.0f).z + length(packed_float2(3, 4)) + abs(-a).y - cross(a, a).x;"),
    Program("packed compares", 2, "packed_int2 a(1, 2), b(1, 3); bool2 e = a == b; out[i] = all(a < b) + e.x + e.y + any(a > 1);"),
    Program("packed integers", 13, "packed_uint2 a(12, 5); packed_uint2 b = (a & 4u) | (a >> 2); a %= 5; a <<= 1; out[i] = b.x + a.x + a.y + 2;"),
    Program("packed elements", 12, "packed_float4 p(1, 2, 3, 4); thread float& e = p[2]; e = 5; out[i] = p[0] + p[1] + p.z + p.w;"),
    # Casts by a type of a template.
    Program("cast by T to a vector", 11, "out[i] = f<float4>(half4(1, 2, 3, 4)).w + f<half4>(half4(1, 2, 3, 4)).z + f<int4>(half4(4.5h)).x;", "template <typename T> T f(half4 v) { return (T)v; }"),
    Program("T(v)", 8, "out[i] = f<float2>(int2(3, 4)).y + f<short2>(int2(3, 4)).y;", "template <typename T> T f(int2 v) { return T(v); }"),
    Program("T(a, b)", 6.5, "out[i] = f<float2>().y + f<half2>().x + f<uint2>().y;", "template <typename T> T f() { return T(2, 2.5f); }"),
    Program("static_cast<T>", 10, "out[i] = f<float4>(uchar4(1, 2, 3, 4)).w + f<half4>(uchar4(6)).x;", "template <typename T> T f(uchar4 v) { return static_cast<T>(v); }"),
    Program("scalar T still converts", 5, "out[i] = f<int>(2.75f) + f<half>(1.5f) + f<float>(1.5f);", "template <typename T> T f(float v) { return T(v) + T(0); }"),
    Program("T between bfloat and half", 6, "out[i] = float(f<bfloat>(half(2))) + float(f<half>(bfloat(4.0f)));", "template <typename T, typename U> T f(U v) { return T(v); }"),
    Program("T of a product in a sum", 13, "out[i] = f<float>(2, 3) + f<half4>(half4(2), half4(3)).w - 1;", "template <typename T> T f(T a, T b) { T c = 1; c += T(a * b); return c; }"),
    Program("T of a comparison", 1, "out[i] = f<float4>(float4(1, 2, 3, 4)).w + f<float4>(float4(0)).x;", "template <typename T> T f(float4 v) { return T(v > 2.0f); }"),
    Program("type of a traits class", 7, "out[i] = f<half>(half4(1, 2, 3, 4));", "template <typename T> struct Wide; template <> struct Wide<half> { typedef float4 type; }; template <typename T> float f(vec<T, 4> v) { using W = typename Wide<T>::type; W w = W(v); W z = (typename Wide<T>::type)v; return w.z + z.w; }"),
    Program("vec<T, N>(v)", 10, "out[i] = f<float, 2>(int2(3, 4)) + f<half, 3>(int3(1, 2, 3));", "template <typename T, int N> float f(vec<int, N> v) { vec<T, N> a = vec<T, N>(v); vec<T, N> b = (vec<T, N>)v; return a[N - 1] + b[0] * 0 + static_cast<vec<T, N>>(v)[N - 1] * 0 + (N == 3 ? 3 : 0); }"),
    Program("vec<bool, N> by typedef", 2, "F<bool> f; f.v[0] = true; f.v[1] = true; f.v[2] = f.v[3] = false; F<float> g; g.v[0] = 1; out[i] = f.v[0] + f.v[1] + f.v[2] + g.v[0] - 1;", "template <typename T> struct F { typedef metal::vec<T, 4> type; type v; };"),
    Program("T beside a conversion operator to T", 2, "out[i] = float(f<half>(bfloat(2.0f)));", "struct C { float v; template <typename U> operator U() const { return U(v); } }; template <typename U, typename T> U f(T v) { return static_cast<U>(v); }"),
    Program("pack of casts", 6, "out[i] = f<float>(1, 2u, 3.5h);", "template <typename T, typename... A> T f(A... a) { return (T(int(a)) + ...); }"),
    # Classes by value from any memory.
    Program("constant class by value", 7, "out[i] = f(p0) + g(p0, 1);", _PARAMS + " constant Params p0 = {2, 1.0f, {1, 2, 3}}; inline float f(Params p) { return p.n + p.scale + p.v.z; } inline float g(Params p, int k) { return k; }"),
    Program("constant class by value through a reference", 5, "out[i] = f(p0);", _PARAMS + " constant Params p0 = {2, 1.0f, {1, 2, 3}}; inline float h(const Params p) { return p.v.z + p.n; } inline float f(constant Params& p) { Params q; q = p; return h(p) + h(q) * 0; }"),
    Program("class without a name", 11, "out[i] = f(b0) + g(b0) + h(&b0);", _BLOCK + " constant block b0 = {1, {1, 2, 3, 4}}; inline float f(block b) { return b.q[3] + b.d; } inline float g(constant block& b) { block c = b; return c.q[2]; } inline float h(constant block* b) { block c = b[0]; return c.q[1] + c.d; }"),
    Program("class returned from constant memory", 3, "out[i] = get(1).a;", "struct S { int a; float b; }; constant S tab[2] = {{1, 2}, {3, 4}}; inline S get(int k) { return tab[k]; }"),
    Program("class with constructors from constant memory", 6, "out[i] = f(c0) + f(C(2, 3));", "struct C { float re, im; C() = default; constexpr C(float a, float b) : re(a), im(b) {} }; constant C c0 = C(1, 0); inline float f(C c) { return c.re + c.im; }"),
    Program("union from constant memory", 1, "U u = u0; out[i] = u.f;", "union U { uint u; float f; }; constant U u0 = {0x3f800000u};"),
    Program("class assigned from a list", 5, "S s; s = {1, 2}; S q[2] = {{1, 2}, {3, 4}}; s = q[1]; q[0] = {7, 1}; out[i] = s.b + q[0].b;", "struct S { int a; float b; };"),
    Program("const members", 3, "S s = s0; out[i] = s.a + s.b;", "struct S { const int a; const float b; }; constant S s0 = {1, 2};"),
    Program("derived from constant memory", 6, "D d = d0; out[i] = d.a + d.b + f(d0);", "struct B { int a; }; struct D : B { int b; }; constant D d0 = {{1}, 2}; inline float f(D d) { return d.a + d.b; }"),
    Program("template class from constant memory", 3, "out[i] = f(b0);", "template <typename T, int N> struct B { T v[N]; T sum() const { T s = 0; for (int k = 0; k < N; k++) s += v[k]; return s; } }; constant B<float, 2> b0 = {{1, 2}}; inline float f(B<float, 2> b) { return b.sum(); }"),
    Program("constructor with template arguments in its name", 2, "M<float> m; m.v = 2; M<float> q = m; out[i] = q.v;", "template <typename T> struct M { T v; constexpr M<T>() = default; constexpr M<T>(T a) : v(a) {} };"),
    Program("captured class by value", 3, "S s = {1, 2}; auto f = [=](int k) { return s.sum() + k; }; out[i] = f(0);", "struct S { int a, b; int sum() const { return a + b; } };"),
    # Matrices.
    Program("matrix times vector", 17, "float2x2 m = float2x2(1, 2, 3, 4); float2 v = m * float2(1, 2); out[i] = v.x + v.y;"),
    Program("vector times matrix", 16, "float2x2 m = float2x2(float2(1, 2), float2(3, 4)); float2 v = float2(1, 2) * m; out[i] = v.x + v.y;"),
    Program("matrix product", 134, "float2x2 a(1, 2, 3, 4), b(5, 6, 7, 8); float2x2 c = a * b; out[i] = c[0][0] + c[0][1] + c[1][0] + c[1][1];"),
    Program("matrix columns", 22, "float3x3 m(2.0f); m[1] = float3(4, 5, 6); m[2].xy = float2(1, 1); thread float3& c = m[0]; c.y = 2; out[i] = m[0][0] + m[0].y + m[1].z + m[1][0] + m[1][1] + m[2][0] + m[2][2];"),
    Program("matrix not square", 32, "float4x2 m = float4x2(float2(1, 2), float2(3, 4), float2(5, 6), float2(7, 8)); float2 v = m * float4(1); float2x4 t2 = transpose(m); out[i] = v.x + t2[1][3] + t2[0][2] - 5 + float4(1).x * 2 + 6;"),
    Program("matrix determinant", 20, "float2x2 a(1, 2, 3, 4); float3x3 b = float3x3(float3(2, 0, 1), float3(1, 3, 2), float3(1, 1, 4)); out[i] = determinant(a) + determinant(b) + determinant(float4x4(float4(1, 2, 0, 0), float4(0, 3, 0, 0), float4(0, 0, 1, 1), float4(0, 0, 0, 2))) - 2;"),
    Program("matrix arithmetic", 12, "float2x2 a(1.0f), b(2.0f); float2x2 c = a + b - a * 3.0f; c += b; c *= 2.0f; c = -c; float2x2 d = c * a; d *= b; out[i] = (d == d) + (d != c) - d[0][0] + 2.0f;"),
    Program("half matrix and conversion", 9, "half2x2 h = half2x2(half2(1, 2), half2(3, 4)); float2x2 f = float2x2(h); half2x2 g = half2x2(f * 2.0f); out[i] = f[1][1] + float(g[1][0]) - 1;"),
    Program("matrix in a buffer", None, "device float4x4* m = (device float4x4*)out; if (i < 2) { float4x4 a = float4x4(float(i)); m[i] = a; m[i][1] = float4(1, 2, 3, 4); m[i][2].w = m[i][1].z; }"),
    Program("matrix in constant memory", 11, "out[i] = f(c0);", "struct C { float2x2 m; }; constant C c0 = {float2x2(1, 2, 3, 4)}; inline float f(constant C& c) { float2x2 a = c.m; float2 v = c.m * float2(1, 1); return a[1][1] + v.y + c.m[0][0]; }"),
    Program("matrix in threadgroup memory", 8, "threadgroup float2x2 s[64]; s[t] = float2x2(float2(t), float2(4)); threadgroup_barrier(mem_flags::mem_threadgroup); float2x2 m = s[63 - t]; out[i] = m[1].x + s[t][1][1];"),
    Program("matrix by a type of a template", 12, "float4x4 a; half4x4 b; fill(a, 3); fill(b, 2); out[i] = a[3][3] + float(b[0][1]) + a[0][0] + 4;", "template <typename M> void fill(thread M& reg, float v) { float4x4 m; for (int k = 0; k < 16; k++) m[k / 4][k % 4] = v; reg = (M)m; }"),
    Program("metal::matrix", 5, "metal::float3x3 m = metal::float3x3(1.0f); matrix<float, 2, 2> k(4.0f); out[i] = m[2][2] + k[1][1];"),
    # Scalars beside vectors.
    Program("half4 * float", 6, "half4 h = half4(2); float s = 3; half4 r = h * s; out[i] = r.x;"),
    Program("half4 *= float", 7, "half4 h = half4(2); float s = 3; h *= s; h += s - 2; out[i] = h.w;"),
    Program("uchar4 and int", 14, "uchar4 u = uchar4(3); int s = 4; u = u * s; ushort4 w = ushort4(u) >> (s - 2); out[i] = u.x + w.y - 1;"),
    Program("half4 * float in a template", 9, "out[i] = f(half4(3), 3).x;", "template <typename T4> T4 f(T4 v, float s) { return v * s * (s - 2); }"),
    Program("scalar argument for a vector", 9, "float4 v = float4(1, 5, 2, 8); out[i] = max(v, 4).x + min(6, v).w + fmax(0, v).x - fmin(v, 2).y + clamp(v, 0, 1).x - pow(v, 1).x;"),
    Program("unsuffixed literal in a template", 1.625, "out[i] = f<float>(1) + f<half>(0.25h);", "template <typename T> float f(T x) { static_assert(sizeof(x * 0.5) == 4, \"\"); return fmin(1.0f, float(x * 0.5 + 0.5)); }"),
    # Lists with fewer values than the vector has lanes.
    Program("float4 = {0}", 1, "float4 v = {1}; float2 w = {0.5f}; out[i] = v.x + v.y + v.z + v.w + w.y;"),
    Program("array of vectors with short lists", 4, "float4 v[2] = {{1}, {2, 1}}; out[i] = v[0].x + v[1].x + v[1].y + v[1].w;"),
    # Methods, references, address spaces.
    Program("method returns a thread reference", 5, "Tile tile; tile.at(1) = 5; thread float& e = tile.at(1); out[i] = e;", "struct Tile { float v[4]; thread float& at(int k) { return v[k]; } const thread float& at(int k) const { return v[k]; } };"),
    Program("method of a member", 2, "Outer o; o.fill(2); out[i] = o.get();", "struct Inner { float v; void set(float a) { v = a; } float get() const { return v; } }; struct Outer { Inner inner; void fill(float a) { inner.set(a); } float get() const { return inner.get(); } };"),
    Program("method of a temporary", 9, "out[i] = S{4}.twice() + make(1).get();", "struct S { float v; float twice() { return 2 * v; } float get() { return v; } }; inline S make(float a) { return S{a}; }"),
    Program("functor", 3, "out[i] = Add()(1.0f, 2.0f);", "struct Add { template <typename T> T operator()(T a, T b) { return help(a) + b; } template <typename T> T help(T a) { return a; } };"),
    Program("matrix elements in a method", 3, "M m; m.clear(3); out[i] = m.first();", "struct M { simdgroup_float8x8 r[2]; void clear(float v) { for (int k = 0; k < 2; k++) { r[k].thread_elements()[0] = v; r[k].thread_elements()[1] = v; } } float first() const { thread const auto& e = r[1].thread_elements(); return e[0]; } };"),
    Program("auto with an address space", 4, "float value = 1; device auto* p = out; const device auto* q = x; thread auto& e = value; e = 3; p[i] = e + (q[0] > 0);"),
    Program("constant reference as a type argument", 3, "out[i] = g(p0);", "struct P { int n; }; constant P p0 = {3}; template <int K, typename A> float f(A args) { return args.n; } inline float g(constant P& p) { return f<1, constant P&>(p); }"),
    Program("builtins of published kernels", 7, "constexpr int log8 = __builtin_ctz(8); out[i] = log8 + __builtin_popcount(15) + __builtin_clz(1u << 31);"),
    Program("plain noexcept", 3, "I<3> k; out[i] = k;", "template <int N> struct I { constexpr operator int() const noexcept { return N; } };"),
    Program("count of a loop by a macro", 6, "float s = 0;\n#pragma unroll (MIN(4, 8))\nfor (int k = 0; k < 4; k++) s += k;\nout[i] = s;", "#define MIN(a, b) ((a) < (b) ? (a) : (b))"),
    Program("numeric limits by Apple's name", 5, "out[i] = numeric_limits<S>::max().v;", "struct S { float v; }; namespace metal { template <> struct _numeric_limits_impl<S> { static constexpr S max() { return S{5}; } }; }"),
]
# fmt: on
