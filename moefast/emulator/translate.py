"""Metal to C++ for OpenCL: the few spellings in which the two differ.

Edits keep every line where it was, so that the compiler's positions are the user's.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Mapping
from typing import NamedTuple

from .lexer import Source
from .structure import Function, FunctionConstant, Structure, is_builtin_type, is_vector

_SPACES = ("device", "constant", "threadgroup", "thread")
_NARROW = {
    "bfloat": "msl_to_bfloat",
    "bfloat16_t": "msl_to_bfloat",
    "half": "msl_to_half",
    "float16_t": "msl_to_half",
}
_TYPE_WORDS = ("const", "volatile", "typename", "unsigned", "signed")


# No brackets inside: `alignas(alignof(T))` is for the compiler, and is not for threadgroup variables.
_ALIGNAS = re.compile(r"alignas\s*\(([^()]*)\)")


class Translated(NamedTuple):
    """C++ for OpenCL, and the names of the threadgroup variables: the first is number 1."""

    text: str
    variables: tuple[str, ...]


class _Edits:
    """Replacements in a text; lines are kept."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.made: list[tuple[int, int, str]] = []

    def replace(self, start: int, end: int, by: str) -> None:
        lost = self.text.count("\n", start, end) - by.count("\n")
        self.made.append((start, end, by + "\n" * lost))

    def result(self) -> str:
        parts, at = [], 0
        for start, end, by in sorted(self.made):
            if start < at:
                continue  # inside an edit of something larger
            parts += [self.text[at:start], by]
            at = end
        return "".join([*parts, self.text[at:]])


class _Translator:
    def __init__(self, source: Source, structure: Structure, constants: Mapping[int | str, object]) -> None:
        self.source = source
        self.tokens = source.tokens
        self.structure = structure
        self.values = constants
        self.edits = _Edits(source.text)
        self.constants = {c.name: c for c in structure.constants}
        self.variables: list[str] = []
        self.bodies = sorted(f.body for f in structure.functions if f.body != (0, 0))

    def run(self) -> Translated:
        for constant in self.structure.constants:
            self._function_constant(constant)
        for made in self.structure.instantiations:
            span = self.tokens[made.first].start, self.tokens[made.last].end
            self.edits.replace(*span, f"template decltype({made.of}) {made.of};")
        for name, first, last in self.structure.bodies:
            self._copies_from_constant(name, first, last)
        for function in self.structure.functions:
            if function.kernel:
                self._threadgroup_variables(function)
                self._make_template(function)
        for i, token in enumerate(self.tokens):
            if token.kind == "name":
                self._name(i, token.text)
            elif token.text == "(":
                self._cast(i)
                self._function_parameter(i)
            elif token.kind == "number" and token.text.endswith(("bf", "BF")) and "x" not in token.text:
                self.edits.replace(token.start, token.end, f"((bfloat){token.text[:-2]}f)")
        for pragma in self.source.pragmas:
            self._pragma(pragma.start, pragma.end, pragma.text)
        return Translated(self.edits.result(), tuple(self.variables))

    def value(self, constant: FunctionConstant) -> str | None:
        """The value given for a function constant, as C++; None if there is none."""
        value = self.values.get(constant.index, self.values.get(constant.name))
        if value is None:
            return None
        return str(value).lower() if isinstance(value, bool) else str(value)

    def _function_constant(self, constant: FunctionConstant) -> None:
        value = self.value(constant)
        # Without a value it may be declared, as long as the kernel does not use it.
        declaration = f"constant {constant.type} {constant.name}"
        by = f"extern {declaration};" if value is None else f"{declaration} = {value};"
        self.edits.replace(self.tokens[constant.first].start, self.tokens[constant.last].end, by)

    def _name(self, i: int, text: str) -> None:
        following = self.tokens[i + 1].text if i + 1 < len(self.tokens) else ""
        if text == "thread":
            self._thread(i)
        elif text == "constant":
            self._constant(i)
        elif text == "is_function_constant_defined" and following == "(":
            closing = self.source.closing(i + 1)
            constant = self.constants.get(self.tokens[i + 2].text)
            defined = constant is not None and self.value(constant) is not None
            self.edits.replace(self.tokens[i].start, self.tokens[closing].end, "true" if defined else "false")
        elif text == "vec" and following == "<":
            self._vector_template(i)
        elif is_vector(text) or text in self.structure.vector_aliases:
            if following == "(":
                self._construct(i, i)
            else:
                self._declare(i, i)
        elif (
            text in _NARROW
            and following == "("
            and self.tokens[i - 1].text not in ("operator", ".", "->", "~")
        ):
            self.edits.replace(self.tokens[i].start, self.tokens[i].end, _NARROW[text])
        elif text == "static_cast" and (type_end := self._vector_type(i + 2)):
            kind = _words(self.source.text[self.tokens[i + 2].start : self.tokens[type_end - 1].end])
            self.edits.replace(self.tokens[i].start, self.tokens[type_end].end, f"msl_make<{kind}>")
        elif text == "static_cast" and self.tokens[i + 3].text == ">":
            self._static_cast(i)
        elif text in self.structure.classes:
            self._copy_class(i)

    def _vector_type(self, i: int) -> int:
        """The token after a vector type at ``i``; 0 if there is none."""
        tokens = self.tokens
        if tokens[i].text == "metal" and tokens[i + 1].text == "::":
            i += 2
        if is_vector(tokens[i].text) or tokens[i].text in self.structure.vector_aliases:
            return i + 1
        return self.source.closing(i + 1) + 1 if [t.text for t in tokens[i : i + 2]] == ["vec", "<"] else 0

    def _cast(self, i: int) -> None:
        """``(float4)v`` becomes ``msl_make<float4>(v)``: the compiler's own cast would keep the bits."""
        tokens = self.tokens
        end = self._vector_type(i + 1)
        before = tokens[i - 1]
        if not end or tokens[end].text != ")" or (before.kind == "name" and before.text != "return"):
            return
        after = tokens[end + 1]
        if after.kind == "sign" and after.text not in ("(", "-", "+", "~", "!", "*"):
            return
        kind = _words(self.source.text[tokens[i + 1].start : tokens[end - 1].end])
        self.edits.replace(tokens[i].start, tokens[end].end, f"msl_make<{kind}>(")
        if after.text == "(":
            self._truth(end + 1)
        operand_end = tokens[self._operand(end + 1)].end
        self.edits.replace(operand_end, operand_end, ")")

    def _function_parameter(self, i: int) -> None:
        """``template <void (*f)(int)>``: the pointer would be one to generic memory; a reference is not."""
        star, *rest = self.tokens[i + 1 : i + 5]
        named = star.text == "*" and [t.text for t in rest[1:]] == [")", "("]
        if named and self.structure.in_template_parameters(i):
            self.edits.replace(star.start, star.end, "&")

    def _operand(self, i: int) -> int:
        """The last token of what a cast before ``i`` applies to."""
        tokens, source = self.tokens, self.source
        while tokens[i].text in ("-", "+", "~", "!", "*", "&", "++", "--"):
            i += 1
        if tokens[i].text == "(":
            closing = source.closing(i)
            of_types = closing - i == 2 and is_builtin_type(tokens[i + 1].text)
            if of_types or self._vector_type(i + 1) == closing:
                return self._operand(closing + 1)  # another cast
            i = closing
        while True:
            following = tokens[i + 1].text
            if following in ("::", ".", "->"):
                i += 2
            elif following in ("(", "[") or (following == "<" and self._is_template(i + 1)):
                i = source.closing(i + 1)
            elif following in ("++", "--"):
                i += 1
            else:
                return i

    def _is_template(self, i: int) -> bool:
        """Whether the ``<`` at ``i`` opens template arguments, in an expression."""
        return self.tokens[self.source.closing(i) + 1].text in ("(", "::")

    def _copy_class(self, i: int) -> None:
        """``S a = b;`` in a body becomes ``S a = msl_copy(b);``: b may be in constant memory."""
        tokens = self.tokens
        at = i + 1
        if tokens[at].text == "<":
            at = self.source.closing(at) + 1
        if tokens[at].kind != "name" or tokens[at + 1].text != "=" or not self._in_body(i):
            return
        end = at + 2
        while tokens[end].text not in (";", ",", "{", "}"):
            end = self.source.closing(end) + 1 if tokens[end].text in ("(", "[") else end + 1
        if tokens[end].text == ";":
            self.edits.replace(tokens[at + 1].end, tokens[at + 1].end, " msl_copy(")
            self.edits.replace(tokens[end].start, tokens[end].start, ")")

    def _static_cast(self, i: int) -> None:
        """Half and bfloat, which a template's types may be, convert into each other by way of float."""
        tokens = self.tokens
        target = tokens[i + 2].text
        if target in _NARROW:
            self.edits.replace(tokens[i].start, tokens[i + 3].end, _NARROW[target])
            return
        closing = self.source.closing(i + 4)
        if tokens[i + 2].kind != "name" or not self._is_place(i + 5, closing):
            return
        value = self.source.text[tokens[i + 4].end : tokens[closing].start]
        if "\n" not in value:
            step = f"static_cast<decltype(msl_cast_step<{target}>({value}))>("
            self.edits.replace(tokens[i + 4].end, tokens[i + 4].end, step)
            self.edits.replace(tokens[closing].start, tokens[closing].start, ")")

    def _is_place(self, first: int, end: int) -> bool:
        """A variable, its member or its element: it may be written twice."""
        return first < end and all(
            token.kind in ("name", "number") or token.text in (".", "->", "[", "]", "+", "*")
            for token in self.tokens[first:end]
        )

    def _vector_template(self, i: int) -> None:
        closing = self.source.closing(i + 1)
        if self.tokens[i + 2].text == "bool" and closing == i + 5:
            self.edits.replace(
                self.tokens[i].start, self.tokens[closing].end, f"bool{self.tokens[i + 4].text}"
            )
        elif self.tokens[closing].text == ">" and self.tokens[closing + 1].text == "(":
            self._construct(i, closing)
        elif self.tokens[closing].text == ">":
            self._declare(i, closing)

    def _declare(self, first: int, last: int) -> None:
        """``short2 at(x, y);`` in a body becomes ``short2 at = msl_make<short2>(x, y);``."""
        tokens = self.tokens
        if tokens[last + 1].kind != "name" or tokens[last + 2].text != "(" or not self._in_body(first):
            return
        if tokens[self.source.closing(last + 2) + 1].text != ";":
            return
        kind = _words(self.source.text[tokens[first].start : tokens[last].end])
        self.edits.replace(tokens[last + 2].start, tokens[last + 2].start, f" = msl_make<{kind}>")

    def _in_body(self, token: int) -> bool:
        at = bisect.bisect(self.bodies, (token, token)) - 1
        return at >= 0 and self.bodies[at][0] < token < self.bodies[at][1]

    def _construct(self, first: int, last: int) -> None:
        """``float4(a, b)`` becomes ``msl_make<float4>(a, b)``; a conversion operator's name stays."""
        if first and self.tokens[first - 1].text == "::":
            if self.tokens[first - 2].text != "metal":
                return  # a member type of some class
            first -= 2
        before = self.tokens[first - 1].text if first else ""
        if before in ("operator", ".", "->", "~") or self.tokens[last + 2].text in ("*", "&"):
            return
        start, end = self.tokens[first].start, self.tokens[last].end
        self.edits.replace(start, end, f"msl_make<{self.source.text[start:end]}>".replace("\n", " "))
        self._truth(last + 1)

    def _truth(self, opening: int) -> None:
        """``float4(a < b)``: lanes are 0 and 1, where the compiler's comparison gives 0 and -1."""
        tokens = self.tokens
        closing = self.source.closing(opening)
        at, compares = opening + 1, False
        while at < closing:
            text = tokens[at].text
            if text in ("(", "[", "{") or (text == "<" and self._is_template(at)):
                at = self.source.closing(at)
            elif text in (",", "?"):
                return
            compares = compares or text in ("<", ">", "<=", ">=", "==", "!=")
            at += 1
        if compares:
            self.edits.replace(tokens[opening].end, tokens[opening].end, "msl_truth(")
            self.edits.replace(tokens[closing].start, tokens[closing].start, ")")

    def _thread(self, i: int) -> None:
        """Temporaries have no address space here: what must take them loses its ``thread``."""
        if self._qualifies_constructor(i) or self._refers_to_const(i):
            token = self.tokens[i]
            self.edits.replace(token.start, token.end, "")

    def _qualifies_constructor(self, i: int) -> bool:
        """After the parameters of a constructor or of a conversion operator."""
        before = i - 1
        if self.tokens[before].text == "const":
            before -= 1
        if self.tokens[before].text != ")":
            return False
        opening = self.source.opening(before)
        name = self.tokens[opening - 1].text
        if name in self.structure.classes:
            return True
        at = opening - 1
        while at > 0 and self.tokens[at].text not in (";", "{", "}", ")", "operator"):
            at -= 1
        return self.tokens[at].text == "operator" and self.tokens[at + 1].kind == "name"

    def _refers_to_const(self, i: int) -> bool:
        """``const thread T&``, in any order of the first two."""
        const = self.tokens[i - 1].text == "const"
        at = i + 1
        while self.tokens[at].kind == "name" or self.tokens[at].text in ("::", "<"):
            const = const or self.tokens[at].text == "const"
            at = self.source.closing(at) + 1 if self.tokens[at].text == "<" else at + 1
        return const and self.tokens[at].text == "&"

    def _constant(self, i: int) -> None:
        """What ``constant T*`` points to is const, with or without the word."""
        tokens = self.tokens
        if tokens[i - 1].text in ("const", "<") or tokens[i + 1].text == "const":
            return
        at = i + 1
        while tokens[at].kind == "name" or tokens[at].text in ("::", "<"):
            if tokens[at].text == "const":
                return
            at = self.source.closing(at) + 1 if tokens[at].text == "<" else at + 1
        if tokens[at].text in ("*", "&") and tokens[at + 1].text != ">" and at > i + 1:
            self.edits.replace(tokens[i].start, tokens[i].end, "const constant")

    def _copies_from_constant(self, name: str, first: int, last: int) -> None:
        """A class with constructors is copied from constant memory too, which generic pointers leave out."""
        tokens = self.tokens
        declared = (tokens[i].text == name and tokens[i + 1].text == "(" for i in range(first, last))
        if not any(declared) or name not in self.structure.classes:
            return
        copy = (
            "for (size_t i = 0; i < sizeof(*this); i++) "
            "((uchar*)this)[i] = ((const constant uchar*)&other)[i];"
        )
        at = tokens[first].end
        self.edits.replace(
            at,
            at,
            f" public: {name}(const {name}&) = default; {name}& operator=(const {name}&) = default; "
            f"{name}(const constant {name}& other) {{ {copy} }} "
            f"void operator=(const constant {name}& other) {{ {copy} }} ",
        )

    def _make_template(self, function: Function) -> None:
        """A kernel is a template, whose type can be asked for (reflect.entry): that of a function cannot."""
        first = self.tokens[function.first]
        if first.text != "template":
            self.edits.replace(first.start, first.start, "template <int msl_only> ")

    def _threadgroup_variables(self, function: Function) -> None:
        for first, name_at, last in threadgroup_variables(self.source, function):
            self._threadgroup_variable(first, name_at, last)

    def _threadgroup_variable(self, first: int, name_at: int, last: int) -> None:
        tokens = self.tokens
        start, aligned = first, ""
        if tokens[first - 1].text == ")":  # alignas before it
            start = self.source.opening(first - 1) - 1
            aligned = self.source.text[tokens[start].start : tokens[first].start]
        type_text = _words(self.source.text[tokens[first + 1].start : tokens[name_at].start])
        if found := _ALIGNAS.search(type_text):
            aligned, type_text = found[0], _ALIGNAS.sub("", type_text)
        least = found[1] if (found := _ALIGNAS.search(aligned)) else "1"
        out = ""
        at = name_at
        while at < last:
            name = tokens[at].text
            end = at + 1
            while tokens[end].text == "[":
                end = self.source.closing(end) + 1
            extent = _words(self.source.text[tokens[at].end : tokens[end].start])
            self.variables.append(name)
            number = len(self.variables)
            alias = f"msl_threadgroup_type_{number}"
            out += (
                f"using {alias} = {type_text}{extent}; threadgroup {alias}& {name} = "
                f"*(threadgroup {alias}*)msl_threadgroup_variable("
                f"{number}, sizeof({alias}), msl_larger(alignof({alias}), {least}), 0); "
            )
            at = end + 1
        self.edits.replace(tokens[start].start, tokens[last].end, self._constructs_in(out))

    def _constructs_in(self, text: str) -> str:
        return re.sub(r"\bvec\s*<\s*bool\s*,\s*(\d)\s*>", r"bool\1", text)

    def _pragma(self, start: int, end: int, text: str) -> None:
        if "METAL" not in text:
            return
        contract = re.search(r"fp\s+contract\s*\(\s*(\w+)\s*\)", text)
        self.edits.replace(start, end, f"#pragma clang fp contract({contract[1]})" if contract else "")


def _words(text: str) -> str:
    return " ".join(line for line in text.split() if line)


def threadgroup_variables(source: Source, function: Function) -> list[tuple[int, int, int]]:
    """Declarations of threadgroup variables in a body: the tokens ``threadgroup``, the first name, ``;``.

    Pointers to threadgroup memory are declarations of their own and not among them.
    """
    tokens = source.tokens
    found = []
    at = function.body[0]
    while at < function.body[1]:
        if tokens[at].text != "threadgroup" or tokens[at - 1].text not in (";", "{", "}", ")"):
            at += 1
            continue
        if tokens[at - 1].text == ")" and tokens[source.opening(at - 1) - 1].text != "alignas":
            at += 1
            continue
        end = at
        while tokens[end].text != ";":
            end = source.closing(end) + 1 if tokens[end].text in ("(", "[", "{") else end + 1
        name_at = _declared_name(source, at + 1, end)
        if name_at is not None:
            found.append((at, name_at, end))
        at = end
    return found


def _declared_name(source: Source, first: int, end: int) -> int | None:
    """The first declared name of ``T a[4], b``; None for pointers and references."""
    tokens = source.tokens
    at, name = first, None
    while at < end:
        text = tokens[at].text
        if text in ("*", "&"):
            return None
        if text in ("[", ",", "="):
            return name
        if text == "<":
            at = source.closing(at)
        elif tokens[at].kind == "name" and text not in _TYPE_WORDS and text not in _SPACES:
            name = at
        at += 1
    return name


def translate(source: Source, structure: Structure, constants: Mapping[int | str, object]) -> Translated:
    """``source`` as C++ for OpenCL.

    Args:
        constants: values of function constants, by index or name.
    """
    return _Translator(source, structure, constants).run()
