"""Declarations that C++ for OpenCL says otherwise: function constants, kernels, threadgroup variables, and
classes, which are copied from constant memory too."""

from __future__ import annotations

import re
from collections.abc import Mapping

from .edits import Edits, one_line
from .lexer import Source
from .methods import Methods
from .structure import ClassBody, Function, FunctionConstant, Structure

_SPACES = ("device", "constant", "threadgroup", "thread")
_TYPE_WORDS = ("const", "volatile", "typename", "unsigned", "signed")
# No brackets inside: `alignas(alignof(T))` is for the compiler, and is not for threadgroup variables.
_ALIGNAS = re.compile(r"alignas\s*\(([^()]*)\)")


class Declarations:
    """Edits every declaration of a source.

    Attributes:
        variables: names of the threadgroup variables: the first is number 1.
    """

    def __init__(
        self, source: Source, structure: Structure, constants: Mapping[int | str, object], edits: Edits
    ) -> None:
        self.source = source
        self.tokens = source.tokens
        self.structure = structure
        self.values = constants
        self.edits = edits
        self.variables: list[str] = []

    def edit(self) -> None:
        for constant in self.structure.constants:
            self._function_constant(constant)
        for made in self.structure.instantiations:
            span = self.tokens[made.first].start, self.tokens[made.last].end
            self.edits.replace(*span, f"template decltype({made.of}) {made.of};")
        for number, body in enumerate(self.structure.bodies):
            self._copies(body, number)
        Methods(self.source, self.structure, self.edits).edit()
        for function in self.structure.functions:
            if function.kernel:
                for first, name_at, last in threadgroup_variables(self.source, function):
                    self._threadgroup_variable(first, name_at, last)
                self._make_template(function)

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

    def _copies(self, body: ClassBody, number: int) -> None:
        """A class is copied from constant memory as from any other, which C++ for OpenCL leaves out.

        All that is declared is defaulted, so that an aggregate and a trivial class stay what they are; only
        the assignment is a template, for `s = {1, 2}` to mean one of the two.
        """
        tokens, name = self.tokens, body.name
        if not name:  # typedef struct { ... } params;
            name = f"msl_class_{number}"
            self.edits.insert(tokens[body.keyword].end, f" {name}")
        constructs = False
        for i in self.source.within("operator", body.first + 1, body.last):
            assigns = tokens[i + 1].text == "=" and tokens[i + 2].text == "("
            if assigns and self._takes_itself(name, i + 2):
                return
        for i in self.source.within(name, body.first + 1, body.last):
            if tokens[i - 1].text != "~":
                opening = i + 1
                if tokens[opening].text == "<":  # S<T>(), as some write it
                    opening = self.source.closing(opening) + 1
                if tokens[opening].text != "(":
                    continue
                constructs = True
                if self._takes_itself(name, opening):
                    return
        default = "" if constructs else f"{name}() = default; "
        after = "private: " if tokens[body.keyword].text == "class" else ""
        self.edits.insert(
            tokens[body.first].end,
            f" public: {default}{name}(const {name}&) = default; {name}& operator=(const {name}&) = default; "
            f"{name}(const constant {name}&) = default; template <typename msl_other> "
            f"metal::enable_if_t<metal::is_same_v<msl_other, {name}>, {name}&> "
            f"operator=(const constant msl_other& other) {{ return *this = msl_other(other); }} {after}",
        )

    def _takes_itself(self, name: str, opening: int) -> bool:
        """Whether parameters are those of a copy: ``(const S&)``, with whatever address space."""
        inside = [token.text for token in self.tokens[opening + 1 : self.source.closing(opening)]]
        return name in inside and "&" in inside and "," not in inside

    def _make_template(self, function: Function) -> None:
        """A kernel is a template, whose type can be asked for (reflect.entry): that of a function cannot."""
        first = self.tokens[function.first]
        if first.text != "template":
            self.edits.insert(first.start, "template <int msl_only> ")

    def _threadgroup_variable(self, first: int, name_at: int, last: int) -> None:
        tokens = self.tokens
        start, aligned = first, ""
        if tokens[first - 1].text == ")":  # alignas before it
            start = self.source.opening(first - 1) - 1
            aligned = self.source.text[tokens[start].start : tokens[first].start]
        type_text = one_line(self.source.text[tokens[first + 1].start : tokens[name_at].start])
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
            extent = one_line(self.source.text[tokens[at].end : tokens[end].start])
            self.variables.append(name)
            number = len(self.variables)
            alias = f"msl_threadgroup_type_{number}"
            out += (
                f"using {alias} = {type_text}{extent}; threadgroup {alias}& {name} = "
                f"*(threadgroup {alias}*)msl_threadgroup_variable("
                f"{number}, sizeof({alias}), msl_larger(alignof({alias}), {least}), 0); "
            )
            at = end + 1
        self.edits.replace(tokens[start].start, tokens[last].end, _bool_vectors(out))


def _bool_vectors(text: str) -> str:
    return re.sub(r"\bvec\s*<\s*bool\s*,\s*(\d)\s*>", r"bool\1", text)


def threadgroup_variables(source: Source, function: Function) -> list[tuple[int, int, int]]:
    """Declarations of threadgroup variables in a body: the tokens ``threadgroup``, the first name, ``;``.

    Pointers to threadgroup memory are declarations of their own and not among them.
    """
    tokens = source.tokens
    found = []
    for at in source.within("threadgroup", *function.body):
        if tokens[at - 1].text not in (";", "{", "}", ")"):
            continue
        if tokens[at - 1].text == ")" and tokens[source.opening(at - 1) - 1].text != "alignas":
            continue
        end = at
        while tokens[end].text != ";":
            end = source.closing(end) + 1 if tokens[end].text in ("(", "[", "{") else end + 1
        name_at = _declared_name(source, at + 1, end)
        if name_at is not None:
            found.append((at, name_at, end))
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
