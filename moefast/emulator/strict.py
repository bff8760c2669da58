"""What Apple's compiler rejects must not compile here.

The front end (C++ for OpenCL) enforces address spaces and most of what Metal forbids. This file has the rest:
words and declarations it would let through (found among the tokens), conversions it only warns of, and calls
that need the whole program (found in the IR).
"""

from __future__ import annotations

import re

from .ir import Body, Module
from .lexer import Source
from .reflect import BUILTINS, attributes, split_parameters
from .structure import Function, Structure, is_builtin_type
from .translate import threadgroup_variables

# file, line, column, message
Refusal = tuple[str, int, int, str]

# Asked of the front end, and read by `is_refused`.
WARNINGS = ("-Wimplicit-float-conversion",)

_WORDS = {
    "goto": "goto is not supported in Metal",
    "throw": "exceptions are not supported in Metal",
    "try": "exceptions are not supported in Metal",
    "catch": "exceptions are not supported in Metal",
    "virtual": "virtual functions are not supported in Metal",
    "new": "new and delete are not supported in Metal",
    "typeid": "typeid is not supported in Metal",
    "dynamic_cast": "dynamic_cast is not supported in Metal",
    "thread_local": "thread_local is not supported in Metal",
    "double": "double is not supported in Metal",
    "asm": "inline assembly is not supported by the emulator",
    "__asm": "inline assembly is not supported by the emulator",
    "__asm__": "inline assembly is not supported by the emulator",
}
_SPACES = {"device", "constant", "threadgroup", "thread", "threadgroup_imageblock", "ray_data", "object_data"}
_ATTRIBUTES = {
    *BUILTINS,
    *(
        "kernel",
        "host_name",
        "max_total_threads_per_threadgroup",
        "function_constant",
        "buffer",
        "threadgroup",
        "id",
    ),
    *(
        "maybe_unused",
        "nodiscard",
        "fallthrough",
        "noreturn",
        "deprecated",
        "likely",
        "unlikely",
        "no_unique_address",
    ),
    *("visible", "required_threads_per_threadgroup", "user"),
}
_UNSUPPORTED = {
    "texture",
    "sampler",
    "stage_in",
    "vertex",
    "fragment",
    "color",
    "position",
    "vertex_id",
    "instance_id",
}


def check_tokens(source: Source, structure: Structure) -> list[Refusal]:
    """What the source may not contain, in source order."""
    return _Tokens(source, structure).check()


class _Tokens:
    def __init__(self, source: Source, structure: Structure) -> None:
        self.source = source
        self.tokens = source.tokens
        self.structure = structure
        self.parameters = [f.parameters for f in structure.functions]
        self.found: list[tuple[int, Refusal]] = []

    def refuse(self, token: int, message: str) -> None:
        at = self.tokens[token].start
        self.found.append((at, (*self.source.place(at), message)))

    def check(self) -> list[Refusal]:
        for i, token in enumerate(self.tokens):
            if token.kind == "name":
                self._word(i, token.text)
            elif token.text in ("*", "&") and i:
                self._pointer(i)
        self._attributes()
        for function in self.structure.functions:
            self._function(function)
        return [refusal for _, refusal in sorted(self.found)]

    def _word(self, i: int, text: str) -> None:
        if text in _WORDS:
            self.refuse(i, _WORDS[text])
        elif text == "delete" and self.tokens[i - 1].text != "=":
            self.refuse(i, _WORDS["new"])
        elif text == "printf" and self.tokens[i + 1].text == "(":
            self.refuse(i, "printf does not exist in Metal")
        elif text == "std" and self.tokens[i + 1].text == "::":
            self.refuse(i, "the C++ standard library does not exist in Metal")

    def _attributes(self) -> None:
        for name, _, at in attributes(self.source, 0, len(self.tokens)):
            if name in _UNSUPPORTED:
                self.refuse(
                    at, f"attribute '{name}' is not supported by the emulator: it runs compute kernels"
                )
            elif name not in _ATTRIBUTES and "::" not in name:
                self.refuse(at, f"unknown attribute '{name}'")

    def _pointer(self, i: int) -> None:
        """A declared pointer or reference must say its address space."""
        if not self._may_declare(i):
            return
        words, left = self._specifiers(i - 1)
        if not words or words & (
            _SPACES | {"auto", "decltype", "return", "sizeof", "case", "using", "operator"}
        ):
            return
        if not any(is_builtin_type(word) or word in self.structure.types for word in words):
            return
        in_parameters = any(first < i < last for first, last in self.parameters)
        # Elsewhere `(T * x)` is a product.
        if left in (";", "{", "}") or (left in ("(", ",") and in_parameters):
            what = "pointer" if self.tokens[i].text == "*" else "reference"
            self.refuse(
                i, f"{what} type must have an explicit address space: device, constant, threadgroup or thread"
            )

    def _may_declare(self, i: int) -> bool:
        """Is this ``*`` or ``&`` after a type and before what is declared?"""
        before, after, then = self.tokens[i - 1], self.tokens[i + 1], self.tokens[i + 2]
        if before.text == "const":
            before = self.tokens[i - 2]
        if (
            before.text != ">"
            and not is_builtin_type(before.text)
            and before.text not in self.structure.types
        ):
            return False
        if after.kind == "name" and after.text not in ("const", "operator"):
            return then.text in (";", ",", ")", "=", "[", "(", "{")
        return after.text in (")", ",") or after.text == "const"

    def _specifiers(self, at: int) -> tuple[set[str], str]:
        """The words of a declaration that end at ``at``, and the sign before them."""
        words: set[str] = set()
        while at >= 0:
            token = self.tokens[at]
            if token.text in (">", "]"):
                opening = self.source.opening(at)
                if opening in (at, 0):
                    return words, token.text
                if self.tokens[opening - 1].text == "template":
                    return words, ";"
                at = opening
            elif token.kind == "name":
                words.add(token.text)
            elif token.text != "::":
                return words, token.text
            at -= 1
        return words, ";"

    def _function(self, function: Function) -> None:
        for first, name_at, last in threadgroup_variables(self.source, function):
            if not function.kernel:
                self.refuse(first, "a threadgroup variable can only be declared in a kernel")
            elif any(self.tokens[i].text in ("=", "{") for i in range(name_at, last)):
                self.refuse(first, "a threadgroup variable cannot have an initialiser")
        if function.kernel:
            for first, end in split_parameters(self.source, function):
                self._kernel_parameter(first, end)

    def _kernel_parameter(self, first: int, end: int) -> None:
        texts = [self.tokens[i].text for i in range(first, end)]
        named = {name for name, _, _ in attributes(self.source, first, end)}
        bracket = next((i for i, text in enumerate(texts[:-1]) if text == texts[i + 1] == "["), len(texts))
        declared = texts[:bracket]
        if {"*", "&", "["} & set(declared):
            if not {"device", "constant", "threadgroup"} & set(declared):
                self.refuse(first, "a kernel's buffer must be device, constant or threadgroup")
        elif declared and declared != ["void"] and not named:
            self.refuse(first, "a kernel's parameter needs an attribute, or to be a buffer")


def is_refused(warning: str) -> bool:
    """Whether a warning of the front end is an error in Metal: float that becomes bfloat must say so; int
    may not."""
    return bool(
        re.search(r"loses floating-point precision: .* to '[^']*\b(?:__bf16|bfloat|bfloat16_t)\b", warning)
    )


def reword(message: str) -> str:
    """The front end's words for address spaces and types, in Metal's."""
    for opencl, metal in (
        ("__global", "device"),
        ("__local", "threadgroup"),
        ("__constant", "constant"),
        ("__private", "thread"),
        ("__bf16", "bfloat"),
        ("OpenCL", "Metal"),
        ("msl_make", "vector constructor"),
    ):
        message = message.replace(opencl, metal)
    return re.sub(r" \[-W[\w-]+\]$", "", message)


def check_ir(text: str) -> list[Refusal]:
    """Recursion, and calls of functions that are known at run time only."""
    module = Module(text)
    bodies = {body.name: body for body in module.bodies}
    calls: dict[str, list[tuple[str, int]]] = {name: [] for name in bodies}
    found: list[Refusal] = []
    for body in module.bodies:
        for line, callee in module.calls(body):
            if not callee:
                found.append(_at(module, line, "function pointers are not supported in Metal"))
            elif callee in bodies:
                calls[body.name].append((callee, line))
    for name, called in calls.items():
        for callee, line in called:
            if _reaches(calls, callee, name) and not (
                callee == name and _is_loop(module, bodies[name], line)
            ):
                found.append(_at(module, line, "recursive function calls are not supported in Metal"))
    return found


def _reaches(calls: dict[str, list[tuple[str, int]]], start: str, goal: str) -> bool:
    seen, waiting = set(), [start]
    while waiting:
        name = waiting.pop()
        if name == goal:
            return True
        if name not in seen:
            seen.add(name)
            waiting += [callee for callee, _ in calls[name]]
    return False


def _is_loop(module: Module, body: Body, line: int) -> bool:
    """A function that calls itself as the last thing it does, without a value: a loop to any compiler.

    MLX's LoopedElemToLoc::next is one.
    """
    if "call void @" not in module.lines[line]:
        return False
    labels = {
        module.lines[i].split(":")[0]: i for i in range(body.first, body.last) if ":" in module.lines[i]
    }
    at = line + 1
    for _ in range(body.last - body.first):  # no more steps than lines: a jump backwards is no end
        text = module.lines[at].split(", !")[0].split(";")[0].strip()
        if text == "ret void":
            return True
        if jump := re.fullmatch(r"br label %([\w.]+)", text):
            at = labels.get(jump[1], body.last)
        elif text and not text.startswith("call void @llvm.lifetime") and not text.endswith(":"):
            return False
        at += 1
    return False


def _at(module: Module, line: int, message: str) -> Refusal:
    frames = module.site(module.location(line)).frames
    file, number, column = frames[0][:3] if frames else ("", 0, 0)
    return file, number, column, message
