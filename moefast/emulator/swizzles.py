"""Components of packed and bool vectors, one or several at once: ``v.x``, ``v.xyz``.

These vectors are classes here. What the compiler does for its own vectors, properties do for the classes:
those that a source uses, before its first line.
"""

from __future__ import annotations

import re
from pathlib import Path

from .lexer import Source

FILE = str(Path(__file__).resolve().parent / "msl" / "swizzles")  # what errors of them would name
_SWIZZLE = re.compile(r"[xyzw]{1,4}|[rgba]{1,4}")
_COMPONENTS = {letter: i for names in ("xyzw", "rgba") for i, letter in enumerate(names)}


def used(source: Source) -> list[str]:
    """The swizzles of a source, in order; a member of that name may be among them."""
    return sorted(filter(_SWIZZLE.fullmatch, _members(source)))


def _members(source: Source) -> set[str]:
    """What stands after ``.`` or ``->``."""
    return {source.tokens[i + 1].text for i in source.at(".", "->")}


# What the compiler takes for components of its vectors besides, and Metal does not.
_FOREIGN = re.compile(r"lo|hi|even|odd|[sS][\da-fA-F]+")


def renamed(source: Source) -> str:
    """Macros that give other names to what would be foreign components, wherever they stand: a member may be
    called `lo`, a component may not."""
    names = sorted(filter(_FOREIGN.fullmatch, _members(source)))
    return "".join(f"#define {name} msl_name_{name}\n" for name in names)


def classes(swizzles: list[str]) -> str:
    """The bases of the vector classes that have these, as one line of C++ (msl/vectors.h)."""
    out = ""
    for lanes in (2, 3, 4):
        out += (
            f"template <typename T> struct msl_swizzled<T, {lanes}> : msl_lanes<T, {lanes}> {{ "
            "msl_swizzled() = default; MSL_COPIES(msl_swizzled) "
        )
        for swizzle in swizzles:
            lane = [_COMPONENTS[letter] for letter in swizzle]
            if max(lane) >= lanes:
                continue
            if len(lane) == 1:
                out += f"MSL_COMPONENT({swizzle}, {lane[0]}) "
            else:
                kind = "MSL_SWIZZLE" if len(set(lane)) == len(lane) else "MSL_READ_SWIZZLE"
                out += f"{kind}({swizzle}, {len(lane)}, {', '.join(map(str, lane))}) "
        out += "}; "
    return out
