"""What a kernel takes: parameters by position, with their attributes from the source and their types from
the compiler."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from .errors import CompileError, Diagnostic
from .lexer import Source
from .structure import Function, Structure

PACKAGE = Path(__file__).resolve().parent


def builtins() -> dict[str, int]:
    """Attributes such as ``thread_position_in_grid``, and how many components they have."""
    lines = (PACKAGE / "msl" / "builtins.def").read_text().splitlines()
    rows = [line[len("MSL_BUILTIN(") : -1].split(", ") for line in lines if line.startswith("MSL_BUILTIN(")]
    return {name: int(components) for name, components in rows}


BUILTINS = builtins()
MOST_THREADS = 1024  # of a threadgroup
_SPACES = {1: "device", 2: "constant", 3: "threadgroup"}


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel.

    Attributes:
        name: in the source; ``argument<i>`` without one.
        kind: ``buffer``, ``threadgroup`` or ``builtin``.
        index: of ``[[buffer(i)]]`` or ``[[threadgroup(i)]]``; -1 for a builtin.
        attribute: the builtin's name.
        space: address space: ``device``, ``constant``, ``threadgroup``, or empty.
        element_bytes, alignment: of what it points to.
        writable: a device buffer that is not const.
        present: False if its function constant is false: the kernel does not have it.
    """

    name: str
    kind: str
    index: int = -1
    attribute: str = ""
    space: str = ""
    element_bytes: int = 0
    alignment: int = 1
    writable: bool = False
    present: bool = True


@dataclass(frozen=True)
class Signature:
    """A kernel's name as asked for, how C++ calls it, its parameters, and the most threads of a threadgroup:
    those of ``[[max_total_threads_per_threadgroup(n)]]``, if it has the attribute."""

    kernel: str
    call: str
    parameters: tuple[Parameter, ...]
    most_threads: int = MOST_THREADS

    @property
    def buffers(self) -> dict[int, Parameter]:
        """Its buffers by index."""
        return {p.index: p for p in self.parameters if p.kind == "buffer" and p.present}

    @property
    def threadgroup(self) -> dict[int, Parameter]:
        """Its ``[[threadgroup(i)]]`` parameters by index."""
        return {p.index: p for p in self.parameters if p.kind == "threadgroup" and p.present}


def find(source: Source, structure: Structure, kernel: str | None, defined: dict[str, bool]) -> Signature:
    """The signature of ``kernel``, a host name or a function's; the only kernel if None.

    Args:
        defined: truth of the function constants that have a value, by name.

    Raises:
        CompileError: there is no such kernel, or several if None.
    """
    hosts = {made.host: made.of for made in structure.instantiations}
    kernels = {source.tokens[f.name].text: f for f in structure.functions if f.kernel and f.body != (0, 0)}
    if kernel is None:
        names = list(hosts) or list(kernels)
        if len(names) != 1:
            _refuse(source, f"say which kernel: it has {', '.join(sorted(names)) or 'none'}")
        kernel = names[0]
    call = hosts.get(kernel, kernel)
    base = call.split("<")[0].strip()
    if base not in kernels:
        known = ", ".join(sorted({*hosts, *kernels})) or "none"
        _refuse(source, f"no kernel {kernel!r}: it has {known}")
    function = kernels[base]
    if source.tokens[function.first].text != "template":
        call += "<0>"  # translate.py makes it one
    elif "<" not in call:
        _refuse(source, f"kernel {kernel!r} is a template: instantiate it with a host_name")
    return Signature(kernel, call, _parameters(source, function, defined), _most_threads(source, function))


def _most_threads(source: Source, function: Function) -> int:
    declared = attributes(source, function.first, function.parameters[0])
    numbers = [text for name, text, _ in declared if name == "max_total_threads_per_threadgroup"]
    # An expression is left to the compiler, which knows its value and does not tell.
    return min([MOST_THREADS, *(int(text, 0) for text in numbers if text[:1].isdecimal() and text.isalnum())])


def _refuse(source: Source, message: str) -> None:
    file, line, _ = source.place(len(source.text))
    raise CompileError("the source", [Diagnostic(file, line, 0, message)])


def split_parameters(source: Source, function: Function) -> list[tuple[int, int]]:
    """Tokens, first and one past the last, of each parameter."""
    tokens = source.tokens
    first, last = function.parameters
    out, start, at = [], first + 1, first + 1
    while at < last:
        text = tokens[at].text
        if text in ("(", "[", "{") or (text == "<" and tokens[at - 1].kind == "name"):
            at = max(source.closing(at), at)
        elif text == ",":
            out.append((start, at))
            start = at + 1
        at += 1
    if start < last:
        out.append((start, last))
    return out


def attributes(source: Source, first: int, end: int) -> list[tuple[str, str, int]]:
    """Name, argument and token of each attribute ``[[name(argument)]]`` among the tokens."""
    tokens = source.tokens
    found = []
    closing = first
    for at in source.within("[", first, end - 1):
        if tokens[at + 1].text == "[" and at >= closing:
            closing = source.closing(at)
            inner = at + 2
            while inner < closing - 1:
                name, name_at, argument = tokens[inner].text, inner, ""
                if tokens[inner + 1].text == "::":
                    name, inner = f"{name}::{tokens[inner + 2].text}", inner + 2
                inner += 1
                if tokens[inner].text == "(":
                    close = source.closing(inner)
                    argument = source.text[tokens[inner].end : tokens[close].start].strip()
                    inner = close + 1
                found.append((name, argument, name_at))
                if tokens[inner].text != ",":
                    break
                inner += 1
    return found


def _parameters(source: Source, function: Function, defined: dict[str, bool]) -> tuple[Parameter, ...]:
    found: list[Parameter] = []
    for position, (first, end) in enumerate(split_parameters(source, function)):
        tokens = source.tokens
        named = [
            i
            for i in range(first, end)
            if tokens[i].kind == "name" and tokens[i].text not in ("const", "device", "constant")
        ]
        bracket = next((i for i in range(first, end) if tokens[i].text == "["), end)
        name_at = max((i for i in named if i < bracket), default=None)
        name = tokens[name_at].text if name_at is not None and name_at > first else f"argument{position}"
        parameter = Parameter(name, "buffer", -1)
        for attribute, argument, _ in attributes(source, first, end):
            if attribute in ("buffer", "threadgroup"):
                parameter = replace(parameter, kind=attribute, index=int(argument, 0))
            elif attribute == "function_constant":
                parameter = replace(parameter, present=defined.get(argument, False))
            elif attribute in BUILTINS:
                parameter = replace(parameter, kind="builtin", attribute=attribute)
        found.append(parameter)
    return _numbered(found)


def _numbered(parameters: list[Parameter]) -> tuple[Parameter, ...]:
    """Buffers without an index take the free ones, in order."""
    used = {p.index for p in parameters if p.kind == "buffer"}
    free = (i for i in range(31) if i not in used)
    return tuple(
        replace(p, index=next(free)) if p.kind == "buffer" and p.index < 0 else p for p in parameters
    )


_TABLE = re.compile(r"^@msl_parameters = .*\[\d+ x i32\] (?:\[(.+?)\]|zeroinitializer)", re.MULTILINE)


def table_of_types(ir: str) -> list[int]:
    """What :func:`entry` made the compiler write down: it is a constant of the IR already."""
    found = _TABLE.search(ir)
    if found is None:
        raise RuntimeError("[emulator] the compiler's table of types is not where it was.")
    return [int(number) for number in re.findall(r"i32 (-?\d+)", found[1] or "")]


def with_types(signature: Signature, table: list[int]) -> Signature:
    """``signature`` with the types the compiler found: size, alignment, writable and space of each
    parameter."""
    typed = []
    for i, parameter in enumerate(signature.parameters):
        size, alignment, writable, space = table[4 * i : 4 * i + 4]
        typed.append(
            replace(
                parameter,
                element_bytes=size,
                alignment=alignment,
                writable=bool(writable),
                space=_SPACES.get(space, ""),
            )
        )
    return replace(signature, parameters=tuple(typed))


def entry(signature: Signature) -> str:
    """The function a launch calls, and the table of the parameters' types."""
    arguments = []
    for i, p in enumerate(signature.parameters):
        kind = f"msl_type_of<msl_kernel, {i}>::type"
        if p.kind == "builtin":
            arguments.append(f"msl_builtin<{kind}>::from(context->{p.attribute})")
        else:
            slot = p.index + (31 if p.kind == "threadgroup" else 0)
            arguments.append(f"msl_pass<{kind}>::from(arguments[{slot}])")
    return f"""
# 1 "<launch>"
typedef decltype({signature.call}) msl_kernel;
extern "C" __attribute__((visibility("default")))
constant const msl_signature<msl_kernel>::table msl_parameters = msl_signature<msl_kernel>::types();
extern "C" __attribute__((visibility("default"))) void msl_entry(const size_t thread* arguments,
                                                               const msl_context thread* context) {{
  {signature.call}({", ".join(arguments)});
}}
"""
