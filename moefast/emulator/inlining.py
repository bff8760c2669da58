"""Functions in which threads meet become part of the kernel: a barrier is then its whole path of calls.

The runtime tells one barrier, or simdgroup operation, from another by where the kernel waits. In a function
that stayed one, called from two branches, threads of both branches would wait at the same place, and neither
would the divergence show nor would the lanes of a simdgroup take part in the right operation. Apple's
compiler inlines such functions too. There are no function pointers and no recursion in Metal, so every
function can be.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from .ir import Body, Module, closing_bracket

# Of the runtime; those of AIR wait on behalf of their caller (msl/air.h).
MEETING = ("msl_simd_exchange", "msl_simd_barrier", "msl_threadgroup_barrier")
_AIR = "msl_air_"
ENTRY = "msl_entry"

_GROUP = re.compile(r" #(\d+)(?=[ ,]|$)")
_ATTRIBUTES = re.compile(r"^attributes #(\d+) = \{(.*)\}$")
_KEPT_APART = re.compile(r"\b(?:noinline|optnone|alwaysinline) ")
_LINKAGE = re.compile(
    r"^define (?:private|internal|linkonce|linkonce_odr|weak|weak_odr|available_externally)\b"
)
_VISIBILITY = re.compile(r" (?:hidden|protected)(?= )")


class MeetsItselfError(Exception):
    """A function in which threads meet calls itself.

    Attributes:
        place: where it does: file, line, column.
    """

    def __init__(self, module: Module, line: int) -> None:
        frames = module.site(module.location(line)).frames
        self.place = frames[0][:3] if frames else ("", 0, 0)
        super().__init__(self.place)


def meets(callee: str) -> bool:
    """Whether threads may wait for each other in a function of the runtime."""
    return callee in MEETING or callee.startswith(_AIR)


def can_meet(text: str) -> bool:
    """Whether there is such a call in a module's IR."""
    return any(f"@{name}(" in text for name in MEETING) or f"@{_AIR}" in text


def inline_meeting(text: str) -> str:
    """IR in which the optimiser, at any level, inlines each function that can lead to a meeting of threads.

    Raises:
        MeetsItselfError: one of them is recursive, and cannot be.
    """
    if not can_meet(text):
        return text
    module = Module(text)
    callers = _Calls(module)
    inlined = callers.leading_to_meetings()
    # The kernel has one caller, and it is the root of all paths.
    inlined -= {name for name in inlined if {by for by, _ in callers.of.get(name, [])} <= {ENTRY}}
    for name in sorted(inlined):
        if name in callers.reaching(name):
            raise MeetsItselfError(module, callers.of[name][0][1])
    if not inlined:
        return text
    attributes = _Attributes(module)
    for body in module.bodies:
        if body.name in inlined:
            attributes.always_inline(body)
    for name in inlined:
        for _, line in callers.of[name]:
            attributes.keep_call(line)
    return "\n".join([*module.lines, *attributes.added])


def refuse_shared_meetings(module: Module) -> None:
    """Raises RuntimeError where the optimiser left a meeting in a function with several callers."""
    callers = _Calls(module)
    for name in callers.leading_to_meetings():
        if len(callers.of.get(name, [])) > 1:
            raise RuntimeError(f"[emulator] {name}, in which threads meet, was not inlined.")


class _Calls:
    """Who calls whom. ``of``: by callee, the callers and the lines of the calls."""

    def __init__(self, module: Module) -> None:
        self.of: dict[str, list[tuple[str, int]]] = {}
        for body in module.bodies:
            for line, callee in module.calls(body):
                self.of.setdefault(callee, []).append((body.name, line))
        self.bodies = {body.name for body in module.bodies}

    def leading_to_meetings(self) -> set[str]:
        found: set[str] = set()
        for callee in self.of:
            if meets(callee):
                found |= self.reaching(callee)
        return (found & self.bodies) - {ENTRY}

    def reaching(self, callee: str) -> set[str]:
        """Functions from which calls lead to ``callee``."""
        found: set[str] = set()
        waiting = [callee]
        while waiting:
            for caller, _ in self.of.get(waiting.pop(), []):
                if caller not in found:
                    found.add(caller)
                    waiting.append(caller)
        return found


class _Attributes:
    """Changes what functions and calls are marked with. ``added``: new groups of attributes."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.added: list[str] = []
        self.groups = dict(self._groups())
        self.made: dict[tuple[str, str], str] = {}
        self.next = 1 + max((int(number) for number in self.groups), default=-1)

    def _groups(self) -> Iterator[tuple[str, str]]:
        for line in self.module.lines:
            if line.startswith("attributes") and (found := _ATTRIBUTES.match(line)):
                yield found[1], found[2]

    def always_inline(self, body: Body) -> None:
        line = self.module.lines[body.first]
        if not _LINKAGE.match(line):
            # Nobody else can want it: no second copy is compiled.
            line = _VISIBILITY.sub("", line.replace("define ", "define internal ", 1), count=1)
        self.module.lines[body.first] = self._marked(line, "alwaysinline")

    def keep_call(self, line: int) -> None:
        # Two calls in two branches stay two, whatever comes before they are inlined.
        self.module.lines[line] = self._marked(self.module.lines[line], "nomerge")

    def _marked(self, line: str, mark: str) -> str:
        found = _GROUP.search(line)
        if not found:
            at = line.index("(", line.index("@")) + 1
            end = at + closing_bracket(line[at:]) + 1
            name = re.match(r" (?:local_)?unnamed_addr", line[end:])
            end += name.end() if name else 0
            already = f" {mark}" in line[end:]
            return line if already else f"{line[:end]} {mark}{line[end:]}"
        key = (found[1], mark)
        if key not in self.made:
            self.made[key] = str(self.next)
            kept = _KEPT_APART.sub("", self.groups[found[1]].strip() + " ")
            self.added.append(f"attributes #{self.next} = {{ {kept}{mark} }}")
            self.next += 1
        return f"{line[: found.start()]} #{self.made[key]}{line[found.end() :]}"
