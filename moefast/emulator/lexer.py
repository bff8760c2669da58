"""Tokens of a preprocessed Metal source, each with its place."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

# Comments and continued lines are gone after the preprocessor. Digraphs and raw strings are not Metal's.
_TOKEN = re.compile(
    r"""(?P<line>^[ \t]*\#[^\n]*)
      | (?P<name>[A-Za-z_]\w*)
      | (?P<number>\.?\d(?:[eEpP][+-]|[\w.'])*)
      | (?P<text>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
      | (?P<sign>::|->|\+\+|--|&&|\|\||<<=|<=|>=|==|!=|[-+*/%&|^!~=<>?:;,.(){}\[\]@\\`$])
    """,
    re.MULTILINE | re.VERBOSE,
)
_MARKER = re.compile(r'\s*#\s*(?:line\s+)?(\d+)\s+"((?:[^"\\]|\\.)*)"')


class Token(NamedTuple):
    """``kind``: name, number, text, sign or end. ``start``: offset of its first character."""

    kind: str
    text: str
    start: int

    @property
    def end(self) -> int:
        return self.start + len(self.text)


class Source:
    """A preprocessed text: its tokens, its directives, and which line of which file an offset is.

    ``>>`` is two tokens, so that template arguments close one by one.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[Token] = []
        self.pragmas: list[Token] = []
        self._markers: list[tuple[int, str, int]] = []  # offset of the next line, file, its number
        for kind, token in _scan(text):
            if kind != "line":
                self.tokens.append(token)
            elif marker := _MARKER.match(token.text):
                self._markers.append((token.end + 1, _unescape(marker[2]), int(marker[1])))
            elif "pragma" in token.text:
                self.pragmas.append(token)
        # So that what follows a token can be looked at without asking whether there is anything.
        self.tokens += [Token("end", "", len(text))] * 8

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
        """The token that closes the bracket ``( [ {`` or the template ``<`` at ``index``."""
        opening = self.tokens[index].text
        closing = {"(": ")", "[": "]", "{": "}", "<": ">"}[opening]
        depth = 0
        for i in range(index, len(self.tokens)):
            text = self.tokens[i].text
            if text == opening:
                depth += 1
            elif text == closing:
                depth -= 1
                if depth == 0:
                    return i
            elif opening == "<" and text in (";", "{"):
                break  # it was a comparison
        return index

    def opening(self, index: int) -> int:
        """The token that opens what the bracket at ``index`` closes."""
        closing = self.tokens[index].text
        opening = {")": "(", "]": "[", "}": "{", ">": "<"}[closing]
        depth = 0
        for i in range(index, -1, -1):
            text = self.tokens[i].text
            if text == closing:
                depth += 1
            elif text == opening:
                depth -= 1
                if depth == 0:
                    return i
            elif closing == ">" and text in (";", "{", "}"):
                break
        return index


def _scan(text: str) -> Iterator[tuple[str, Token]]:
    for match in _TOKEN.finditer(text):
        kind = match.lastgroup or "sign"
        yield kind, Token(kind, match[0], match.start())


def _unescape(name: str) -> str:
    return name.replace("\\\\", "\\").replace('\\"', '"')
