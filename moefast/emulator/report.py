"""What a launch did wrong, as data and as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import abi
from .ir import Site

# In the order of runtime/check.h.
KINDS = (
    "device-read-out-of-bounds",
    "device-write-out-of-bounds",
    "threadgroup-read-out-of-bounds",
    "threadgroup-write-out-of-bounds",
    "wild-access",
    "misaligned",
    "device-uninitialised",
    "threadgroup-uninitialised",
    "device-race",
    "threadgroup-race",
    "barrier-divergence",
    "simd-divergence",
    "simd-partial",
    "threadgroup-memory",
    "read-only-write",
    "device-equal-writes",
    "threadgroup-equal-writes",
    # Told by the launch itself, in either mode.
    "too-many-threads",
    "time-limit",
    "crash",
)
# Those that have another side.
_RACES = ("device-race", "threadgroup-race", "device-equal-writes", "threadgroup-equal-writes")
_ACCESS = ("read", "write", "atomic access", "atomic read", "atomic write")
_OPERATIONS = (
    "reduction",
    "prefix sum",
    "shuffle",
    "vote",
    "quad operation",
    "matrix load or store",
    "matrix product",
)
OWN = str(Path(__file__).resolve().parent / "msl")  # the emulator's own library


@dataclass(frozen=True)
class Place:
    """A line of the source; line 0 where it is not known."""

    file: str = ""
    line: int = 0
    column: int = 0
    function: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file or "<unknown>"


@dataclass(frozen=True)
class Finding:
    """One thing a kernel did wrong, at one place; the first of ``count`` times.

    Attributes:
        kind: one of ``KINDS``.
        message: what happened, with its numbers.
        place: where; of code in a header, the line of the header.
        called_from: the calls that lead there, innermost first.
        thread: index in its threadgroup.
        threadgroup: its position in the grid of threadgroups.
        buffer: name of the buffer or threadgroup variable, or empty.
        offset: bytes from the buffer's start to the access; negative before it.
        other_place, other_thread, other_threadgroup: the other side of a race or divergence.
    """

    kind: str
    message: str
    place: Place = Place()
    called_from: tuple[Place, ...] = ()
    thread: int = 0
    threadgroup: tuple[int, int, int] = (0, 0, 0)
    buffer: str = ""
    offset: int = 0
    other_place: Place | None = None
    other_thread: int | None = None
    other_threadgroup: tuple[int, int, int] | None = None
    count: int = 1

    def __str__(self) -> str:
        times = f" ({self.count} times)" if self.count > 1 else ""
        return f"{self.place}: {self.kind}: {self.message}{times}"

    def data(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


def places(site: Site) -> tuple[Place, ...]:
    """The user's own frames of a site: what the emulator's library does in between is left out."""
    frames = [Place(*frame) for frame in site.frames]
    return tuple(frame for frame in frames if not frame.file.startswith((OWN, "<launch>"))) or (Place(),)


def path(frames: Sequence[Place]) -> str:
    """A place and the calls that lead there; empty if there is none."""
    return ", called from ".join(str(frame) for frame in frames)


def _who(thread: int, group: tuple[int, int, int]) -> str:
    return f"thread {thread} of threadgroup {group}"


class Reader:
    """Turns the runtime's findings into ``Finding``.

    Args:
        sites: of the kernel, by number.
        names: of buffers, by index.
        variables: names of threadgroup variables, the first of which is number 1.
        arguments: names of ``[[threadgroup(i)]]`` parameters, by index.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        names: Mapping[int, str],
        variables: Sequence[str] = (),
        arguments: Mapping[int, str] | None = None,
    ) -> None:
        self.sites = sites
        self.names = names
        self.variables = variables
        self.arguments = arguments or {}

    def read(self, raw: abi.Finding) -> Finding:
        kind = KINDS[raw.kind]
        here = places(self.sites[raw.site])
        group, other_group = abi.triple(raw.group), abi.triple(raw.other_group)
        race = kind in _RACES
        has_other = race or kind.endswith("divergence")
        others = places(self.sites[raw.other_site]) if has_other and raw.other_site else ()
        other = others[0] if others else None
        in_threadgroup = kind.startswith("threadgroup") or (kind == "misaligned" and raw.detail & 16)
        buffer = self._variable(raw.buffer) if in_threadgroup else self.names.get(raw.buffer, "")
        return Finding(
            kind=kind,
            message=self._message(kind, raw, buffer, _who(raw.thread, group), path(others)),
            place=here[0],
            called_from=here[1:],
            thread=raw.thread,
            threadgroup=group,
            buffer=buffer,
            offset=raw.offset,
            other_place=other,
            other_thread=raw.other_thread if other else None,
            other_threadgroup=(other_group if race else group) if other else None,
            count=raw.count,
        )

    def _variable(self, number: int) -> str:
        if number < 0:
            return "threadgroup memory"
        if number >= abi.MOST_VARIABLES:
            index = number - abi.MOST_VARIABLES
            return self.arguments.get(index, f"threadgroup({index})")
        return (
            self.variables[number - 1] if number <= len(self.variables) else f"threadgroup variable {number}"
        )

    def _message(self, kind: str, raw: abi.Finding, buffer: str, who: str, other: str) -> str:
        bytes_ = f"{raw.bytes} bytes" if raw.bytes != 1 else "1 byte"
        if kind.endswith("out-of-bounds"):
            if raw.offset < 0:
                by = f"{-raw.offset} bytes before its start"
            else:
                by = f"{raw.offset + raw.bytes - raw.size} bytes beyond its {raw.size}"
            verb = "reads" if "read-out" in kind else "writes"
            return f"{who} {verb} {bytes_} of {buffer} at byte {raw.offset}, {by}"
        if kind == "wild-access":
            address = raw.offset & (2**64 - 1)
            return f"{who}: {_ACCESS[raw.detail]} of {bytes_} at address {address:#x}, in no buffer"
        if kind == "misaligned":
            access = _ACCESS[raw.detail & 15]
            return (
                f"{who}: {access} of {bytes_} of {buffer} at byte {raw.offset}, not aligned to {raw.detail2}"
            )
        if kind.endswith("uninitialised"):
            return f"{who} reads {buffer} at byte {raw.offset}, which nobody has written"
        if kind == "read-only-write":
            return f"{who} writes {bytes_} of {buffer} at byte {raw.offset}, which the kernel declares const"
        if kind in _RACES:
            before = _who(raw.other_thread, abi.triple(raw.other_group))
            at = f" at {other}" if other else ""
            return (
                f"{_ACCESS[raw.detail]} of {buffer} at byte {raw.offset} by {who}, "
                f"unordered with a {_ACCESS[raw.detail2]} by {before}{at}"
            )
        return self._schedule_message(kind, raw, who, other)

    def _schedule_message(self, kind: str, raw: abi.Finding, who: str, other: str) -> str:
        if kind == "barrier-divergence":
            if raw.detail2:
                where = "in another round of its loop" if raw.size else f"at another one, {other}"
                return f"{who} waits at this barrier, thread {raw.other_thread} {where}"
            return f"{who} waits at this barrier, {raw.detail} threads of the threadgroup have returned"
        operation = _OPERATIONS[raw.bytes] if raw.bytes < len(_OPERATIONS) else "simdgroup barrier"
        if kind == "simd-divergence":
            where = "in another round of its loop" if raw.size else f"at {other}"
            elsewhere = f", thread {raw.other_thread} waits {where}" if other else ""
            return (
                f"{who}: {operation} by lanes {raw.detail:#010x} of the active {raw.detail2:#010x}{elsewhere}"
            )
        if kind == "simd-partial":
            lanes = f"lanes {raw.detail:#010x}"
            return f"{who}: {operation} by {lanes} only: the others have returned or do not exist"
        return f"the kernel needs {raw.size} bytes of threadgroup memory, more than 32768"
