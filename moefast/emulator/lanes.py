"""Which lanes of a vector an access means: the compiler reads all of ``v`` for ``v.x``, and writes all of it
for ``v.xy = a``, the other lanes with what it has just read there.

A lane that is read and not used is not read by the program; one that is written back as it was is written,
for whoever else writes it, but is no more initialised than before.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .ir import Body, Module, split_top, store_bytes

_LOAD = re.compile(r"^\s*(%[\w.]+) = load (?:volatile )?<(\d+) x (\w+)>, (ptr addrspace\(\d\) .+)$")
_STORE = re.compile(r"^\s*store (?:volatile )?<\d+ x \w+> (%[\w.]+), (ptr addrspace\(\d\) .+)$")
_VALUE = re.compile(r"%[\w.]+")
_RESULT = re.compile(r"^\s*(%[\w.]+) = (extractelement|insertelement|shufflevector) (.+)$")
_INDEX = re.compile(r"^i\d+ (\d+)$")
_LANE = re.compile(r"i32 (\d+|poison|undef)")


@dataclass(frozen=True)
class Lanes:
    """Of a load: those that are used; of a store: those that are written back. ``bytes``: of one lane."""

    bytes: int
    mask: int


@dataclass
class _Vector:
    """A loaded vector: where it lay, and what became of its lanes."""

    pointer: str
    used: set[int] = field(default_factory=set)
    written_back: dict[int, set[int]] = field(default_factory=dict)  # by line of the store


def partial_lanes(module: Module, body: Body) -> dict[int, Lanes]:
    """Loads and stores of some lanes only, by line."""
    loads = [
        (i, found)
        for i in range(body.first + 1, body.last)
        if " = load <" in module.lines[i] and (found := _LOAD.match(module.lines[i]))
    ]
    if not loads:
        return {}
    uses = _uses(module, body)
    out: dict[int, Lanes] = {}
    for line, found in loads:
        count, size = int(found[2]), store_bytes(found[3], {})
        vector = _Vector(_pointer(found[4]))
        _follow(module, uses, vector, found[1], {lane: lane for lane in range(count)})
        if len(vector.used) < count:
            out[line] = Lanes(size, _mask(vector.used))
            for store, lanes in vector.written_back.items():
                out[store] = Lanes(size, _mask(lanes))
    return out


def _mask(lanes: set[int]) -> int:
    return sum(1 << lane for lane in lanes)


def _pointer(operands: str) -> str:
    """The pointer of ``ptr addrspace(3) %p, align 16``."""
    return split_top(operands)[0]


def _uses(module: Module, body: Body) -> dict[str, list[int]]:
    """The lines that have a value as an operand."""
    found: dict[str, list[int]] = {}
    for i in range(body.first + 1, body.last):
        _, _, operands = module.lines[i].rpartition(" = ")
        for name in set(_VALUE.findall(operands)):
            found.setdefault(name, []).append(i)
    return found


def _follow(
    module: Module, uses: dict[str, list[int]], vector: _Vector, name: str, lanes: dict[int, int]
) -> None:
    """What becomes of those lanes of ``vector`` that ``name`` has: by its own lane, the vector's."""
    for line in uses.get(name, []):
        text = module.lines[line].split(", !")[0]
        if (store := _STORE.match(text)) and store[1] == name and _pointer(store[2]) == vector.pointer:
            same = {mine for mine, its in lanes.items() if mine == its}
            vector.written_back.setdefault(line, set()).update(same)
            vector.used |= set(lanes.values()) - same
            continue
        made = _RESULT.match(text)
        kept = _kept(made[2], split_top(made[3]), name, lanes) if made else None
        if made is None or kept is None:
            vector.used |= set(lanes.values())
        elif made[2] == "extractelement":
            vector.used |= set(kept.values())
        elif kept:
            _follow(module, uses, vector, made[1], kept)


def _kept(operation: str, operands: list[str], name: str, lanes: dict[int, int]) -> dict[int, int] | None:
    """The lanes that the result has of ``name``; None where that is not known."""
    if operation == "shufflevector":
        first, second, chosen = operands
        width = int(first[1:].split(" ")[0])
        count = int(chosen[1:].split(" ")[0])
        zeros = chosen.endswith("zeroinitializer")
        places = ["0"] * count if zeros else _LANE.findall(chosen)
        kept = {}
        for mine, place in enumerate(places[-count:]):
            if not place.isdecimal():
                continue
            operand, at = (first, int(place)) if int(place) < width else (second, int(place) - width)
            if operand.endswith(f" {name}") and at in lanes:
                kept[mine] = lanes[at]
        return kept
    index = _INDEX.match(operands[-1])
    if not index or not operands[0].endswith(f" {name}"):
        return None
    at = int(index[1])
    if operation == "extractelement":
        return {0: lanes[at]} if at in lanes else {}
    return {mine: its for mine, its in lanes.items() if mine != at}
