"""What threads of Apple's compiled kernels do together: barriers, simdgroup operations, matrices.

Barriers and threads are the scheduler's; simdgroup operations come from msl/air.h.
"""

from __future__ import annotations

import re

from .air_builder import Builder, element

_SIMD = re.compile(r"(simd|quad)_(?!active|is_)\w+")


def cooperation(b: Builder) -> str | None:
    """The value of a function that threads execute together; None where it is none."""
    if b.operation in ("wg", "simdgroup"):
        return _barrier(b)
    if b.operation.startswith("simdgroup_matrix_8x8"):
        return _matrix(b)
    if b.operation in ("get_simdgroup_size", "get_threads_per_simdgroup"):
        return "32"
    return _simd(b) if _SIMD.fullmatch(b.operation) else None


def _barrier(b: Builder) -> str:
    function = "msl_threadgroup_barrier" if b.operation == "wg" else "msl_simd_barrier"
    b.call("void", function, "i32 %0", "i32 0")
    return ""


def _simd(b: Builder) -> str:
    suffix = "_".join(b.suffixes)
    votes = b.operation in ("simd_any", "simd_all", "simd_ballot")
    if votes:
        suffix = ""
    elif suffix.startswith("i"):
        suffix = f"u_{suffix}"  # moves do not care
    slots = []
    for i, kind in enumerate(b.arguments):
        value = f"%{i}"
        if kind == "i1":
            kind, value = "i8", b.emit(f"zext i1 {value} to i8")
        slots.append(b.in_memory(kind, value))
    held = "i8" if b.result == "i1" else b.result
    out = b.emit(f"alloca {held}, align 16")
    b.call("void", f"msl_air_{b.operation}" + (f"_{suffix}" if suffix else ""), *slots, f"ptr {out}")
    value = b.emit(f"load {held}, ptr {out}")
    return b.emit(f"icmp ne i8 {value}, 0") if b.result == "i1" else value


def _pair(b: Builder, kind: str, value: str) -> str:
    """The two elements a lane holds of a matrix, which AIR has as 64 of which two count."""
    scalar = element(kind)
    first = b.emit(f"extractelement {kind} {value}, i32 0")
    second = b.emit(f"extractelement {kind} {value}, i32 1")
    pair = b.emit(f"insertelement <2 x {scalar}> poison, {scalar} {first}, i32 0")
    pair = b.emit(f"insertelement <2 x {scalar}> {pair}, {scalar} {second}, i32 1")
    return b.in_memory(f"<2 x {scalar}>", pair)


def _of_pair(b: Builder, values: list[str]) -> str:
    """A matrix of which a lane holds two elements."""
    matrix = "poison"
    for lane, value in enumerate(values):
        matrix = b.emit(f"insertelement {b.result} {matrix}, {element(b.result)} {value}, i32 {lane}")
    return matrix


def _matrix(b: Builder) -> str:
    operation = b.operation.removeprefix("simdgroup_matrix_8x8_")
    if operation == "init_filled":
        return _of_pair(b, ["%0", "%0"])
    if operation == "load":
        kind, space = element(b.result), b.arguments[0]
        places = _matrix_places(b, kind, "%0", space, 1)
        return _of_pair(b, [b.emit(f"load {kind}, {space} {place}") for place in places])
    if operation == "store":
        kind = element(b.arguments[0])
        for lane, place in enumerate(_matrix_places(b, kind, "%1", b.arguments[1], 2)):
            value = b.emit(f"extractelement {b.arguments[0]} %0, i32 {lane}")
            b.lines.append(f"  store {kind} {value}, {b.arguments[1]} {place}")
        return ""
    if operation != "multiply_accumulate":
        raise b.unknown()
    scalar = element(b.result)
    slots = [_pair(b, kind, f"%{i}") for i, kind in enumerate(b.arguments)]
    out = b.emit(f"alloca <2 x {scalar}>, align 16")
    names = "_".join(suffix.removeprefix("v64") for suffix in b.suffixes)
    b.call("void", f"msl_air_matrix_{names}", *slots, f"ptr {out}")
    pair = b.emit(f"load <2 x {scalar}>, ptr {out}")
    return _of_pair(b, [b.emit(f"extractelement <2 x {scalar}> {pair}, i32 {lane}") for lane in (0, 1)])


def _matrix_places(b: Builder, kind: str, pointer: str, space: str, first: int) -> list[str]:
    """Pointers to the elements that a lane holds.

    From argument ``first`` on: elements in a row, origin, whether transposed.
    The memory is accessed here, not in msl/air.h, so that check mode sees it.
    """
    out = b.emit("alloca <2 x i32>, align 16")
    b.call("void", "msl_air_matrix_place", f"ptr {out}")
    held = b.emit(f"load <2 x i32>, ptr {out}")
    row, column = (
        b.emit(f"zext i32 {b.emit(f'extractelement <2 x i32> {held}, i32 {i}')} to i64") for i in (0, 1)
    )
    x, y = (b.emit(f"extractelement <2 x i64> %{first + 1}, i32 {i}") for i in (0, 1))
    places = []
    for i in (0, 1):
        along = b.emit(f"add i64 {column}, {i}")
        y_at = b.emit(f"select i1 %{first + 2}, i64 {along}, i64 {row}")
        x_at = b.emit(f"select i1 %{first + 2}, i64 {row}, i64 {along}")
        skipped = b.emit(f"mul i64 {b.emit(f'add i64 {y_at}, {y}')}, %{first}")
        at = b.emit(f"add i64 {skipped}, {b.emit(f'add i64 {x_at}, {x}')}")
        places.append(b.emit(f"getelementptr {kind}, {space} {pointer}, i64 {at}"))
    return places
