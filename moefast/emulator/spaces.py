"""Address spaces where C++ for OpenCL wants them said otherwise."""

from __future__ import annotations

from .edits import Edits
from .lexer import Source
from .structure import Structure


class Spaces:
    """Looks at one ``thread`` or ``constant`` at a time."""

    def __init__(self, source: Source, structure: Structure, edits: Edits) -> None:
        self.source = source
        self.tokens = source.tokens
        self.structure = structure
        self.edits = edits

    def thread(self, i: int) -> None:
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

    def constant(self, i: int) -> None:
        """What ``constant T*`` points to is const, with or without the word."""
        tokens = self.tokens
        if tokens[i - 1].text == "const" or tokens[i + 1].text == "const":
            return
        at = i + 1
        while tokens[at].kind == "name" or tokens[at].text in ("::", "<"):
            if tokens[at].text == "const":
                return
            at = self.source.closing(at) + 1 if tokens[at].text == "<" else at + 1
        if tokens[at].text in ("*", "&") and at > i + 1:
            self.edits.replace(tokens[i].start, tokens[i].end, "const constant")
