"""Launching what Apple's compiler made: AIR from a ``.metallib``, compiled for the host.

AIR is LLVM IR: address spaces, metadata that describes the kernel's arguments, and ``air.*`` functions. It
goes through the same stages as translated sources, so it runs in check mode too; there are no lines to show.
"""

from __future__ import annotations

import re
from pathlib import Path

from . import cache, contraction, pipeline
from .air_intrinsics import lower
from .air_metadata import Constants, signature, with_constants
from .compile import Kernel, store
from .inlining import inline_meeting
from .ir import Module, leading_type
from .metallib import Metallib
from .reflect import BUILTINS, Signature
from .toolchain import must, toolchain


def load(library: Metallib, name: str, function_constants: Constants | None = None) -> Kernel:
    """The kernel ``name`` of a Metal library, to be launched as a compiled one.

    Args:
        function_constants: values by index or by name; the kernel needs all it declares.

    Raises:
        ValueError: a function constant has no value, or an argument is no buffer.
        KeyError: there is no such kernel.
        UnknownIntrinsicError: it calls a function of the GPU that the emulator does not supply.
    """
    bitcode = library.bitcode(name)
    constants = dict(function_constants or {})

    def make(folder: Path) -> None:
        disassemble = [*toolchain().clang, *toolchain().target]
        disassemble += ["-x", "ir", "-S", "-emit-llvm", "-Wno-override-module"]
        raw = folder / "kernel.air"
        raw.write_bytes(bitcode)
        text = must([*disassemble, "-Xclang", "-disable-llvm-passes", str(raw), "-o", "-"])
        text = with_constants(text, name, constants)
        lowered = threadgroup_variables(lower(_host(text)))
        taken, types = signature(text, name, lambda: pipeline.optimise(lowered, "-O1"))
        ir = inline_meeting(contraction.contract(lowered + _entry(taken, types)))
        store(folder, ir, taken, [str(_library())])

    return Kernel(
        name, cache.entry(cache.key("air", bitcode, name, sorted(constants.items(), key=repr)), make)
    )


def _library() -> Path:
    """The simdgroup operations (msl/air.h), as an object to link."""

    def make(folder: Path) -> None:
        pipeline.own_object(pipeline.PACKAGE / "msl" / "air.h", folder / "air.o")

    return cache.entry(f"air-{cache.key('air library')}", make) / "air.o"


def _host(text: str) -> str:
    """IR that the host's code generator takes."""
    text = re.sub(r"^@llvm\.global_ctors = appending global \[0 x .*$", "", text, flags=re.MULTILINE)
    text = re.sub(r' section "air\.[\w.]+"|, section "air\.[\w.]+"', "", text)
    text = re.sub(r'"air-[\w-]+"(?:="[^"]*")?', "", text)
    # As in pipeline.py: a launch decides of denormals.
    as_sources = r'\1 "denormal-fp-math"="dynamic,dynamic"'
    return pipeline.probing(re.sub(r"^(attributes #\d+ = \{)", as_sources, text, flags=re.MULTILINE))


_SHARED = re.compile(r"^(@[\w.$-]+|@\"[^\"]+\") = .*addrspace\(3\) global (.+)$")
_CONSTANT = re.compile(r"\b(getelementptr|addrspacecast|bitcast|ptrtoint)\b([\w ]*)\(([^()]*)\)")


def threadgroup_variables(text: str) -> str:
    """IR that asks the runtime for threadgroup variables.

    In AIR they are globals, of which each OS thread would need its own.
    """
    lines = text.split("\n")
    shared: dict[str, tuple[int, str, str]] = {}
    kept = []
    for line in lines:
        if found := _SHARED.match(line):
            kind = leading_type(found[2])
            align = re.search(r", align (\d+)", found[2])
            shared[found[1]] = (len(shared), kind, align[1] if align else "16")
        else:
            kept.append(line)
    if not shared:
        return text
    module = Module("\n".join(kept))
    inserted: dict[int, list[str]] = {}
    for body in module.bodies:
        entry: list[str] = []
        names: dict[str, str] = {}
        for i in range(body.first + 1, body.last):
            if "@" in module.lines[i]:
                module.lines[i] = _from_runtime(module.lines[i], shared, names, entry)
        inserted[body.first] = entry
    out = []
    for i, line in enumerate(module.lines):
        out += [line, *inserted.get(i, [])]
    declaration = "declare ptr addrspace(3) @msl_threadgroup_variable(i32, i32, i32, i32)"
    return "\n".join([*out, declaration])


def _from_runtime(
    line: str, shared: dict[str, tuple[int, str, str]], names: dict[str, str], entry: list[str]
) -> str:
    """An instruction whose operands name what ``entry`` computes, instead of globals and constants made of
    them."""
    for name, (number, kind, align) in shared.items():
        if not re.search(re.escape(name) + r"(?![\w.$-])", line):
            continue
        if name not in names:
            names[name] = f"%msl.shared.{number}"
            size = f"ptrtoint (ptr getelementptr ({kind}, ptr null, i32 1) to i32)"
            entry.append(
                f"  {names[name]} = call ptr addrspace(3) @msl_threadgroup_variable("
                f"i32 {number}, i32 {size}, i32 {align}, i32 0)"
            )
        line = re.sub(re.escape(name) + r"(?![\w.$-])", names[name], line)
    while True:
        found = next((m for m in _CONSTANT.finditer(line) if "%msl." in m[3]), None)
        if not found:
            return line
        value = f"%msl.part.{len(entry)}"
        entry.append(f"  {value} = {found[1]}{found[2].rstrip()} {found[3]}")
        line = line[: found.start()] + value + line[found.end() :]


def _entry(taken: Signature, types: list[str]) -> str:
    """``msl_entry``, which calls the kernel with what a launch brings."""
    order = list(BUILTINS)
    lines, passed = [], []
    for i, (parameter, kind) in enumerate(zip(taken.parameters, types, strict=True)):
        if parameter.kind == "builtin":
            at = 16 * order.index(parameter.attribute)
            lines.append(f"  %p{i} = getelementptr i8, ptr %context, i64 {at}")
            lanes = re.fullmatch(r"<(\d+) x (i\d+)>", kind)
            wide = f"<{lanes[1]} x i32>" if lanes else "i32"
            lines.append(f"  %w{i} = load {wide}, ptr %p{i}, align 4")
            lines.append(f"  %a{i} = {'bitcast' if wide == kind else 'trunc'} {wide} %w{i} to {kind}")
        else:
            at = 8 * (parameter.index + (31 if parameter.kind == "threadgroup" else 0))
            lines.append(f"  %p{i} = getelementptr i8, ptr %arguments, i64 {at}")
            lines.append(f"  %w{i} = load ptr, ptr %p{i}, align 8")
            lines.append(f"  %a{i} = addrspacecast ptr %w{i} to {kind}")
        passed.append(f"{kind} %a{i}")
    lines.append(f"  call void {taken.call}({', '.join(passed)})")
    return (
        "\ndefine void @msl_entry(ptr %arguments, ptr %context) {\n" + "\n".join(lines) + "\n  ret void\n}\n"
    )
