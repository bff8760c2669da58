"""Tokens of a preprocessed Metal source, each with its place."""

from __future__ import annotations

import bisect
import gc
import heapq
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import NamedTuple

# Every character is in some piece. Comments and continued lines are gone after the preprocessor. Digraphs and
# raw strings are not Metal's.
_PIECE = re.compile(
    r"""^[ \t]*\#[^\n]*
      | [A-Za-z_]\w*
      | [ \t]+ | \n+
      | \.?\d(?:[eEpP][+-]|[\w.'])*
      | "(?:[^"\\\n]|\\.)*" | '(?:[^'\\\n]|\\.)*'
      | ::|->|\+\+|--|&&|\|\||<<=|<=|>=|==|!=
      | .
    """,
    re.MULTILINE | re.VERBOSE | re.DOTALL,
)
_SIGN = re.compile(r"::|->|\+\+|--|&&|\|\||<<=|<=|>=|==|!=|[-+*/%&|^!~=<>?:;,.(){}\[\]@\\`$]")
_MARKER = re.compile(r'\s*#\s*(?:line\s+)?(\d+)\s+"((?:[^"\\]|\\.)*)"')


class Token(NamedTuple):
    """``kind``: name, number, text, sign or end. ``start``: offset of its first character."""

    kind: str
    text: str
    start: int

    @property
    def end(self) -> int:
        return self.start + len(self.text)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the garbage collector, which would look at all tokens again and again: a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


_new_token = tuple.__new__  # what Token(...) calls in the end, three times as fast


class Source:
    """A preprocessed text: its tokens, its directives, and which line of which file an offset is.

    ``>>`` is two tokens, so that template arguments close one by one.

    Attributes:
        where: indices of the tokens of each text, in order. A kernel with its headers has 50,000 tokens, of
            which whoever looks for something looks at few.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[Token] = []
        self.pragmas: list[Token] = []
        self._markers: list[tuple[int, str, int]] = []  # offset of the next line, file, its number
        self.where: dict[str, list[int]] = {}
        with _uncollected():
            self._read(text)
        self._partner = self._partners()
        # So that what follows a token can be looked at without asking whether there is anything.
        self.tokens += [Token("end", "", len(text))] * 8

    def _read(self, text: str) -> None:
        pieces = _PIECE.findall(text)
        kinds = {piece: _kind(piece) for piece in set(pieces)}
        self.where.update((piece, []) for piece, kind in kinds.items() if kind not in ("", "line"))
        where, keep, count = self.where, self.tokens.append, 0
        # The text ends one piece before the offsets do.
        for piece, start in zip(pieces, accumulate(map(len, pieces), initial=0), strict=False):
            kind = kinds[piece]
            if kind == "line":
                self._directive(Token(kind, piece, start))
            elif kind:
                keep(_new_token(Token, (kind, piece, start)))
                where[piece].append(count)
                count += 1

    def _directive(self, line: Token) -> None:
        if marker := _MARKER.match(line.text):
            self._markers.append((line.end + 1, _unescape(marker[2]), int(marker[1])))
        elif "pragma" in line.text:
            self.pragmas.append(line)

    def at(self, *texts: str) -> list[int]:
        """Indices of the tokens that are one of ``texts``, in order."""
        found = [self.where[text] for text in texts if text in self.where]
        return found[0] if len(found) == 1 else list(heapq.merge(*found))

    def within(self, text: str, first: int, end: int) -> list[int]:
        """Indices from ``first`` to before ``end`` of the tokens that are ``text``."""
        found = self.where.get(text, [])
        return found[bisect.bisect_left(found, first) : bisect.bisect_left(found, end)]

    def texts(self, kind: str) -> Iterable[str]:
        """The different texts of the tokens of a kind."""
        return [text for text, found in self.where.items() if self.tokens[found[0]].kind == kind]

    def _partners(self) -> dict[int, int]:
        """What closes each bracket, and what opens it: ``( [ {`` each by themselves."""
        partners = {}
        for opening, closing in ("()", "[]", "{}"):
            opened = []
            for i in self.at(opening, closing):
                if self.tokens[i].text == opening:
                    opened.append(i)
                elif opened:
                    last = opened.pop()
                    partners[last], partners[i] = i, last
        return partners

    def place(self, offset: int) -> tuple[str, int, int]:
        """File, line and column of an offset, line and column from 1."""
        at, file, line = 0, "", 1
        low, high = 0, len(self._markers)
        while low < high:
            middle = (low + high) // 2
            if self._markers[middle][0] <= offset:
                low = middle + 1
            else:
                high = middle
        if low:
            at, file, line = self._markers[low - 1]
        newline = self.text.rfind("\n", 0, offset)
        return file, line + self.text.count("\n", at, offset), offset - newline

    def closing(self, index: int) -> int:
        """The token that closes the bracket ``( [ {`` or the template ``<`` at ``index``; without one,
        ``index``."""
        if self.tokens[index].text != "<":
            return self._partner.get(index, index)
        depth = 0
        for i in range(index, len(self.tokens)):
            text = self.tokens[i].text
            if text == "<":
                depth += 1
            elif text == ">":
                depth -= 1
                if depth == 0:
                    return i
            elif text in (";", "{"):
                break  # it was a comparison
        return index

    def opening(self, index: int) -> int:
        """The token that opens what the bracket at ``index`` closes; without one, ``index``."""
        if self.tokens[index].text != ">":
            return self._partner.get(index, index)
        depth = 0
        for i in range(index, -1, -1):
            text = self.tokens[i].text
            if text == ">":
                depth += 1
            elif text == "<":
                depth -= 1
                if depth == 0:
                    return i
            elif text in (";", "{", "}"):
                break
        return index


def _kind(piece: str) -> str:
    """Of a token, or ``line`` for a directive; nothing for space and what is not Metal's."""
    first = piece[0]
    if first == "_" or (first.isascii() and first.isalpha()):
        return "name"
    if first.isdigit() or (first == "." and len(piece) > 1):
        return "number"
    if first in "\"'" and len(piece) > 1:
        return "text"
    if piece.lstrip().startswith("#"):
        return "line"
    return "sign" if _SIGN.fullmatch(piece) else ""


def _unescape(name: str) -> str:
    return name.replace("\\\\", "\\").replace('\\"', '"')
