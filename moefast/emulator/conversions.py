"""Constructors and casts of vectors, and of what a template's type may be: function calls of the library.

The compiler's own cast of one vector to another keeps the bits; Metal converts lane by lane.
"""

from __future__ import annotations

import bisect

from .edits import Edits, one_line
from .lexer import Source
from .structure import VECTORS, Structure, is_builtin_type, is_vector

_NARROW = {
    "bfloat": "msl_to_bfloat",
    "bfloat16_t": "msl_to_bfloat",
    "half": "msl_to_half",
    "float16_t": "msl_to_half",
}
_NO_CALL = ("operator", ".", "->", "~")  # before what is a name here, and no type


class Conversions:
    """Looks at the types of a source, and edits what begins there."""

    def __init__(self, source: Source, structure: Structure, edits: Edits) -> None:
        self.source = source
        self.tokens = source.tokens
        self.structure = structure
        self.edits = edits
        self.bodies = sorted(f.body for f in structure.functions if f.body != (0, 0))
        # But conversion operators, `operator T()`.
        functions = {
            self.tokens[f.name].text
            for f in structure.functions
            if self.tokens[f.name - 1].text != "operator"
        }
        self.dependent = structure.dependent - structure.classes - structure.vector_aliases - functions

    def edit(self) -> None:
        types = {"vec", *VECTORS, *self.structure.vector_aliases, *self.dependent}
        for i in self.source.at(*types, *_NARROW, "static_cast"):
            self._name(i, self.tokens[i].text)
        for i in self.source.at(*types, "metal", "typename"):
            if self.tokens[i - 1].text == "(":
                self._bracket(i - 1)

    def _name(self, i: int, text: str) -> None:
        following = self.tokens[i + 1].text
        if text == "vec" and following == "<":
            self._vector_template(i)
        elif is_vector(text) or text in self.structure.vector_aliases:
            if following == "(":
                self._construct(i, i)
            else:
                self._declare(i, i)
        elif text in _NARROW and following == "(" and self.tokens[i - 1].text not in _NO_CALL:
            self.edits.replace(self.tokens[i].start, self.tokens[i].end, _NARROW[text])
        elif text in self.dependent and following == "(":
            self._dependent(i)
        elif text == "static_cast":
            self._static_cast(i)

    def _bracket(self, i: int) -> None:
        """``(float4)v`` becomes ``msl_make<float4>(v)``, ``(T)v`` becomes ``msl_convert<T>(v)``."""
        tokens = self.tokens
        make = "msl_make"
        end = self._vector_type(i + 1)
        if not end:
            make, end = "msl_convert", self._dependent_type(i + 1)
        before = tokens[i - 1]
        if not end or tokens[end].text != ")" or (before.kind == "name" and before.text != "return"):
            return
        after = tokens[end + 1]
        if after.kind == "end" or (after.kind == "sign" and after.text not in ("(", "-", "+", "~", "!", "*")):
            return
        last = self._operand(end + 1)
        if make == "msl_convert":
            make = self._dependent_call(i, end + 1, last + 1, last)
            if not make:
                return
        kind = one_line(self.source.text[tokens[i + 1].start : tokens[end - 1].end])
        self.edits.replace(tokens[i].start, tokens[end].end, f"{make}<{kind}>(")
        if after.text == "(":
            self._truth(end + 1)
        self.edits.insert(tokens[last].end, ")")

    def _vector_type(self, i: int) -> int:
        """The token after a vector type at ``i``; 0 if there is none."""
        tokens = self.tokens
        if tokens[i].text == "metal" and tokens[i + 1].text == "::":
            i += 2
        if is_vector(tokens[i].text) or tokens[i].text in self.structure.vector_aliases:
            return i + 1
        return self.source.closing(i + 1) + 1 if [t.text for t in tokens[i : i + 2]] == ["vec", "<"] else 0

    def _dependent_type(self, i: int) -> int:
        """The token after ``T`` or ``typename X<T>::type`` at ``i``; 0 if there is none."""
        tokens = self.tokens
        if tokens[i].text in self.dependent:
            return i + 1
        if tokens[i].text != "typename":
            return 0
        at = i + 1
        while tokens[at].kind == "name" or tokens[at].text in ("::", "<"):
            at = self.source.closing(at) + 1 if tokens[at].text == "<" else at + 1
        return at

    def _dependent(self, i: int) -> None:
        """``T(a, b)``, where T may be a vector."""
        tokens = self.tokens
        before, closing = tokens[i - 1].text, self.source.closing(i + 1)
        if before in (*_NO_CALL, "::") or self._declares(i):
            return
        if make := self._dependent_call(i, i + 2, closing, closing):
            self.edits.replace(tokens[i].start, tokens[i].end, f"{make}<{tokens[i].text}>")
            self._truth(i + 1)

    def _declares(self, i: int) -> bool:
        """``T (*f)(int)``, ``T(int)`` and ``: T(base)`` are no conversions."""
        tokens = self.tokens
        first, second = tokens[i + 2], tokens[i + 3]
        if first.text in ("*", "&") and second.kind == "name" and tokens[i + 4].text == ")":
            return tokens[i + 5].text in ("(", "[")
        return first.text == "{" or (is_builtin_type(first.text) and second.text in (")", ","))

    def _dependent_call(self, before: int, first: int, end: int, last: int) -> str:
        """What a cast to a template's type becomes; nothing where the operand is nothing, or a literal, which
        every type takes. A product may be fused with what it is added to, but not through a function.

        Args:
            before: the first token of the cast. first, end: its operand. last: its last token.
        """
        tokens = self.tokens
        if first == end or (tokens[end - 1].kind == "number" and end - first <= 2):
            return ""
        sums = ("+", "-")
        left, right = tokens[before - 1].text, tokens[last + 1].text
        added = left in sums or (left == "=" and tokens[before - 2].text in sums) or right in sums
        return "msl_cast" if added and "*" in self._operators(first, end) else "msl_convert"

    def _operators(self, first: int, end: int) -> set[str]:
        """Signs of an expression that are in no bracket within it; one pair around all of it is none."""
        tokens = self.tokens
        while tokens[first].text == "(" and self.source.closing(first) == end - 1:
            first, end = first + 1, end - 1
        signs: set[str] = set()
        at = first
        while at < end:
            text = tokens[at].text
            if text in ("(", "[", "{") or (text == "<" and self._is_template(at)):
                at = self.source.closing(at)
            elif tokens[at].kind == "sign" and at > first:
                signs.add(text)
            at += 1
        return signs

    def _static_cast(self, i: int) -> None:
        tokens = self.tokens
        make = "msl_make"
        end = self._vector_type(i + 2)
        if not end:
            make, end = "msl_convert", self._dependent_type(i + 2)
        if tokens[i + 3].text == ">" and tokens[i + 2].text in _NARROW:
            self.edits.replace(tokens[i].start, tokens[i + 3].end, _NARROW[tokens[i + 2].text])
            return
        if not end or tokens[end].text != ">":
            return
        closing = self.source.closing(end + 1)
        if make == "msl_convert":
            make = self._dependent_call(i, end + 2, closing, closing)
        if make:
            kind = one_line(self.source.text[tokens[i + 2].start : tokens[end - 1].end])
            self.edits.replace(tokens[i].start, tokens[end].end, f"{make}<{kind}>")

    def _operand(self, i: int) -> int:
        """The last token of what a cast before ``i`` applies to."""
        tokens, source = self.tokens, self.source
        while tokens[i].text in ("-", "+", "~", "!", "*", "&", "++", "--"):
            i += 1
        if tokens[i].text == "(":
            closing = source.closing(i)
            of_types = closing - i == 2 and is_builtin_type(tokens[i + 1].text)
            if of_types or closing in (self._vector_type(i + 1), self._dependent_type(i + 1)):
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

    def _vector_template(self, i: int) -> None:
        closing = self.source.closing(i + 1)
        if self.tokens[i + 2].text == "bool" and closing == i + 5:
            lanes = self.tokens[i + 4].text
            self.edits.replace(self.tokens[i].start, self.tokens[closing].end, f"bool{lanes}")
        elif (first := self._is_typedef(i)) and not is_builtin_type(self.tokens[i + 2].text):
            self.edits.replace(self.tokens[first].start, self.tokens[i].end, "typename msl_vector_for")
            self.edits.insert(self.tokens[closing].end, "::type")
        elif self.tokens[closing].text == ">" and self.tokens[closing + 1].text == "(":
            self._construct(i, closing)
        elif self.tokens[closing].text == ">":
            self._declare(i, closing)

    def _is_typedef(self, i: int) -> int:
        """The first token of the type in ``typedef vec<T, 4> name;``, where T may be bool: nothing is deduced
        from it. 0 elsewhere."""
        qualified = self.tokens[i - 1].text == "::" and self.tokens[i - 2].text == "metal"
        first = i - 2 if qualified else i
        return first if self.tokens[first - 1].text == "typedef" else 0

    def _declare(self, first: int, last: int) -> None:
        """``short2 at(x, y);`` in a body becomes ``short2 at = msl_make<short2>(x, y);``."""
        tokens = self.tokens
        if tokens[last + 1].kind != "name" or tokens[last + 2].text != "(" or not self._in_body(first):
            return
        if tokens[self.source.closing(last + 2) + 1].text != ";":
            return
        kind = one_line(self.source.text[tokens[first].start : tokens[last].end])
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
        if before in _NO_CALL or self.tokens[last + 2].text in ("*", "&"):
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
            self.edits.insert(tokens[opening].end, "msl_truth(")
            self.edits.insert(tokens[closing].start, ")")
