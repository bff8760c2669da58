"""What Apple's compiler rejects and only the whole program shows: found in the front end's IR."""

from __future__ import annotations

import re

from .ir import Body, Module
from .report import OWN
from .strict import Refusal


def check_ir(text: str) -> list[Refusal]:
    """Recursion, calls of functions that are known at run time only, methods of objects in device or
    threadgroup memory that do not say so, and casts of vectors that keep the bits."""
    module = Module(text)
    bodies = {body.name: body for body in module.bodies}
    calls: dict[str, list[tuple[str, int]]] = {name: [] for name in bodies}
    found: list[Refusal] = []
    for body in module.bodies:
        for line, callee in module.calls(body):
            if not callee:
                found.append(_at(module, line, "function pointers are not supported in Metal"))
            elif callee in bodies:
                calls[body.name].append((callee, line))
    for name, called in calls.items():
        for callee, line in called:
            if _reaches(calls, callee, name) and not (
                callee == name and _is_loop(module, bodies[name], line)
            ):
                found.append(_at(module, line, "recursive function calls are not supported in Metal"))
    return [*found, *_casts(module), *_methods(module, bodies)]


_VECTOR_CAST = re.compile(r" = bitcast <(\d+) x \w+> %[\w.]+ to <(\d+) x \w+>")


def _casts(module: Module) -> list[Refusal]:
    """A cast to a type parameter that is a vector of other elements: Metal converts, the compiler here would
    not."""
    message = "a cast to a vector type that is a template's parameter is not supported by the emulator"
    found = (i for i, line in enumerate(module.lines) if (m := _VECTOR_CAST.search(line)) and m[1] == m[2])
    refusals = [_at(module, i, message) for i in found]
    return [refusal for refusal in refusals if not refusal[0].startswith(OWN)]


_METHOD_CALL = re.compile(r"call [^@]*@(_ZNU9CLgeneric\w+)\(ptr addrspace\(4\) [^%,]*(%[\w.]+)")
_SPECIAL = re.compile(r"(C\d|aS)[EI]")  # constructors, and assignment as the compiler makes it


def _methods(module: Module, bodies: dict[str, Body]) -> list[Refusal]:
    """What a method without an address space is called on must be a thread's own."""
    found = []
    for body in module.bodies:
        spaces: dict[str, str] = {}
        for i in range(body.first + 1, body.last):
            line = module.lines[i]
            if cast := _SPACE_CAST.match(line):
                spaces[cast[1]] = _SPACE_NAMES[cast[2]]
            elif (call := _METHOD_CALL.search(line)) and call[2] in spaces and call[1] in bodies:
                method = module.file_of(bodies[call[1]].first)
                if not method.startswith(OWN) and not _SPECIAL.search(call[1]):
                    space = spaces[call[2]]
                    message = f"the method is not marked {space}, and the object is in {space} memory"
                    found.append(_at(module, i, message))
    return found


_SPACE_CAST = re.compile(r"\s*(%[\w.]+) = addrspacecast ptr addrspace\(([13])\) \S+ to ptr addrspace\(4\)")
_SPACE_NAMES = {"1": "device", "3": "threadgroup"}


def _reaches(calls: dict[str, list[tuple[str, int]]], start: str, goal: str) -> bool:
    seen, waiting = set(), [start]
    while waiting:
        name = waiting.pop()
        if name == goal:
            return True
        if name not in seen:
            seen.add(name)
            waiting += [callee for callee, _ in calls[name]]
    return False


def _is_loop(module: Module, body: Body, line: int) -> bool:
    """A function that calls itself as the last thing it does, without a value: a loop to any compiler.

    MLX's LoopedElemToLoc::next is one.
    """
    if "call void @" not in module.lines[line]:
        return False
    labels = {
        module.lines[i].split(":")[0]: i for i in range(body.first, body.last) if ":" in module.lines[i]
    }
    at = line + 1
    for _ in range(body.last - body.first):  # no more steps than lines: a jump backwards is no end
        text = module.lines[at].split(", !")[0].split(";")[0].strip()
        if text == "ret void":
            return True
        if jump := re.fullmatch(r"br label %([\w.]+)", text):
            at = labels.get(jump[1], body.last)
        elif text and not text.startswith("call void @llvm.lifetime") and not text.endswith(":"):
            return False
        at += 1
    return False


def _at(module: Module, line: int, message: str) -> Refusal:
    frames = module.site(module.location(line)).frames
    file, number, column = frames[0][:3] if frames else ("", 0, 0)
    return file, number, column, message
