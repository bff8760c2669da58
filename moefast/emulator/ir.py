"""LLVM IR as text: just enough of it to check and to instrument it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

_DEFINE = re.compile(r"^define\b[^@]*@(\"[^\"]+\"|[\w.$-]+)\(")
_CALL = re.compile(r"\b(?:call|invoke)\b[^@]*? (?:@(\"[^\"]+\"|[\w.$-]+)|(%[\w.]+))\(")
_DBG = re.compile(r"!dbg !(\d+)")
_METADATA = re.compile(r"^!(\d+) = (?:distinct )?!(DI\w+)\((.*)\)$")


@dataclass(frozen=True)
class Site:
    """A place in the source. ``frames``: (file, line, column, function) from the innermost call outwards."""

    frames: tuple[tuple[str, int, int, str], ...]


@dataclass(frozen=True)
class Body:
    """The lines of one function, from ``define`` to ``}``."""

    name: str
    first: int
    last: int


class Module:
    """A module's lines, functions and debug locations."""

    def __init__(self, text: str) -> None:
        self.lines = text.split("\n")
        self.bodies = list(self._bodies())
        self._nodes: dict[str, tuple[str, str]] | None = None

    def _bodies(self) -> Iterator[Body]:
        name, first = "", 0
        for i, line in enumerate(self.lines):
            if line.startswith("define"):
                found = _DEFINE.match(line)
                name, first = found[1].strip('"') if found else "", i
            elif line == "}" and name:
                yield Body(name, first, i)
                name = ""

    def text(self) -> str:
        return "\n".join(self.lines)

    def calls(self, body: Body) -> Iterator[tuple[int, str]]:
        """Line and callee of each call; the callee is empty where it is a value: a function pointer."""
        for i in range(body.first + 1, body.last):
            line = self.lines[i]
            if ("call " in line or "invoke " in line) and (found := _CALL.search(line)):
                yield i, (found[1] or "").strip('"')

    def location(self, line: int) -> str | None:
        """The debug location an instruction carries."""
        found = _DBG.search(self.lines[line])
        return found[1] if found else None

    @property
    def nodes(self) -> dict[str, tuple[str, str]]:
        """Debug metadata by number: kind and fields."""
        if self._nodes is None:
            matches = (_METADATA.match(line) for line in self.lines if line.startswith("!"))
            self._nodes = {found[1]: (found[2], found[3]) for found in matches if found}
        return self._nodes

    def site(self, location: str | None) -> Site:
        """Where a debug location is, with the calls that were inlined there."""
        frames = []
        while location is not None:
            fields = self.nodes.get(location, ("", ""))[1]
            file, function = self._scope(_field(fields, "scope"))
            line, column = int(_field(fields, "line") or 0), int(_field(fields, "column") or 0)
            frames.append((file, line, column, function))
            inlined = _field(fields, "inlinedAt")
            location = inlined.lstrip("!") if inlined else None
        return Site(tuple(frames))

    def _scope(self, reference: str | None) -> tuple[str, str]:
        """File and function of a scope."""
        file = ""
        while reference is not None:
            kind, fields = self.nodes.get(reference.lstrip("!"), ("", ""))
            file = file or self._file(_field(fields, "file"))
            if kind in ("DISubprogram", ""):
                return file, (_field(fields, "name") or "").strip('"')
            reference = _field(fields, "scope")
        return file, ""

    def file_of(self, define: int) -> str:
        """The file of the function that is defined at a line."""
        return self._scope(f"!{found[1]}" if (found := _DBG.search(self.lines[define])) else None)[0]

    def _file(self, reference: str | None) -> str:
        if reference is None:
            return ""
        return (_field(self.nodes.get(reference.lstrip("!"), ("", ""))[1], "filename") or "").strip('"')


@cache
def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(rf"(?:^|, ){name}: (\"[^\"]*\"|[^,]+)")


def _field(fields: str, name: str) -> str | None:
    found = _pattern(name).search(fields)
    return found[1] if found else None


_SCALARS = {"half": 2, "bfloat": 2, "float": 4, "double": 8, "ptr": 8}


def split_top(text: str) -> list[str]:
    """``text`` split at the commas that are in no bracket."""
    out, depth, start = [], 0, 0
    for i, c in enumerate(text):
        if c in "<[{(":
            depth += 1
        elif c in ">]})":
            depth -= 1
        elif c == "," and depth == 0:
            out.append(text[start:i].strip())
            start = i + 1
    out.append(text[start:].strip())
    return out


def store_bytes(kind: str, named: dict[str, str]) -> int:
    """Bytes that a load or store of an IR type touches.

    Args:
        named: the module's named structs.
    """
    kind = kind.strip()
    if kind in _SCALARS:
        return _SCALARS[kind]
    if kind.startswith("ptr"):
        return 8
    if found := re.fullmatch(r"i(\d+)", kind):
        return (int(found[1]) + 7) // 8
    if found := re.fullmatch(r"<(\d+) x (.+)>", kind):
        element = re.fullmatch(r"i(\d+)", found[2])
        bits = int(element[1]) if element else 8 * store_bytes(found[2], named)
        return (int(found[1]) * bits + 7) // 8
    if found := re.fullmatch(r"\[(\d+) x (.+)\]", kind):
        return int(found[1]) * store_bytes(found[2], named)
    if kind.startswith("%"):
        return store_bytes(named[kind], named)
    packed = kind.startswith("<{")
    inner = kind.strip("<>").strip()[1:-1]
    at = widest = 0
    for member in split_top(inner):
        size = store_bytes(member, named)
        align = 1 if packed else _alignment(member, named)
        widest = max(widest, align)
        at = (at + align - 1) // align * align + size
    return (at + widest - 1) // widest * widest if widest else at


def _alignment(kind: str, named: dict[str, str]) -> int:
    if found := re.fullmatch(r"\[\d+ x (.+)\]", kind):
        return _alignment(found[1], named)
    if kind.startswith("%"):
        return _alignment(named[kind], named)
    if kind.startswith("{"):
        return max(_alignment(member, named) for member in split_top(kind[1:-1]))
    return 1 << max(store_bytes(kind, named) - 1, 0).bit_length()


def named_types(lines: list[str]) -> dict[str, str]:
    """``%name = type ...`` lines of a module."""
    found = (
        re.match(r"^(%(?:[\w.]+|\"[^\"]+\")) = type (.+)$", line) for line in lines if line.startswith("%")
    )
    return {match[1]: match[2] for match in found if match}


def leading_type(text: str) -> str:
    """The type in ``<4 x float> %x``."""
    text = text.strip()
    if text[0] in "<[{":
        return text[: closing_bracket(text[1:]) + 2]
    if text.startswith('%"'):
        return text[: text.index('"', 2) + 1]
    return text.split(" ", 1)[0] if not text.startswith("ptr") else "ptr"


def closing_bracket(text: str) -> int:
    """Where the bracket that was open before ``text`` closes."""
    depth = 1
    for i, c in enumerate(text):
        if c in "([{<":
            depth += 1
        elif c in ")]}>":
            depth -= 1
            if depth == 0:
                return i
    return len(text)
