"""What a Metal source declares: its functions and kernels, classes, function constants, instantiations.

Not a parser of C++: it follows brackets and the few words that open a scope, which is all that the
translation and the checks need to know of the surroundings of a token.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .lexer import Source


@dataclass(frozen=True)
class Function:
    """Indices of tokens: the first, the name, the brackets of the parameters and of the body (0, 0: no
    body). A method is declared within a class."""

    first: int
    name: int
    parameters: tuple[int, int]
    body: tuple[int, int]
    kernel: bool
    method: bool = False


@dataclass(frozen=True)
class Instantiation:
    """``template [[host_name("host")]] [[kernel]] TYPE of;``, tokens ``first`` to ``last``.

    TYPE is ``decltype(of)`` or an alias of it, or ``void`` with the parameters after the name.
    """

    host: str
    of: str
    first: int
    last: int


@dataclass(frozen=True)
class FunctionConstant:
    """``constant type name [[function_constant(index)]];``, tokens ``first`` to ``last``."""

    name: str
    type: str
    index: int
    first: int
    last: int


@dataclass(frozen=True)
class ClassBody:
    """``struct name {`` to its ``}``: the tokens of the word and of both braces. Without a name, its alias
    has one."""

    name: str
    keyword: int
    first: int
    last: int


@dataclass
class Structure:
    functions: list[Function] = field(default_factory=list)
    instantiations: list[Instantiation] = field(default_factory=list)
    constants: list[FunctionConstant] = field(default_factory=list)
    classes: set[str] = field(default_factory=set)
    class_templates: set[str] = field(default_factory=set)
    types: set[str] = field(default_factory=set)  # classes, aliases and type parameters of templates
    dependent: set[str] = field(default_factory=set)  # type parameters, and aliases made of them
    vector_aliases: set[str] = field(default_factory=set)
    bodies: list[ClassBody] = field(default_factory=list)
    globals: list[tuple[int, int]] = field(default_factory=list)  # declarations outside functions and classes
    templates: list[tuple[int, int]] = field(default_factory=list)  # tokens < and > of their parameters

    def in_template_parameters(self, token: int) -> bool:
        return any(first < token < last for first, last in self.templates)


_CLASS = ("struct", "class", "union")


class _Reader:
    def __init__(self, source: Source) -> None:
        self.source = source
        self.tokens = source.tokens
        self.found = Structure()

    def read(self) -> Structure:
        self._names()
        self._scope(0, len(self.tokens), "namespace")
        return self.found

    def _names(self) -> None:
        tokens, found = self.tokens, self.found
        for i in self.source.at(*_CLASS, "typename", "template", "using", "typedef"):
            text = tokens[i].text
            if text in _CLASS or text == "typename":
                at = self._class_name(i) if text != "typename" else i + 1
                while text in ("typename", "class") and tokens[at].text == ".":
                    at += 1  # a pack
                after = tokens[at]
                if after.kind != "name":
                    continue
                if text != "typename" and tokens[at + 1].text in ("{", ":", "<", ";", "final"):
                    found.classes.add(after.text)
                    found.types.add(after.text)
                elif i and tokens[i - 1].text in ("<", ",") and tokens[at + 1].text in (",", ">", "="):
                    found.types.add(after.text)
                    found.dependent.add(after.text)
            elif text == "template" and tokens[i + 1].text == "<":
                closing = self.source.closing(i + 1)
                found.templates.append((i + 1, closing))
                if tokens[closing + 1].text in ("struct", "class") and closing > i + 2:
                    found.class_templates.add(tokens[self._class_name(closing + 1)].text)
            elif text == "using" and tokens[i + 2].text == "=":
                found.types.add(tokens[i + 1].text)
                self._alias(tokens[i + 1].text, i + 3)
            elif text == "typedef":
                end = next(iter(self.source.within(";", i, len(tokens))), i)
                if tokens[end - 1].kind == "name" and end > i:  # else the compiler misses the semicolon
                    found.types.add(tokens[end - 1].text)
                    self._alias(tokens[end - 1].text, i + 1)

    def _alias(self, name: str, first: int) -> None:
        at = first
        while self.tokens[at].text in ("typename", "metal", "::", "const"):
            at += 1
        if self.tokens[at].text == "vec" or is_vector(self.tokens[at].text):
            self.found.vector_aliases.add(name)
            return
        at = first
        while self.tokens[at].text not in (";", "{") and self.tokens[at].kind != "end":
            if self.tokens[at].text in ("typename", "decltype", "conditional_t", *self.found.dependent):
                self.found.dependent.add(name)
            at += 1

    def _scope(self, at: int, end: int, kind: str) -> int:
        """Reads declarations until the scope's closing brace; returns the token after it."""
        tokens = self.tokens
        first = at  # of the declaration
        while at < end:
            text = tokens[at].text
            if text in ("(", "["):
                at = self.source.closing(at) + 1
            elif text == ";":
                self._declaration(first, at, kind)
                at = first = at + 1
            elif text == "}":
                return at + 1
            elif (
                text == ":" and kind == "class" and tokens[at - 1].text in ("public", "private", "protected")
            ):
                at = first = at + 1
            elif text == "{":
                at = self._brace(first, at, kind)
                if tokens[at - 1].text == "}" and tokens[at : at + 1] and tokens[at].text in (";", ",", "="):
                    continue  # an initialiser or a class: the declaration goes on to its semicolon
                if self._continues:
                    continue
                first = at
            else:
                at += 1
        return at

    _continues = False

    def _brace(self, first: int, at: int, kind: str) -> int:
        """What the brace at ``at`` opens, by the declaration before it; returns the token after its end."""
        tokens = self.tokens
        self._continues = False
        words = {tokens[i].text for i in self._outside_brackets(first, at)}
        if "namespace" in words or (tokens[at - 1].kind == "text" and "extern" in words):
            after = self._scope(at + 1, len(tokens), "namespace")
            self._continues = False  # whatever stood last in there
            return after
        parameters = self._parameters(first, at)
        if words & {*_CLASS, "enum"} and parameters is None:
            if "enum" in words:
                return self.source.closing(at) + 1
            after = self._scope(at + 1, len(tokens), "class")
            keyword = max(i for i in self._outside_brackets(first, at) if tokens[i].text in _CLASS)
            name_at = self._class_name(keyword)
            # `struct { ... };` within a union has no name and may not get one.
            if name_at < at or tokens[first].text in ("typedef", "using"):
                name = tokens[name_at].text if name_at < at else ""
                self.found.bodies.append(ClassBody(name, keyword, at, after - 1))
            self._continues = True
            return after
        closing = self.source.closing(at)
        if parameters is None:
            self._continues = True  # `int x{0};`
            return closing + 1
        if self._initialises_member(parameters[1], at):
            self._continues = True
            return closing + 1
        self._function(first, parameters, (at, closing), kind == "class")
        return closing + 1

    def _class_name(self, keyword: int) -> int:
        """The token after ``struct`` and its attributes: the name, if there is one."""
        at = keyword + 1
        while self.tokens[at].text in ("alignas", "__attribute__", "["):
            opening = at if self.tokens[at].text == "[" else at + 1
            at = self.source.closing(opening) + 1
        return at

    def _initialises_member(self, after: int, at: int) -> bool:
        """``: a{1}, b{2} {``: is the brace that of a member, not the body?"""
        colon = any(self.tokens[i].text == ":" for i in self._outside_brackets(after, at))
        return colon and (self.tokens[at - 1].kind == "name" or self.tokens[at - 1].text == ">")

    def _outside_brackets(self, first: int, end: int) -> list[int]:
        """Tokens of a declaration that are in no bracket, template list or attribute."""
        inside: list[int] = []
        at = first
        while at < end:
            text = self.tokens[at].text
            if text in ("(", "[") or (text == "<" and at and self.tokens[at - 1].kind == "name"):
                at = max(self.source.closing(at), at) + 1
                continue
            inside.append(at)
            at += 1
        return inside

    def _parameters(self, first: int, end: int) -> tuple[int, int] | None:
        """The brackets of a function's parameters: the first after a name that is no attribute's."""
        at = first
        while at < end:
            token = self.tokens[at]
            if token.text == "[":
                at = self.source.closing(at)
            elif token.text == "<" and self.tokens[at - 1].kind == "name":
                at = max(self.source.closing(at), at)
            elif token.text == "=" and self.tokens[at - 1].text != "operator":
                return None
            elif token.text == "(":
                before = self.tokens[at - 1]
                closing = self.source.closing(at)
                if (
                    before.text
                    in (
                        "__attribute__",
                        "alignas",
                        "decltype",
                        "noexcept",
                        "static_assert",
                        "requires",
                    )
                    or before.text == "operator"
                ):
                    at = closing
                else:
                    return at, closing
            at += 1
        return None

    def _function(
        self, first: int, parameters: tuple[int, int], body: tuple[int, int], method: bool = False
    ) -> None:
        kernel = bool(self.source.within("kernel", first, parameters[0]))
        self.found.functions.append(Function(first, parameters[0] - 1, parameters, body, kernel, method))

    def _declaration(self, first: int, end: int, kind: str) -> None:
        tokens = self.tokens
        texts = [tokens[i].text for i in range(first, end)]
        if "function_constant" in texts and kind == "namespace" and self._parameters(first, end) is None:
            self._function_constant(first, end)
        elif texts[:1] == ["template"] and "host_name" in texts:
            self._instantiation(first, end)
        elif kind == "namespace" and texts:
            parameters = self._parameters(first, end)
            if parameters is not None:
                self._function(first, parameters, (0, 0))
            else:
                self.found.globals.append((first, end))
        elif kind == "class" and texts and not {"using", "typedef", "friend", "static_assert"} & set(texts):
            parameters = self._parameters(first, end)
            if parameters is not None:
                self._function(first, parameters, (0, 0), method=True)

    def _function_constant(self, first: int, end: int) -> None:
        tokens = self.tokens
        bracket = next(i for i in range(first, end) if tokens[i].text == "[")
        number = next(i for i in range(bracket, end) if tokens[i].kind == "number")
        words = [
            tokens[i].text for i in range(first, bracket - 1) if tokens[i].text not in ("constant", "const")
        ]
        self.found.constants.append(
            FunctionConstant(
                tokens[bracket - 1].text, " ".join(words), int(tokens[number].text, 0), first, end
            )
        )

    def _instantiation(self, first: int, end: int) -> None:
        tokens = self.tokens
        host_at = next(i for i in range(first, end) if tokens[i].text == "host_name")
        host = "".join(
            tokens[i].text[1:-1]
            for i in range(host_at, self.source.closing(host_at + 1))
            if tokens[i].kind == "text"
        )
        for i in self._outside_brackets(first + 1, end):
            if tokens[i].kind != "name" or tokens[i + 1].text != "<":
                continue
            closing = self.source.closing(i + 1)
            if tokens[closing + 1].text in ("(", ";"):
                of = self.source.text[tokens[i].start : tokens[closing].end]
                self.found.instantiations.append(Instantiation(host, of, first, end))
                return


_ELEMENTS = (
    "char",
    "uchar",
    "short",
    "ushort",
    "int",
    "uint",
    "long",
    "ulong",
    "half",
    "bfloat",
    "float",
    "bool",
)
VECTORS = {
    f"{packed}{element}{lanes}" for packed in ("", "packed_") for element in _ELEMENTS for lanes in (2, 3, 4)
}


def is_vector(name: str) -> bool:
    """Whether ``name`` is a vector type of Metal, packed ones included: ``float4``, ``packed_half3``."""
    return name in VECTORS


def is_builtin_type(name: str) -> bool:
    return name in _BUILTIN


_BUILTIN = {
    *_ELEMENTS,
    *VECTORS,
    *("void", "unsigned", "signed", "size_t", "ptrdiff_t", "uintptr_t", "intptr_t"),
    *(f"{sign}int{bits}_t" for sign in ("", "u") for bits in (8, 16, 32, 64)),
}


def read(source: Source) -> Structure:
    """The declarations of ``source``."""
    return _Reader(source).read()
