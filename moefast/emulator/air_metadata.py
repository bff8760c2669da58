"""What AIR's metadata says of a kernel: its arguments and its function constants.

``!air.kernel`` lists the arguments in order. One that a function constant may take away has
``!"air.function_constant"`` and the variable that tells: a bool, which the module's own constructor computes
from the function constants.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from .ir import split_top
from .reflect import BUILTINS, Parameter, Signature

_NODE = re.compile(r"^!(\d+) = (?:distinct )?!\{(.*)\}$", re.MULTILINE)
_SPACES = {1: "device", 2: "constant", 3: "threadgroup"}
_CONDITION = '!"air.function_constant"'

Constants = Mapping[int | str, bool | int | float]


def with_constants(text: str, name: str, values: Constants) -> str:
    """IR in which function constants have their values.

    They are globals that the driver would fill in; a constructor copies them when the kernel is loaded.

    Raises:
        ValueError: one has no value.
    """
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
        text = _initialise(text, variable.split()[-1], value)
    return text


def _initialise(text: str, variable: str, value: bool | int | float) -> str:
    declared = re.compile(
        rf"^({re.escape(variable)} = .*?)externally_initialized (constant) (\w+) undef", re.MULTILINE
    )

    def initialised(found: re.Match[str]) -> str:
        return f"{found[1]}{found[2]} {found[3]} {_literal(found[3], value)}"

    return declared.sub(initialised, text)


def _literal(kind: str, value: bool | int | float) -> str:
    if kind == "float":  # LLVM writes it as the double of the same value
        rounded = struct.unpack("<f", struct.pack("<f", value))[0]
        return f"0x{struct.unpack('<Q', struct.pack('<d', rounded))[0]:016X}"
    if kind == "half":
        return f"0xH{struct.unpack('<H', struct.pack('<e', value))[0]:04X}"
    return str(int(value))


def signature(text: str, name: str, evaluate: Callable[[], str]) -> tuple[Signature, list[str]]:
    """The kernel's signature, and the IR types of its arguments.

    Args:
        text: AIR, as text.
        evaluate: gives the module with its constructor evaluated; called if an argument depends on it.

    Raises:
        ValueError: it is no kernel, or an argument is neither buffer nor position.
    """
    nodes = _nodes(text)
    kernels = re.search(r"^!air\.kernel = !\{!(\d+)", text, re.MULTILINE)
    if not kernels:
        raise ValueError(f"[air] {name} must be a kernel: it has no !air.kernel.")
    function, _, arguments = nodes[kernels[1]][:3]
    call = function.split()[-1]
    define = re.search(rf"^define[^@]*{re.escape(call)}\((.*?)\)(?: [^)]*)?{{$", text, re.MULTILINE)
    if not define:
        raise ValueError(f"[air] {name} must have a body.")
    types = [_parameter_type(parameter) for parameter in split_top(define[1])] if define[1] else []
    described = [nodes[node.lstrip("!")] for node in nodes[arguments.lstrip("!")] if node]
    conditions = [_condition(node, nodes) for node in described]
    evaluated = evaluate() if any(conditions) else ""
    parameters = [
        replace(_parameter(node), present=not condition or _is_true(condition, evaluated, name))
        for node, condition in zip(described, conditions, strict=True)
    ]
    return Signature(name, call, tuple(parameters)), types


def _condition(node: list[str], nodes: Mapping[str, list[str]]) -> str:
    """The variable that tells whether there is the argument; empty if there always is."""
    if _CONDITION not in node:
        return ""
    reference = node[node.index(_CONDITION) + 1]
    return nodes[reference.lstrip("!")][0].split()[-1]


def _is_true(variable: str, evaluated: str, name: str) -> bool:
    found = re.search(
        rf"^{re.escape(variable)} = .*\b(?:global|constant) i(?:1|8) (\w+)", evaluated, re.MULTILINE
    )
    # Left to be computed when loaded, it shows the 0 that it starts with.
    if not found or re.search(r"^@llvm\.global_ctors = appending global \[[1-9]", evaluated, re.MULTILINE):
        raise ValueError(f"[air] {name} must decide its arguments when compiled, got {variable} at run time.")
    return found[1] not in ("0", "false")


def _nodes(text: str) -> dict[str, list[str]]:
    return {found[1]: split_top(found[2]) for found in _NODE.finditer(text)}


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
    kind = next(s for s in strings if s != "air.function_constant").removeprefix("air.")
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
        raise ValueError(f"[air] arguments must be buffers or positions, got air.{kind}.")
    return Parameter(name, "builtin", attribute=kind)
