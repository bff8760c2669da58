"""One function of the GPU as LLVM IR under construction: what the modules that define them share."""

from __future__ import annotations

import re
from collections.abc import Callable

from .inlining import meets


class UnknownIntrinsicError(ValueError):
    """A function that the emulator does not supply; the message names it."""


class Builder:
    """The definition of ``air.OPERATION.SUFFIXES``.

    Attributes:
        operation: the name after ``air.``, without ``fast_`` and ``precise_``.
        suffixes: mostly types.
        result, arguments: IR types; the parameters are ``%0``, ``%1`` and so on.
        lines: instructions so far.
        helpers: declarations of the functions they call.
    """

    def __init__(self, name: str, result: str, arguments: list[str]) -> None:
        self.name = name
        self.result = result
        self.arguments = arguments
        parts = name.removeprefix("air.").split(".")
        self.operation = parts[0].removeprefix("fast_").removeprefix("precise_")
        self.suffixes = parts[1:]
        self.helpers: set[str] = set()
        self.lines: list[str] = []
        self.count = 0

    def unknown(self) -> UnknownIntrinsicError:
        return UnknownIntrinsicError(f"[air] {self.name} is not supplied by the emulator.")

    def emit(self, text: str) -> str:
        """An instruction; the name of its value."""
        self.count += 1
        self.lines.append(f"  %t{self.count} = {text}")
        return f"%t{self.count}"

    def call(self, result: str, function: str, *typed: str) -> str:
        """A call of a function that is declared by this; the name of its value."""
        kinds = ", ".join(argument.rsplit(" ", 1)[0] for argument in typed)
        convergent = " convergent" if meets(function) else ""
        self.helpers.add(f"declare {result} @{function}({kinds}){convergent}")
        text = f"call {result} @{function}({', '.join(typed)})"
        if result == "void":
            self.lines.append(f"  {text}")
            return ""
        return self.emit(text)

    def typed(self) -> list[str]:
        """The parameters, as a call takes them."""
        return [f"{kind} %{i}" for i, kind in enumerate(self.arguments)]

    def by_lanes(self, make: Callable[..., str]) -> str:
        """A vector function, lane by lane; ``make`` takes and gives values of the element type."""
        vector = re.fullmatch(r"<(\d+) x (\w+)>", self.result)
        if not vector:
            return make(*(f"%{i}" for i in range(len(self.arguments))))
        value = "poison"
        for lane in range(int(vector[1])):
            parts = [
                self.emit(f"extractelement {kind} %{i}, i32 {lane}") for i, kind in enumerate(self.arguments)
            ]
            value = self.emit(f"insertelement {self.result} {value}, {vector[2]} {make(*parts)}, i32 {lane}")
        return value

    def in_memory(self, kind: str, value: str) -> str:
        """A place that holds a value, as an argument."""
        slot = self.emit(f"alloca {kind}, align 16")
        self.lines.append(f"  store {kind} {value}, ptr {slot}")
        return f"ptr {slot}"


def element(kind: str) -> str:
    """The type of a vector's elements; a scalar is its own."""
    return kind.split(" x ")[-1].rstrip(">")


def bits(kind: str) -> int:
    """Of an element."""
    name = element(kind)
    return {"float": 32, "half": 16, "bfloat": 16, "double": 64}.get(name) or int(name[1:])


def overload(kind: str) -> str:
    """A type as names of LLVM's functions have it."""
    scalar = element(kind)
    name = {"float": "f32", "half": "f16", "bfloat": "bf16", "double": "f64"}.get(scalar, scalar)
    return f"v{kind[1:].split(' ')[0]}{name}" if kind.startswith("<") else name
