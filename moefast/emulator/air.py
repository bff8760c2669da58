"""Launching what Apple's compiler made: AIR from a ``.metallib``, compiled for the host.

AIR is LLVM IR: address spaces, metadata that describes the kernel's arguments, and ``air.*`` functions. It
    goes
through the same stages as translated sources, so it runs in check mode too; there are no lines to show.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from . import cache, contraction, pipeline
from .air_intrinsics import lower
from .compile import Kernel, store
from .ir import Module, leading_type, split_top
from .metallib import Metallib
from .reflect import BUILTINS, Parameter, Signature
from .toolchain import must, toolchain

_NODE = re.compile(r"^!(\d+) = (?:distinct )?!\{(.*)\}$", re.MULTILINE)
_SPACES = {1: "device", 2: "constant", 3: "threadgroup"}


def load(
    library: Metallib, name: str, function_constants: Mapping[int | str, bool | int] | None = None
) -> Kernel:
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
        disassemble = [
            *toolchain().clang,
            *toolchain().target,
            "-x",
            "ir",
            "-S",
            "-emit-llvm",
            "-Wno-override-module",
        ]
        raw = folder / "kernel.air"
        raw.write_bytes(bitcode)
        text = must([*disassemble, "-Xclang", "-disable-llvm-passes", str(raw), "-o", "-"])
        text = _with_constants(text, name, constants)
        signature, types = _signature(text, name)
        ir = contraction.contract(threadgroup_variables(lower(_host(text))) + _entry(signature, types))
        store(folder, ir, signature, [str(_library())])

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
    return re.sub(r'"air-[\w-]+"(?:="[^"]*")?', "", text)


def _with_constants(text: str, name: str, values: Mapping[int | str, bool | int]) -> str:
    """Function constants are globals that the driver would fill in; a constructor copies them when loaded."""
    nodes = _nodes(text)
    listed = re.search(r"^!air\.function_constants = !\{(.*)\}$", text, re.MULTILINE)
    for node in re.findall(r"!(\d+)", listed[1]) if listed else ():
        variable, _, constant, index = nodes[node][:4]
        number, constant = int(index.split()[-1]), constant[2:-1]
        value = values.get(number, values.get(constant))
        if value is None:
            raise ValueError(
                f"[air] {name} needs the function constant {constant} ({number}), got {dict(values)}."
            )
        variable = re.escape(variable.split()[-1])
        text = re.sub(
            rf"^({variable} = .*?)externally_initialized (constant \w+) undef",
            rf"\g<1>\g<2> {int(value)}",
            text,
            flags=re.MULTILINE,
        )
    return text


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


def _nodes(text: str) -> dict[str, list[str]]:
    return {found[1]: split_top(found[2]) for found in _NODE.finditer(text)}


def _signature(text: str, name: str) -> tuple[Signature, list[str]]:
    """What the metadata says of the arguments, and their IR types."""
    nodes = _nodes(text)
    kernels = re.search(r"^!air\.kernel = !\{!(\d+)", text, re.MULTILINE)
    if not kernels:
        raise ValueError(f"[air] {name} must be a kernel: it has no !air.kernel.")
    function, _, arguments = nodes[kernels[1]][:3]
    define = re.search(
        rf"^define[^@]*{re.escape(function.split()[-1])}\((.*?)\)(?: [^)]*)?{{$", text, re.MULTILINE
    )
    if not define:
        raise ValueError(f"[air] {name} must have a body.")
    types = [_parameter_type(parameter) for parameter in split_top(define[1])] if define[1] else []
    parameters = [_parameter(nodes[node.lstrip("!")]) for node in nodes[arguments.lstrip("!")] if node]
    return Signature(name, function.split()[-1], tuple(parameters)), types


def _parameter_type(text: str) -> str:
    if text.startswith("ptr"):
        return " ".join(text.split()[:2]) if "addrspace" in text else "ptr"
    return text[: text.index(">") + 1] if text.startswith("<") else text.split()[0]


def _strings(node: list[str]) -> Iterator[str]:
    for value in node:
        if value.startswith('!"'):
            yield value[2:-1]


def _parameter(node: list[str]) -> Parameter:
    def after(key: str) -> int:
        at = node.index(f'!"{key}"')
        return int(node[at + 1].split()[-1])

    strings = list(_strings(node))
    name = node[node.index('!"air.arg_name"') + 1][2:-1] if '!"air.arg_name"' in node else ""
    kind = strings[0].removeprefix("air.")
    if kind in ("buffer", "indirect_buffer"):
        space = after("air.address_space")
        return Parameter(
            name,
            "threadgroup" if space == 3 else "buffer",
            after("air.location_index"),
            space=_SPACES.get(space, ""),
            element_bytes=after("air.arg_type_size"),
            alignment=after("air.arg_type_align_size"),
            writable="air.read_write" in strings or "air.write" in strings,
        )
    if kind not in BUILTINS:
        raise ValueError(f"[air] arguments must be buffers or positions, got {strings[0]}.")
    return Parameter(name, "builtin", attribute=kind)


def _entry(signature: Signature, types: list[str]) -> str:
    """``msl_entry``, which calls the kernel with what a launch brings."""
    order = list(BUILTINS)
    lines, passed = [], []
    for i, (parameter, kind) in enumerate(zip(signature.parameters, types, strict=True)):
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
    lines.append(f"  call void {signature.call}({', '.join(passed)})")
    return (
        "\ndefine void @msl_entry(ptr %arguments, ptr %context) {\n" + "\n".join(lines) + "\n  ret void\n}\n"
    )
