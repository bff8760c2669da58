"""Atomic operations of Apple's compiled kernels: LLVM's own, of which check mode knows."""

from __future__ import annotations

from .air_builder import Builder, bits


def atomic(b: Builder) -> str | None:
    """The value of an atomic operation; None where it is none."""
    return _atomic(b) if b.operation == "atomic" else None


def _atomic(b: Builder) -> str:
    """``air.atomic.global.add.u.i32(pointer, value, order, scope, volatile)``, and its kin."""
    operation = b.suffixes[1]
    pointer, kind = b.arguments[0], b.arguments[1]
    align = max(bits(kind) // 8, 1) if not kind.startswith("ptr") else 4
    if operation == "load":
        return b.emit(f"load atomic {b.result}, {pointer} %0 monotonic, align {bits(b.result) // 8}")
    if operation == "store":
        b.lines.append(f"  store atomic {kind} %1, {pointer} %0 monotonic, align {align}")
        return ""
    if operation == "cmpxchg":
        value = b.arguments[2]
        expected = b.emit(f"load {value}, {kind} %1")
        pair = b.emit(
            f"cmpxchg weak {pointer} %0, {value} {expected}, {value} %2 monotonic monotonic, "
            f"align {bits(value) // 8}"
        )
        found = b.emit(f"extractvalue {{ {value}, i1 }} {pair}, 0")
        b.lines.append(f"  store {value} {found}, {kind} %1")
        return b.emit(f"extractvalue {{ {value}, i1 }} {pair}, 1") if b.result == "i1" else found
    unsigned = "u" in b.suffixes[2:3]
    rmw = {"add": "add", "sub": "sub", "and": "and", "or": "or", "xor": "xor", "xchg": "xchg"}.get(operation)
    if operation in ("min", "max"):
        rmw = ("u" if unsigned else "") + operation
    if rmw is None:
        raise b.unknown()
    if kind in ("float", "half") and rmw in ("add", "sub"):
        rmw = "f" + rmw
    return b.emit(f"atomicrmw {rmw} {pointer} %0, {kind} %1 monotonic, align {align}")
