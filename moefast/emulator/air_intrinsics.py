"""The functions Apple's compiled kernels call, ``air.*``, written as LLVM IR.

Each is made for the types the kernel declares it with: air_arithmetic.py, air_threads.py, air_atomic.py.
"""

from __future__ import annotations

import re

from .air_arithmetic import arithmetic
from .air_atomic import atomic
from .air_builder import Builder
from .air_threads import cooperation
from .ir import split_top

_DECLARE = re.compile(r"^declare\s+(.*?)@(air\.[\w.]+)\((.*)\)(.*)$")


def lower(text: str) -> str:
    """A module's IR in which every ``air.*`` declaration has become a definition.

    Raises:
        UnknownIntrinsicError: one that is not known.
    """
    kept, made = [], []
    helpers: set[str] = set()
    for line in text.split("\n"):
        found = _DECLARE.match(line)
        if not found:
            # What the optimiser was told of the functions may not hold of their definitions: above all,
            # that a simdgroup operation touches no memory and may move.
            kept.append(re.sub(r"\) #\d+", ")", line) if "@air." in line else line)
            continue
        result = _bare(found[1])
        arguments = [_bare(argument) for argument in split_top(found[3])] if found[3] else []
        body, needed = _define(Builder(found[2], result, arguments))
        parameters = ", ".join(f"{kind} %{i}" for i, kind in enumerate(arguments))
        made.append(
            f"define internal {result} @{found[2]}({parameters}) convergent alwaysinline {{\n{body}\n}}"
        )
        helpers |= needed
    declared = {
        line.split("@")[1].split("(")[0] for line in kept if line.startswith("declare") and "@" in line
    }
    helpers = {helper for helper in helpers if helper.split("@")[1].split("(")[0] not in declared}
    return "\n".join([*kept, *sorted(helpers), *made])


def _bare(kind: str) -> str:
    """A type without its attributes."""
    words = re.sub(
        r'"[^"]*"|\b(?:noundef|zeroext|signext|local_unnamed_addr|captures\([^)]*\)|readonly|writeonly|nocapture'
        r"|readnone|nonnull|noalias|immarg|align \d+"
        r"|dereferenceable\(\d+\)|dso_local|weak|internal|returned)\b",
        "",
        kind,
    )
    return " ".join(words.split())


def _define(b: Builder) -> tuple[str, set[str]]:
    """A body, and declarations of what it calls."""
    for make in (cooperation, atomic, _told, arithmetic):
        if (value := make(b)) is not None:
            break
    else:
        raise b.unknown()
    b.lines.append("  ret void" if b.result == "void" else f"  ret {b.result} {value}")
    return "\n".join(b.lines), b.helpers


def _told(b: Builder) -> str | None:
    """What a compiler knows better than the one who runs it."""
    if b.operation == "is_uniform":
        return "true"
    if b.operation == "normalize_function_constant_predicate":
        return b.emit(f"icmp ne {b.arguments[0]} %0, 0") if b.result == "i1" else "%0"
    return None
