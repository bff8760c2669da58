"""What Apple's compiler rejects must not compile here.

The front end (C++ for OpenCL) enforces address spaces and most of what Metal forbids. This file has words and
declarations it would let through, found among the tokens, and conversions it only warns of; strict_ir.py has
what needs the whole program.
"""

from __future__ import annotations

import re

from .declarations import threadgroup_variables
from .lexer import Source
from .reflect import BUILTINS, attributes, split_parameters
from .strict_words import check_array_sizes, check_words
from .structure import Function, Structure, is_builtin_type

# file, line, column, message
Refusal = tuple[str, int, int, str]

# Asked of the front end, and read by `is_refused`.
WARNINGS = ("-Wimplicit-float-conversion", "-Wdouble-promotion")

_FLOAT = re.compile(r"(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][+-]?\d+)?[fFhH]?")
_INDICES = 31  # of buffers, and of threadgroup arguments
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
        for i in self.source.at("bfloat", "bfloat16_t"):
            self._bfloat(i)
        for i in self.source.at("*", "&"):
            if i:
                self._pointer(i)
        for i in self.source.at("("):
            self._function_pointer(i)
        for i in self.source.at(*filter(_is_long_double, self.source.texts("number"))):
            self.refuse(i, "double is not supported in Metal")
        words = check_words(self.source, self.structure)
        for i, message in words + check_array_sizes(self.source, self.structure):
            self.refuse(i, message)
        self._attributes()
        for function in self.structure.functions:
            self._function(function)
        return [refusal for _, refusal in sorted(self.found)]

    def _bfloat(self, i: int) -> None:
        """``bfloat b = 1.5f``: the front end converts constants that are exact without a warning."""
        tokens = self.tokens
        if i + 5 >= len(tokens):
            return  # `template <> [[kernel]] decltype(k<bfloat>) k<bfloat>;` ends with the text
        value = i + (4 if tokens[i + 3].text == "-" else 3)
        if tokens[i + 1].kind != "name" or tokens[i + 2].text != "=" or tokens[value].kind != "number":
            return
        is_float = _FLOAT.fullmatch(tokens[value].text) and not tokens[value].text.lower().endswith("bf")
        if is_float and tokens[value + 1].text in (";", ","):
            self.refuse(value, "a float becomes a bfloat only by bfloat(x)")

    def _function_pointer(self, i: int) -> None:
        """``float (*p)(int)`` and ``float (*p[2])()``, but as parameters of templates."""
        if self.tokens[i + 1].text != "*":
            return
        before, name, after = self.tokens[i - 1], self.tokens[i + 2], self.tokens[i + 3]
        types = before.kind == "name" and (
            is_builtin_type(before.text) or before.text in self.structure.types
        )
        is_pointer = name.kind == "name" and after.text in (")", "[")
        if types and is_pointer and not self.structure.in_template_parameters(i):
            closing = self.source.closing(i)
            if self.tokens[closing + 1].text == "(":
                self.refuse(i + 1, "function pointers are not supported in Metal")

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
        words, start = self._specifiers(i - 1)
        left = self.tokens[start].text if start >= 0 else ";"
        if not words or words & (_SPACES | {"auto", "decltype", "return", "sizeof", "case", "operator"}):
            return
        if not any(is_builtin_type(word) or word in self.structure.types for word in words):
            return
        if self._declares(i, start, left):
            what = "pointer" if self.tokens[i].text == "*" else "reference"
            self.refuse(
                i, f"{what} type must have an explicit address space: device, constant, threadgroup or thread"
            )

    def _declares(self, i: int, start: int, left: str) -> bool:
        """Whether the words from the sign ``left`` at ``start`` to ``i`` are a declaration or a cast."""
        after = self.tokens[i + 1].text
        if left in (";", "{", "}"):
            return True
        if left == "=":
            return self.tokens[start - 2].text == "using"
        if after in (")", ">") and left in ("(", "<", ","):
            return True  # (T*)x, static_cast<T*>(x)
        in_parameters = any(first < i < last for first, last in self.parameters)
        # Elsewhere `(T * x)` is a product.
        return left in ("(", ",") and (in_parameters or self._in_lambda_parameters(start))

    def _in_lambda_parameters(self, at: int) -> bool:
        while at > 0 and self.tokens[at].text not in ("(", ";", "{", "}"):
            at = (self.source.opening(at) if self.tokens[at].text in (")", "]") else at) - 1
        return self.tokens[at].text == "(" and self.tokens[at - 1].text == "]"

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
        return after.text in (")", ",", ">", ";") or after.text == "const"

    def _specifiers(self, at: int) -> tuple[set[str], int]:
        """The words of a declaration that end at ``at``, and the token before them: -1 for none."""
        words: set[str] = set()
        while at >= 0:
            token = self.tokens[at]
            if token.text in (">", "]"):
                opening = self.source.opening(at)
                if opening in (at, 0):
                    return words, at
                if self.tokens[opening - 1].text == "template":
                    return words, -1
                at = opening
            elif token.kind == "name":
                words.add(token.text)
            elif token.text != "::":
                return words, at
            at -= 1
        return words, -1

    def _function(self, function: Function) -> None:
        for first, name_at, last in threadgroup_variables(self.source, function):
            if not function.kernel:
                self.refuse(first, "a threadgroup variable can only be declared in a kernel")
            elif any(self.tokens[i].text in ("=", "{") for i in range(name_at, last)):
                self.refuse(first, "a threadgroup variable cannot have an initialiser")
            elif self._in_lambda(first, function.body[0]):
                self.refuse(first, "a threadgroup variable can only be declared in a kernel, not in a lambda")
        if function.kernel:
            self._kernel(function)

    def _is_buffer(self, first: int, end: int) -> bool:
        texts = {self.tokens[i].text for i in range(first, end)}
        return bool(texts & {"device", "constant"} and texts & {"*", "&"})

    def _in_lambda(self, at: int, start: int) -> bool:
        """Whether a brace that is open at ``at``, within the body from ``start`` on, is a lambda's."""
        while (at := at - 1) > start:
            text = self.tokens[at].text
            if text in (")", "]", "}"):
                at = self.source.opening(at)
            elif text == "{":
                before = at - 1
                while self.tokens[before].kind == "name" or self.tokens[before].text in ("->", "::"):
                    before -= 1
                if self.tokens[before].text == ")":
                    before = self.source.opening(before) - 1
                if self.tokens[before].text == "]":
                    return True
        return False

    def _kernel(self, function: Function) -> None:
        head = range(function.first, function.name)
        if "void" not in {self.tokens[i].text for i in head}:
            self.refuse(function.name, "a kernel must return void")
        taken: dict[tuple[str, int], bool] = {}
        parameters = split_parameters(self.source, function)
        if sum(self._is_buffer(first, end) for first, end in parameters) > _INDICES:
            self.refuse(function.name, f"a kernel takes at most {_INDICES} buffers")
        for first, end in parameters:
            self._kernel_parameter(first, end)
            found = {name: argument for name, argument, _ in attributes(self.source, first, end)}
            for kind in {"buffer", "threadgroup"} & found.keys():
                self._index(first, kind, found[kind], "function_constant" in found, taken)

    def _index(
        self, at: int, kind: str, argument: str, optional: bool, taken: dict[tuple[str, int], bool]
    ) -> None:
        """``optional``: a function constant may take the parameter away, and another have its index."""
        if not re.fullmatch(r"0[xX][\da-fA-F]+|\d+", argument):
            self.refuse(at, f"the emulator wants a number in [[{kind}({argument})]]")
            return
        index = int(argument, 0)
        if index >= _INDICES:
            self.refuse(at, f"[[{kind}({index})]] must be between 0 and {_INDICES - 1}")
        if (kind, index) in taken and not (optional and taken[kind, index]):
            self.refuse(at, f"[[{kind}({index})]] is taken by another parameter")
        taken[kind, index] = optional

    def _kernel_parameter(self, first: int, end: int) -> None:
        texts = [self.tokens[i].text for i in range(first, end)]
        named = {name for name, _, _ in attributes(self.source, first, end)}
        bracket = next((i for i, text in enumerate(texts[:-1]) if text == texts[i + 1] == "["), len(texts))
        declared = texts[:bracket]
        if {"*", "&", "["} & set(declared):
            spaces = {"device", "constant", "threadgroup"} & set(declared)
            if not spaces:
                self.refuse(first, "a kernel's buffer must be device, constant or threadgroup")
            elif "buffer" in named and spaces == {"threadgroup"}:
                self.refuse(first, "threadgroup memory takes [[threadgroup(index)]], not [[buffer(index)]]")
            elif "threadgroup" in named and spaces != {"threadgroup"}:
                self.refuse(first, "a buffer takes [[buffer(index)]], not [[threadgroup(index)]]")
        elif "buffer" in named or "threadgroup" in named:
            self.refuse(first, "a kernel's buffer must be a pointer or a reference")
        elif declared and declared != ["void"] and not named:
            self.refuse(first, "a kernel's parameter needs an attribute, or to be a buffer")
        else:
            self._builtin(first, declared, named)

    def _builtin(self, first: int, declared: list[str], named: set[str]) -> None:
        """Positions and sizes are uint or ushort, or vectors of them."""
        types = [text for text in declared[:-1] if text not in ("const", "metal", "::")]
        if len(types) != 1 or not is_builtin_type(types[0]):
            return  # an alias, of which the compiler knows more
        for name in named & BUILTINS.keys():
            allowed = {"uint", "ushort", "uint32_t", "uint16_t", "unsigned"}
            if BUILTINS[name] == 3:
                allowed |= {f"{element}{lanes}" for element in ("uint", "ushort") for lanes in (2, 3)}
            if types[0] not in allowed:
                self.refuse(first, f"[[{name}]] must be one of {', '.join(sorted(allowed))}")


def _is_long_double(number: str) -> bool:
    return number[-1] in "lL" and _FLOAT.fullmatch(number[:-1]) is not None


_BFLOAT = r"'[^']*\b(?:__bf16|bfloat|bfloat16_t)\b[^']*'(?: \(aka '__bf16'\))?"


def is_refused(warning: str) -> bool:
    """Whether a warning of the front end is an error in Metal: float that becomes bfloat must say so, and
    bfloat that becomes half; int may not."""
    return bool(
        re.search(rf"loses floating-point precision: .* to {_BFLOAT}", warning)
        or re.search(rf"increases floating-point precision: {_BFLOAT} to '[^']*\bhalf\b", warning)
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
    if "illegal vector component name" in message:
        return "the components of a vector are x, y, z, w, or r, g, b, a"
    message = re.sub(r"^static assertion failed due to requirement '.*': ", "", message)
    return re.sub(r" \[-W[\w-]+\]$", "", message)
