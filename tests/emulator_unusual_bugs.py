"""More kernels with one bug each, and their clean twins: the kinds of emulator_bugs.py in forms that are
easily missed, by way of functions, structs, casts, loops and small types."""

from __future__ import annotations

from emulator_bugs import BARRIER, DEVICE_BARRIER, SIMD_BARRIER, Bug

MEET = f"""void meet(threadgroup float* s, uint t) {{
  s[t] = 1;
  {BARRIER}
}}"""
BRANCHES = """threadgroup float s[64];
if (t < 32) {
  CALL(s, t);
} else {
  CALL(s, t);
}
out[i] = s[t];"""
STRAIGHT = """threadgroup float s[64];
CALL(s, t);
CALL(s, t);
out[i] = s[t];"""
DEEP = f"{MEET}\nvoid deep(threadgroup float* s, uint t) {{\n  meet(s, t);\n}}"
METHOD = f"""struct Meeting {{
  threadgroup float* s;
  void at(uint t) const thread {{
    s[t] = 1;
    {BARRIER}
  }}
}};"""
TOTAL = "float total(float v) {\n  return simd_sum(v);\n}"
SPAN = "struct Span { threadgroup float* data; uint n; };"
VIEW = "struct View { const device float* data; };"
CELL = "struct Cell { float a; int b; };"
# Not known to the compiler, or it would unroll the loop.
TIMES = "uint n = uint(x[0]) + 2;"

UNUSUAL = {
    "barrier in a function, called from two branches": Bug(
        "barrier-divergence",
        BRANCHES.replace("CALL", "meet"),
        STRAIGHT.replace("CALL", "meet"),
        BARRIER,
        before=MEET,
    ),
    "barrier in a function that asks not to be inlined": Bug(
        "barrier-divergence",
        BRANCHES.replace("CALL", "meet"),
        STRAIGHT.replace("CALL", "meet"),
        BARRIER,
        before=f"__attribute__((noinline)) {MEET}",
    ),
    "barrier two calls away": Bug(
        "barrier-divergence",
        BRANCHES.replace("CALL", "deep"),
        STRAIGHT.replace("CALL", "deep"),
        BARRIER,
        before=DEEP,
    ),
    "barrier in a method": Bug(
        "barrier-divergence",
        "threadgroup float s[64];\nMeeting m = {s};\nif (t < 32) m.at(t);\nelse m.at(t);\nout[i] = s[t];",
        "threadgroup float s[64];\nMeeting m = {s};\nm.at(t);\nm.at(t);\nout[i] = s[t];",
        BARRIER,
        before=METHOD,
    ),
    "barrier in a lambda": Bug(
        "barrier-divergence",
        f"auto meet = [] {{\n  {BARRIER}\n}};\nif (t < 32) meet();\nelse meet();\nout[i] = x[i];",
        f"auto meet = [] {{\n  {BARRIER}\n}};\nmeet();\nmeet();\nout[i] = x[i];",
        BARRIER,
    ),
    "barrier in each case": Bug(
        "barrier-divergence",
        f"switch (t / 32) {{\n  case 0: {BARRIER} break;\n  default: {BARRIER} break;\n}}\nout[i] = x[i];",
        f"switch (group) {{\n  case 0: {BARRIER} break;\n  default: {BARRIER} break;\n}}\nout[i] = x[i];",
        BARRIER,
        groups=2,
    ),
    "a simdgroup each in its round": Bug(
        "barrier-divergence",
        f"{TIMES}\nfor (uint k = 0; k < n; k++)\n  if (k == t / 32) {BARRIER}\nout[i] = x[i];",
        f"{TIMES}\nfor (uint k = 0; k < n; k++)\n  if (k == n / 2) {BARRIER}\nout[i] = x[i];",
        BARRIER,
    ),
    "as many rounds in all, differently spread": Bug(
        "barrier-divergence",
        f"{TIMES}\nfor (uint k = 0; k < n; k++)\n  for (uint j = 0; j < (k == t / 32 ? 1u : 3u); j++)\n"
        f"    {BARRIER}\nout[i] = x[i];",
        f"{TIMES}\nfor (uint k = 0; k < n; k++)\n  for (uint j = 0; j < (k == 1 ? 1u : 3u); j++)\n"
        f"    {BARRIER}\nout[i] = x[i];",
        BARRIER,
    ),
    "loop left early before its barrier": Bug(
        "barrier-divergence",
        f"for (uint k = 0; k < 4; k++) {{\n  if (k == 2 && t == 7) break;\n  {BARRIER}\n}}\nout[i] = x[i];",
        f"for (uint k = 0; k < 4; k++) {{\n  if (k == 2) break;\n  {BARRIER}\n}}\nout[i] = x[i];",
        BARRIER,
    ),
    "continue before a barrier": Bug(
        "barrier-divergence",
        f"{TIMES}\nfor (uint k = 0; k < n; k++) {{\n  if (t / 32 == k) continue;\n  {BARRIER}\n}}\n"
        "out[i] = x[i];",
        f"{TIMES}\nfor (uint k = 0; k < n; k++) {{\n  if (k == 1) continue;\n  {BARRIER}\n}}\nout[i] = x[i];",
        BARRIER,
    ),
    "a simdgroup returns before the barrier": Bug(
        "barrier-divergence",
        f"out[i] = x[i];\nif (t >= 32) return;\n{BARRIER}\nout[i] = 2;",
        f"out[i] = x[i];\nif (group == 1) return;\n{BARRIER}\nout[i] = 2;",
        BARRIER,
        groups=2,
    ),
    "simd_sum in a function, called from two branches": Bug(
        "simd-divergence",
        "float v;\nif (lane < 16) v = total(x[i]);\nelse v = total(x[i] + 1);\nout[i] = v;",
        "float v = total(lane < 16 ? x[i] : x[i] + 1);\nout[i] = v;",
        "simd_sum(v)",
        before=TOTAL,
    ),
    "a lane each in its round": Bug(
        "simd-divergence",
        "float v = 0;\nuint n = uint(x[0]) + 32;\nfor (uint k = 0; k < n; k++)\n"
        "  if (k == lane) v = simd_sum(x[i]);\nout[i] = v;",
        "float v = 0;\nuint n = uint(x[0]) + 32;\nfor (uint k = 0; k < n; k++)\n"
        "  if (k == n / 2) v = simd_sum(x[i]);\nout[i] = v;",
        "simd_sum(x[i])",
    ),
    "shuffle in a loop of different lengths": Bug(
        "simd-partial",
        "float v = x[i];\nfor (uint k = 0; k < 1 + lane; k++)\n  v = simd_shuffle_xor(v, 1);\nout[i] = v;",
        "float v = x[i];\nfor (uint k = 0; k < 1 + t / 32; k++)\n  v = simd_shuffle_xor(v, 1);\nout[i] = v;",
        "simd_shuffle_xor",
    ),
    "ballot on one side of an operator": Bug(
        "simd-divergence",
        "bool yes = lane > 3 && simd_any(x[i] > 2);\nout[i] = simd_sum(float(yes));",
        "bool any = simd_any(x[i] > 2);\nbool yes = lane > 3 && any;\nout[i] = simd_sum(float(yes));",
        "simd_any",
    ),
    "quad of which a lane has returned": Bug(
        "simd-partial",
        "if (lane % 4 == 3) { out[i] = 0; return; }\nout[i] = quad_sum(x[i]);",
        "if (lane / 4 == 3) { out[i] = 0; return; }\nout[i] = quad_sum(x[i]);",
        "quad_sum(x[i])",
    ),
    "quad operation on two sides of a branch": Bug(
        "simd-divergence",
        "float v;\nif (lane % 4 < 2) v = quad_max(x[i]);\nelse v = quad_min(x[i]);\nout[i] = quad_sum(v);",
        "float v;\nif (lane % 8 < 4) v = quad_max(x[i]);\nelse v = quad_min(x[i]);\nout[i] = quad_sum(v);",
        "quad_m",
    ),
    "race through a pointer in a struct": Bug(
        "threadgroup-race",
        "threadgroup float s[64];\nSpan a = {s, 64};\na.data[t] = x[i];\nout[i] = a.data[t ^ 1];",
        f"threadgroup float s[64];\nSpan a = {{s, 64}};\na.data[t] = x[i];\n{BARRIER}\n"
        "out[i] = a.data[t ^ 1];",
        "a.data[t ^ 1]",
        before=SPAN,
    ),
    "outside by a pointer in a struct": Bug(
        "device-read-out-of-bounds",
        "View v = {x + 1};\nout[i] = v.data[i];",
        "View v = {x + 1};\nout[i] = v.data[int(i) - 1];",
        "v.data[i]",
        buffer="x",
        before=VIEW,
    ),
    "race of members": Bug(
        "threadgroup-race",
        "threadgroup Cell c[64];\nc[t].a = x[i];\nc[t].b = 1;\nout[i] = c[t ^ 1].b;",
        f"threadgroup Cell c[64];\nc[t].a = x[i];\nc[t].b = 1;\n{BARRIER}\nout[i] = c[t ^ 1].b;",
        "c[t ^ 1].b",
        before=CELL,
    ),
    "race of whole structs": Bug(
        "threadgroup-race",
        "threadgroup Cell c[64];\nc[t] = Cell{x[i], 1};\nCell d = c[63 - t];\nout[i] = d.a + d.b;",
        f"threadgroup Cell c[64];\nc[t] = Cell{{x[i], 1}};\n{BARRIER}\nCell d = c[63 - t];\n"
        "out[i] = d.a + d.b;",
        "c[63 - t]",
        before=CELL,
    ),
    "member of a struct beyond the last": Bug(
        "threadgroup-read-out-of-bounds",
        f"threadgroup Cell c[64];\nc[t] = Cell{{x[i], 1}};\n{BARRIER}\nout[i] = c[t + 1].b;",
        f"threadgroup Cell c[64];\nc[t] = Cell{{x[i], 1}};\n{BARRIER}\nout[i] = c[63 - t].b;",
        "c[t + 1].b",
        before=CELL,
    ),
    "member that nobody wrote": Bug(
        "threadgroup-uninitialised",
        f"threadgroup Cell c[64];\nc[t].a = x[i];\n{BARRIER}\nout[i] = c[63 - t].b;",
        f"threadgroup Cell c[64];\nc[t].a = x[i];\n{BARRIER}\nout[i] = c[63 - t].a;",
        "c[63 - t].b",
        before=CELL,
    ),
    "tally of a threadgroup that nobody set": Bug(
        "threadgroup-uninitialised",
        "threadgroup atomic_uint n;\natomic_fetch_add_explicit(&n, 1u, memory_order_relaxed);\nout[i] = 0;",
        "threadgroup atomic_uint n;\nif (t == 0) atomic_store_explicit(&n, 0u, memory_order_relaxed);\n"
        f"{BARRIER}\natomic_fetch_add_explicit(&n, 1u, memory_order_relaxed);\nout[i] = 0;",
        "atomic_fetch_add",
    ),
    "before a threadgroup variable": Bug(
        "threadgroup-read-out-of-bounds",
        f"threadgroup half s[64];\ns[t] = 1;\n{BARRIER}\nout[i] = s[int(t) - 1];",
        f"threadgroup half s[64];\ns[t] = 1;\n{BARRIER}\nout[i] = s[max(int(t) - 1, 0)];",
        "int(t) - 1",
    ),
    "race of bools": Bug(
        "threadgroup-race",
        f"threadgroup bool seen[4];\nseen[t % 4] = t > 10;\n{BARRIER}\nout[i] = seen[t % 4];",
        f"threadgroup bool seen[4];\nif (t < 4) seen[t] = t > 2;\n{BARRIER}\nout[i] = seen[t % 4];",
        "seen[t % 4] = t > 10",
    ),
    "race of bytes": Bug(
        "device-race",
        "((device char*)scratch)[t / 2] = char(t);\nout[i] = 0;",
        "((device char*)scratch)[t] = char(t);\nout[i] = 0;",
        "char(t)",
        buffer="scratch",
    ),
    "race of a byte and the word around it": Bug(
        "device-race",
        "if (t == 5) ((device uchar*)scratch)[2] = 7;\nif (t == 40) scratch[0] = 1;\nout[i] = 0;",
        "if (t == 5) ((device uchar*)scratch)[4] = 7;\nif (t == 40) scratch[0] = 1;\nout[i] = 0;",
        "scratch[0] = 1",
        buffer="scratch",
    ),
    "atomic by a cast, read without": Bug(
        "device-race",
        "atomic_store_explicit((device atomic_uint*)scratch, t, memory_order_relaxed);\n"
        "out[i] = t == 9 ? scratch[0] : 0;",
        "atomic_store_explicit((device atomic_uint*)scratch, t, memory_order_relaxed);\n"
        "out[i] = atomic_load_explicit((device atomic_uint*)scratch, memory_order_relaxed);",
        "scratch[0]",
        buffer="scratch",
    ),
    "atomic outside": Bug(
        "device-write-out-of-bounds",
        "atomic_fetch_add_explicit(tally + t / 8, 1u, memory_order_relaxed);\nout[i] = 0;",
        "atomic_fetch_add_explicit(tally + t / 16, 1u, memory_order_relaxed);\nout[i] = 0;",
        "tally + t / 8",
        buffer="tally",
    ),
    "misaligned pair of halves": Bug(
        "misaligned",
        "if (t < 63) ((device half2*)((device half*)scratch + 1))[t] = half2(1);\nout[i] = 0;",
        "if (t < 63) ((device half2*)((device half*)scratch + 2))[t] = half2(1);\nout[i] = 0;",
        "half2(1)",
        buffer="scratch",
    ),
    "all write all, each something else": Bug(
        "device-race",
        "for (uint k = 0; k < 64; k++) scratch[k] = t;\nout[i] = 0;",
        "for (uint k = t; k < 64; k += 64) scratch[k] = t;\nout[i] = 0;",
        "scratch[k] = t",
        buffer="scratch",
    ),
    "all write all, the same": Bug(
        "device-equal-writes",
        "for (uint k = 0; k < 64; k++) scratch[k] = 0;\nout[i] = 0;",
        "if (t == 0) for (uint k = 0; k < 64; k++) scratch[k] = 0;\nout[i] = 0;",
        "scratch[k] = 0",
        buffer="scratch",
    ),
    "all copy the same": Bug(
        "threadgroup-equal-writes",
        f"threadgroup Cell c[2];\nc[1] = *(const device Cell*)x;\n{BARRIER}\nout[i] = c[1].a;",
        f"threadgroup Cell c[2];\nif (t == 0) c[1] = *(const device Cell*)x;\n{BARRIER}\nout[i] = c[1].a;",
        "const device Cell*",
        before=CELL,
    ),
    "read after a barrier of one's own simdgroup": Bug(
        "device-race",
        "scratch[t] = x[i];\nsimdgroup_barrier(mem_flags::mem_device);\nout[i] = scratch[63 - t];",
        f"scratch[t] = x[i];\n{DEVICE_BARRIER}\nout[i] = scratch[63 - t];",
        "scratch[63 - t]",
        buffer="scratch",
    ),
    "written again after the others' read, a simdgroup barrier in between": Bug(
        "threadgroup-race",
        f"threadgroup float s[64];\ns[t] = x[i];\n{BARRIER}\nfloat v = s[t ^ 33];\n{SIMD_BARRIER}\n"
        "s[t] = v;\nout[i] = s[t];",
        f"threadgroup float s[64];\ns[t] = x[i];\n{BARRIER}\nfloat v = s[t ^ 3];\n{SIMD_BARRIER}\n"
        "s[t] = v;\nout[i] = s[t];",
        "s[t] = v",
    ),
}
