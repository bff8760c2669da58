"""The address space of the object a method is called on.

In Metal a method that names none takes objects in thread memory. Here it would take any but constant ones,
and so could give no thread reference or pointer to a member. It gets the word `thread`, unless it may be
called on a temporary: those have no address space here.
"""

from __future__ import annotations

from .edits import Edits
from .lexer import Source
from .structure import Function, Structure

_SPACES = {"device", "constant", "threadgroup", "thread"}


class Methods:
    def __init__(self, source: Source, structure: Structure, edits: Edits) -> None:
        self.source = source
        self.tokens = source.tokens
        self.structure = structure
        self.edits = edits

    def edit(self) -> None:
        general = self._of_temporaries() | self._of_operators() | self._of_lambdas()
        for function in self.structure.functions:
            if self._is_method(function):
                self._qualify(function, general)

    def _is_method(self, function: Function) -> bool:
        before = self.tokens[function.name - 1].text
        if self.tokens[function.name].kind != "name" or before in ("operator", "~"):
            return False
        if not function.method and (before != "::" or self.tokens[function.name - 2].text == "metal"):
            return False
        head = {self.tokens[i].text for i in range(function.first, function.name)}
        constructs = self.tokens[function.name].text in self.structure.classes
        return not constructs and not head & {"static", "friend"}

    def _qualify(self, function: Function, general: set[str]) -> None:
        tokens = self.tokens
        at = function.parameters[1]
        const = tokens[at + 1].text == "const"
        if const:
            at += 1
        if tokens[at + 1].text in _SPACES:
            return
        returned = {tokens[i].text for i in range(function.first, function.name)}
        if "thread" in returned or tokens[function.name].text not in general:
            self.edits.insert(tokens[at].end, " thread")

    def _of_temporaries(self) -> set[str]:
        """What is called as ``f(x).name(`` or ``S{x}.member.name(``."""
        tokens = self.tokens
        found: set[str] = set()
        for point in self.source.at("."):
            if tokens[point - 1].text in (")", "}"):
                at = point + 1
                while tokens[at + 1].text == ".":
                    at += 2
                if tokens[at + 1].text in ("(", "<"):
                    found.add(tokens[at].text)
        return found

    def _of_lambdas(self) -> set[str]:
        """What is called in a lambda that captures copies, which have no address space here either."""
        tokens = self.tokens
        found: set[str] = set()
        for i in self.source.at("["):
            if tokens[i + 1].text in ("&", "]", "["):
                continue
            closing = self.source.closing(i)
            at = closing + 1
            if tokens[at].text == "(":
                at = self.source.closing(at) + 1
            while tokens[at].kind == "name" or tokens[at].text in ("->", "::"):
                at += 1
            before = tokens[i - 1]
            if tokens[at].text == "{" and before.kind != "name" and before.text not in (")", "]"):
                found |= self._called(at, self.source.closing(at))
        return found

    def _of_operators(self) -> set[str]:
        """What the operators of classes call, which are called on temporaries themselves."""
        operators = (f for f in self.structure.functions if f.method and self.tokens[f.name].kind != "name")
        return {name for function in operators for name in self._called(*function.body)}

    def _called(self, first: int, last: int) -> set[str]:
        tokens = self.tokens
        return {
            tokens[i].text
            for i in range(first, last)
            if tokens[i].kind == "name" and tokens[i + 1].text in ("(", "<")
        }
