"""What :func:`moefast.accelerate` did and what it left alone, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One module.

    Attributes:
        path: its name in the model, ``model.layers.3.mlp``.
        kind: name of its class.
        what: ``block`` (router, experts and shared expert), ``router``, ``experts`` (the router is the
            original's), ``dense``, ``own`` (moefast's own layer), or ``original``: left alone.
        backends: phase (``decode``, ``band``, ``prefill``) -> name of the backend; empty for ``original``.
        reason: why it was left alone, or why no more of it is accelerated.
    """

    path: str
    kind: str
    what: str
    backends: dict[str, str] = field(default_factory=dict)
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """``print(report)`` is for people, :meth:`to_dict` for programs.

    Attributes:
        entries: in the model's order. Dense layers and norms are among them.
        parameter_bytes: of all parameters.
        added_bytes: by how much memory in use has grown.
        note: why nothing was done at all, or None.
    """

    entries: tuple[Entry, ...] = ()
    parameter_bytes: int = 0
    added_bytes: int = 0
    note: str | None = None

    @property
    def accelerated(self) -> tuple[Entry, ...]:
        """Blocks, routers and experts that moefast runs."""
        return tuple(e for e in self.entries if e.what in ("block", "router", "experts"))

    @property
    def original(self) -> tuple[Entry, ...]:
        """MoE blocks and experts that were left alone."""
        return tuple(e for e in self.entries if e.what == "original")

    @property
    def dense(self) -> tuple[Entry, ...]:
        """Layers beside the experts that moefast runs."""
        return tuple(e for e in self.entries if e.what == "dense")

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold."""
        return {
            "counts": dict(Counter(entry.what for entry in self.entries)),
            "parameter_bytes": self.parameter_bytes,
            "added_bytes": self.added_bytes,
            "note": self.note,
            "entries": [
                {
                    "path": e.path,
                    "kind": e.kind,
                    "what": e.what,
                    "backends": e.backends,
                    "reason": e.reason,
                }
                for e in self.entries
            ],
        }

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        if self.note is not None:
            yield f"moefast: {self.note}"
            return
        shown = [e for e in self.entries if e.what != "dense"]
        counts = Counter(e.what for e in self.entries)
        parts = [f"{counts[what]} {word}" for what, word in _WORDS.items() if counts[what]]
        yield f"moefast: {', '.join(parts) or 'no MoE layers'}"
        width = max((len(e.path) for e in shown), default=0)
        for entry in shown:
            yield f"  {entry.path:{width}}  {_where(entry)}"
        kinds = Counter(e.kind for e in self.dense)
        if kinds:
            of = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
            where = ", ".join(sorted({backend for e in self.dense for backend in e.backends.values()}))
            yield f"  beside the experts: {of}: {where}"
        yield (
            f"  memory: {self.parameter_bytes / 1e6:,.1f} MB of parameters,"
            f" {max(self.added_bytes, 0) / 1e6:,.1f} MB more in use than before"
        )


_WORDS = {
    "block": "MoE blocks",
    "router": "routers",
    "experts": "expert stacks",
    "dense": "other layers",
    "own": "moefast's own",
    "original": "left alone",
}


def _where(entry: Entry) -> str:
    if entry.what == "original":
        return f"{entry.kind}: original ({entry.reason})"
    if entry.what == "own":
        return f"{entry.kind}: moefast's own"
    names = set(entry.backends.values())
    where = names.pop() if len(names) == 1 else ", ".join(f"{p} {b}" for p, b in entry.backends.items())
    but = "" if entry.reason is None else f" ({entry.reason})"
    return f"{entry.kind}: {entry.what} on {where}{but}"
