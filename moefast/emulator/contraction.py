"""Fused multiply-add as on the GPU, whatever the host's processor would make of it.

The front end marks what may be contracted with ``llvm.fmuladd``: products and sums of one expression, as
Apple's
compiler does. Here each becomes a true fused operation. For float that is the processor's; half and bfloat
are
computed in float, where the product is exact, and the sum is rounded to odd before the one rounding that
counts.
"""

from __future__ import annotations

import re

_FMULADD = re.compile(r"@llvm\.fmuladd\.((?:v(\d+))?(f16|bf16|f32|f64))\b")
_NAMES = {"f16": "half", "bf16": "bfloat"}


def contract(text: str) -> str:
    """IR ``text`` in which every ``llvm.fmuladd`` is fused."""
    narrow = {match[1]: (match[2], match[3]) for match in _FMULADD.finditer(text) if match[3] in _NAMES}
    out: list[str] = []
    for line in text.split("\n"):
        if "@llvm.fmuladd." in line:
            if line.startswith("declare") and not line.split("@llvm.fmuladd.")[1].split("(")[0].endswith(
                ("f32", "f64")
            ):
                continue
            line = _FMULADD.sub(lambda m: f"@{'msl' if m[3] in _NAMES else 'llvm'}.fma.{m[1]}", line)
            if line.startswith("declare") and any(line == former for former in out):
                continue
        out.append(line)
    # An intrinsic may be declared once only, and the module may have used llvm.fma already.
    seen: set[str] = set()
    kept = []
    for line in out:
        if line.startswith("declare") and "@llvm.fma." in line:
            name = line.split("@")[1].split("(")[0]
            if name in seen:
                continue
            seen.add(name)
        kept.append(line)
    functions = "".join(_fused(suffix, lanes, kind) for suffix, (lanes, kind) in sorted(narrow.items()))
    return "\n".join(kept) + functions


def _fused(suffix: str, lanes: str | None, kind: str) -> str:
    """A function that computes ``a * b + c`` with one rounding to half or bfloat."""

    def of(element: str) -> str:
        return f"<{lanes} x {element}>" if lanes else element

    def splat(element: str, value: str) -> str:
        return f"<{', '.join([f'{element} {value}'] * int(lanes))}>" if lanes else value

    narrow, wide, word, bit = of(_NAMES[kind]), of("float"), of("i32"), of("i1")
    return f"""
define internal {narrow} @msl.fma.{suffix}({narrow} %a, {narrow} %b, {narrow} %c) alwaysinline {{
  %x = fpext {narrow} %a to {wide}
  %y = fpext {narrow} %b to {wide}
  %z = fpext {narrow} %c to {wide}
  %product = fmul {wide} %x, %y
  %sum = fadd {wide} %product, %z
  %back = fsub {wide} %sum, %product
  %rest = fsub {wide} %sum, %back
  %lost1 = fsub {wide} %product, %rest
  %lost2 = fsub {wide} %z, %back
  %lost = fadd {wide} %lost1, %lost2
  %bits = bitcast {wide} %sum to {word}
  %lostbits = bitcast {wide} %lost to {word}
  %inexact = fcmp one {wide} %lost, {splat("float", "0.0")}
  %parity = and {word} %bits, {splat("i32", "1")}
  %even = icmp eq {word} %parity, {splat("i32", "0")}
  %adjust = and {bit} %inexact, %even
  %signs = xor {word} %bits, %lostbits
  %outward = icmp sge {word} %signs, {splat("i32", "0")}
  %step = select {bit} %outward, {word} {splat("i32", "1")}, {word} {splat("i32", "-1")}
  %moved = add {word} %bits, %step
  %odd = select {bit} %adjust, {word} %moved, {word} %bits
  %exact = bitcast {word} %odd to {wide}
  %result = fptrunc {wide} %exact to {narrow}
  ret {narrow} %result
}}
"""
