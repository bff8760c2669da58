"""Compiling one kernel, and finding it again."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from . import cache, pipeline, runtime
from .errors import CompileError, Diagnostic
from .inlining import can_meet
from .instrument import instrument
from .ir import Module, Site
from .pipeline import Unit
from .reflect import Parameter, Signature, table_of_types, with_types


class Kernel:
    """A compiled kernel: what it takes, and its code for either mode.

    Attributes:
        name: as asked for.
        signature: parameters, with their types.
        folder: its entry in the cache.
        variables: names of the threadgroup variables, as far as the source has them; number 1 is the first.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        stored = json.loads((folder / "kernel.json").read_text())
        self.signature = _signature(stored["signature"])
        self.meets: bool = stored["meets"]
        self.variables: tuple[str, ...] = tuple(stored["variables"])
        self._objects: list[str] = stored["objects"]

    @cached_property
    def ir(self) -> str:
        """Unoptimised LLVM IR."""
        return (self.folder / "kernel.ll").read_text()

    @cached_property
    def run_library(self) -> Path:
        def make(made: Path) -> None:
            pipeline.library(self.ir, made / "run.so", ["-O3"], self._objects)

        return self._entry("run", make) / "run.so"

    def _entry(self, name: str, make: Callable[[Path], None]) -> Path:
        return cache.entry(f"{self.folder.name}/{name}", make)

    @cached_property
    def entry(self) -> int:
        """Address of the kernel's entry, loaded into this process."""
        runtime.library()  # defines what the kernel calls
        self._loaded = ctypes.CDLL(str(self.run_library))
        return ctypes.cast(self._loaded.msl_entry, ctypes.c_void_p).value or 0

    @cached_property
    def _checked(self) -> Path:
        def make(made: Path) -> None:
            checked = instrument(pipeline.optimise(self.ir, "-O1"))
            # Only code generation: the optimiser knows nothing of what a check may do.
            flags = ["-O1", "-Xclang", "-disable-llvm-passes"]
            pipeline.library(checked.ir, made / "check.so", flags, self._objects)
            cache.write_json(made / "sites.json", [site.frames for site in checked.sites])

        return self._entry("check", make)

    @property
    def check_library(self) -> Path:
        return self._checked / "check.so"

    @cached_property
    def sites(self) -> list[Site]:
        """Places of the source, by the numbers that check mode reports."""
        stored = json.loads((self._checked / "sites.json").read_text())
        return [Site(tuple((f, line, column, name) for f, line, column, name in frames)) for frames in stored]


def _signature(stored: dict[str, Any]) -> Signature:
    parameters = tuple(Parameter(**p) for p in stored["parameters"])
    return Signature(stored["kernel"], stored["call"], parameters, stored["most_threads"])


def compile(
    source: str,
    kernel: str | None = None,
    *,
    function_constants: Mapping[int | str, bool | int | float] | None = None,
    include_dirs: Sequence[str | Path] = (),
    defines: Mapping[str, object] | None = None,
    name: str = "kernel.metal",
    prelude: str = "",
) -> Kernel:
    """Compile one kernel of a Metal source for this machine's CPU.

    Args:
        source: Metal Shading Language, a whole translation unit.
        kernel: its name, or the ``host_name`` of an instantiation; None if there is only one.
        function_constants: values by index or by name. A kernel that uses one without a value is refused.
        include_dirs: where ``#include`` looks.
        defines: macros.
        name: what error messages call the source.
        prelude: Metal that comes before the source, whose lines are still counted from its own first.

    Raises:
        CompileError: the source is not what Apple's compiler would accept; every reason, with the user's
            line.
        ToolchainError: there is no compiler.
    """
    constants = dict(function_constants or {})
    folders = [str(folder) for folder in include_dirs]
    asked = cache.key(
        "kernel", source, kernel, sorted(constants.items(), key=repr), folders, defines, name, prelude
    )
    # What the request gave last time, as long as no included file has changed since.
    index = cache.root() / f"{asked}.json"
    if last := cache.read_json(index):
        folder = cache.root() / last["folder"]
        if cache.unchanged(last["files"]) and cache.is_whole(folder):
            return Kernel(last["kernel"], folder)
    unit = pipeline.front_end(source, name, kernel, constants, folders, defines or {}, prelude)
    _undefined(unit, name)
    stamps = cache.stamps(unit.files)
    folder = cache.entry(cache.key(asked, stamps), lambda made: _store(made, unit))
    found = {"kernel": unit.signature.kernel, "folder": folder.name, "files": stamps}
    cache.replace_json(index, found)
    return Kernel(unit.signature.kernel, folder)


def _store(folder: Path, unit: Unit) -> None:
    signature = with_types(unit.signature, table_of_types(unit.ir))
    store(folder, unit.ir, signature, [], unit.variables)


def store(
    folder: Path, ir: str, signature: Signature, objects: Sequence[str], variables: Sequence[str] = ()
) -> None:
    """Writes down what ``Kernel`` reads.

    Args:
        objects: object files to link with the kernel.
    """
    (folder / "kernel.ll").write_text(ir)
    meets = can_meet(ir)  # if not, it runs without fibers
    stored = {
        "signature": asdict(signature),
        "meets": meets,
        "objects": list(objects),
        "variables": list(variables),
    }
    cache.write_json(folder / "kernel.json", stored)


def _undefined(unit: Unit, name: str) -> None:
    """A function constant without a value must not be used by the kernel."""
    for line in Module(unit.ir).lines:
        if line.startswith("@") and "external" in line and "addrspace(2)" in line:
            constant = line[1:].split(" ")[0]
            used = sum(f"@{constant}" in other for other in unit.ir.split("\n")) > 1
            if used:
                message = f"function constant '{constant}' is used and has no value"
                raise CompileError(name, [Diagnostic(name, 0, 0, message)])
