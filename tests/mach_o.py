"""Just enough of macOS's object files to see what a cross-compiler made: kind, processor, symbols."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

PROCESSORS = {0x01000007: "x86_64", 0x0100000C: "arm64"}
KINDS = {1: "object", 2: "program", 6: "library", 8: "bundle"}
_ANYWHERE = -2  # in place of a library's number
_SYMBOLS, _INFO, _EXPORTS, _SIGNATURE = 0x2, 0x80000022, 0x80000033, 0x1D


@dataclass(frozen=True)
class MachO:
    """One file.

    Attributes:
        wanted: symbols that others must define, and whether any loaded file may, or a named library only.
        exported: symbols that others find.
        signed: as Apple silicon demands of what it runs.
    """

    processor: str
    kind: str
    wanted: dict[str, bool]
    exported: frozenset[str]
    signed: bool


def read(file: Path) -> MachO:
    """Raises ValueError where it is no 64-bit Mach-O file."""
    data = file.read_bytes()
    if len(data) < 32 or data[:4] != b"\xcf\xfa\xed\xfe":
        raise ValueError(f"[mach_o] {file.name} is no 64-bit Mach-O file, it starts with {data[:4]!r}.")
    processor, _, kind, commands = struct.unpack_from("<4I", data, 4)
    wanted: dict[str, bool] = {}
    exported: set[str] = set()
    anywhere: set[str] = set()
    signed, at = False, 32
    for _ in range(commands):
        command, size = struct.unpack_from("<2I", data, at)
        if command == _SYMBOLS:
            wanted |= dict.fromkeys(_undefined(data, *struct.unpack_from("<3I", data, at + 8)), False)
        elif command in (_INFO, _EXPORTS):
            if command == _INFO:
                for offset in (16, 32):  # bound at once, and at the first call
                    start, length = struct.unpack_from("<2I", data, at + offset)
                    anywhere |= _bound_anywhere(data[start : start + length])
            start, length = struct.unpack_from("<2I", data, at + (40 if command == _INFO else 8))
            _walk(data[start : start + length], 0, b"", exported)
        signed = signed or command == _SIGNATURE
        at += size
    return MachO(
        PROCESSORS[processor],
        KINDS[kind],
        {name: name in anywhere for name in wanted},
        frozenset(exported),
        signed,
    )


def _undefined(data: bytes, symbols: int, count: int, names: int) -> set[str]:
    found = set()
    for i in range(count):
        name, kind = struct.unpack_from("<IB", data, symbols + 16 * i)
        if kind & 0x0F == 0x01:  # external, of no section
            start = names + name
            found.add(data[start : data.index(b"\0", start)].decode())
    return found


def _bound_anywhere(code: bytes) -> set[str]:
    """Symbols that the loader looks for in all that is loaded: a program for a machine of a few registers."""
    found, at, library, name = set(), 0, 0, ""
    while at < len(code):
        operation, immediate, at = code[at] & 0xF0, code[at] & 0x0F, at + 1
        if operation in (0x10, 0x30):
            library = immediate if operation == 0x10 or not immediate else immediate - 16
        elif operation == 0x40:
            end = code.index(b"\0", at)
            name, at = code[at:end].decode(), end + 1
        elif operation in (0x20, 0x60, 0x70, 0x80, 0xA0, 0xC0):
            value, at = _number(code, at)
            library = value if operation == 0x20 else library
            if operation == 0xC0:
                _, at = _number(code, at)
        if operation in (0x90, 0xA0, 0xB0, 0xC0) and library == _ANYWHERE:
            found.add(name)
    return found


def _walk(trie: bytes, at: int, prefix: bytes, found: set[str]) -> None:
    """A node of the trie of exports: what is known of the name so far, then the names that go on."""
    if not trie:
        return
    size, at = _number(trie, at)
    if size:
        found.add(prefix.decode())
    at += size
    children, at = trie[at], at + 1
    for _ in range(children):
        end = trie.index(b"\0", at)
        child, after = _number(trie, end + 1)
        _walk(trie, child, prefix + trie[at:end], found)
        at = after


def _number(data: bytes, at: int) -> tuple[int, int]:
    """A ULEB128 and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not byte & 0x80:
            return value, at
