"""From Metal source to a shared library: preprocess, translate, check, lower, link."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import cache, contraction, reflect, strict, strict_ir
from .errors import CompileError, Diagnostic
from .inlining import MeetsItselfError, inline_meeting
from .lexer import Source
from .reflect import Signature
from .repair import compile_repaired
from .report import OWN
from .structure import read
from .toolchain import must, run, toolchain
from .translate import translate

PACKAGE = Path(__file__).resolve().parent

# Apple's headers are one here, part of every kernel: their names need only exist.
STANDARD_HEADERS = [
    "metal_stdlib",
    "metal_math",
    "metal_atomic",
    "metal_common",
    "metal_compute",
    "metal_config",
    "metal_geometric",
    "metal_integer",
    "metal_limits",
    "metal_logging",
    "metal_matrix",
    "metal_numeric",
    "metal_pack",
    "metal_packed",
    "metal_quadgroup",
    "metal_relational",
    "metal_simdgroup",
    "metal_simdgroup_matrix",
    "metal_type_traits",
    "metal_types",
    "metal_uniform",
    "metal_array",
    "simd/simd.h",
]

_PREPROCESS = (
    *("-E", "-x", "c++", "-std=c++17", "-nostdinc", "-undef", "-Wno-unknown-pragmas"),
    *("-D__METAL__=1", "-D__METAL_VERSION__=310", "-D__METAL_MACOS__=1", "-D__HAVE_BFLOAT__=1"),
    "-D__cpp_variable_templates=201304L",
    "-DMETAL_FUNC=inline __attribute__((always_inline))",
)
_FEATURES = (
    *("cl_khr_fp16", "__opencl_c_generic_address_space"),
    *("__cl_clang_bitfields", "__cl_clang_function_pointers"),
)
_LANGUAGE = (
    *("-x", "clcpp", "-cl-std=clc++2021", "-cl-no-stdinc", "-cl-single-precision-constant", "-fPIC"),
    # No other feature of OpenCL: no variables of a program, above all.
    *("-Xclang", f"-cl-ext=-all,{','.join(f'+{feature}' for feature in _FEATURES)}"),
    # Half and bfloat round after every operation; products and sums of one expression are fused, not more.
    *("-Xclang", "-fbfloat16-excess-precision=none", "-Xclang", "-ffloat16-excess-precision=none"),
    *("-ffp-contract=on", "-fno-math-errno", "-fno-exceptions", "-fno-stack-protector"),
    "-fdenormal-fp-math=dynamic,dynamic",  # a launch decides; the optimiser assumes nothing
    # The IR keeps device, constant, threadgroup and generic apart: instrument.py lives on it.
    *("-Xclang", "-ffake-address-space-map"),
    *("-O2", "-Xclang", "-disable-llvm-passes", "-gline-tables-only"),
    "-fdebug-compilation-dir=/-",  # nobody's folder: file names stay whole
    *("-Wno-unknown-attributes", "-Wno-ignored-attributes", "-Wno-unused", "-Wno-missing-prototypes"),
    *("-Wno-sync-alignment", "-Wno-atomic-alignment"),
    "-fdeclspec",  # properties: swizzles.py
)
_DIAGNOSTIC = re.compile(r"^(.*?):(\d+):(\d+): (fatal error|error|warning|note): (.*)$")


@dataclass(frozen=True)
class Unit:
    """A checked translation unit: its unoptimised IR and what it takes.

    Attributes:
        files: every file that was included.
        variables: names of the threadgroup variables, the first of which is number 1.
    """

    ir: str
    signature: Signature
    files: tuple[str, ...]
    variables: tuple[str, ...] = ()


def front_end(
    text: str,
    name: str,
    kernel: str | None,
    constants: Mapping[int | str, object],
    include_dirs: Sequence[str],
    defines: Mapping[str, object],
    prelude: str = "",
) -> Unit:
    """Everything up to IR, with all that Apple's compiler would refuse.

    Raises:
        CompileError: the source, at the user's own lines.
    """
    shown = Shown(name, text)
    whole = f'# 1 "<prelude>"\n{prelude}\n# 1 "{name}"\n{text}\n'
    preprocessed = preprocess(whole, name, include_dirs, defines, shown)
    source = Source(preprocessed)
    structure = read(source)
    refusals = strict.check_tokens(source, structure)
    if refusals:
        raise CompileError(name, [shown.complete(*refusal) for refusal in refusals])
    given = {c.name: constants.get(c.index, constants.get(c.name)) for c in structure.constants}
    signature = reflect.find(source, structure, kernel, {name: bool(value) for name, value in given.items()})
    translated = translate(source, structure, constants)
    command = [*toolchain().clang, *toolchain().target, *_LANGUAGE, *strict.WARNINGS]
    command += ["-include-pch", str(standard_library()), "-S", "-emit-llvm", "-", "-o", "-"]
    done = compile_repaired(
        lambda text, flags: run([*command, *flags], text), translated.text + reflect.entry(signature)
    )
    _refuse_diagnostics(name, done.stderr, done.returncode, shown)
    refused = strict_ir.check_ir(done.stdout)
    if refused:
        raise CompileError(name, [shown.complete(*refusal) for refusal in refused])
    files = tuple(_included(preprocessed, name))
    try:
        ir = inline_meeting(contraction.contract(probing(done.stdout)))
    except MeetsItselfError as error:
        message = "a function with a barrier or simdgroup operation must not call itself"
        raise CompileError(name, [shown.complete(*error.place, message)]) from None
    return Unit(ir, signature, files, translated.variables)


def probing(ir: str) -> str:
    """IR of which a frame larger than a page touches each of them, and so the guard below a thread's stack.

    What ``-fstack-clash-protection`` does, which the compiler has for Linux only.
    """
    return re.sub(r"^(attributes #\d+ = \{)", r'\1 "probe-stack"="inline-asm"', ir, flags=re.MULTILINE)


class Shown:
    """The lines of the source as the user wrote them, for error messages."""

    def __init__(self, name: str, text: str) -> None:
        self.files = {name: text.split("\n")}

    def complete(self, file: str, line: int, column: int, message: str) -> Diagnostic:
        if file not in self.files:
            try:
                self.files[file] = Path(file).read_text(errors="replace").split("\n")
            except OSError:
                self.files[file] = []
        lines = self.files[file]
        return Diagnostic(file, line, column, message, lines[line - 1] if 0 < line <= len(lines) else "")


def preprocess(
    text: str, name: str, include_dirs: Sequence[str], defines: Mapping[str, object], shown: Shown
) -> str:
    """The source with its includes and macros resolved."""
    folders = [f"-I{folder}" for folder in [standard_headers(), *include_dirs]]
    macros = [f"-D{macro}={value}" for macro, value in defines.items()]
    done = run([*toolchain().clang, *_PREPROCESS, *macros, *folders, "-"], text)
    _refuse_diagnostics(name, done.stderr, done.returncode, shown)
    return done.stdout


def _refuse_diagnostics(name: str, stderr: str, failed: int, shown: Shown) -> None:
    found: list[Diagnostic] = []
    for line in stderr.split("\n"):
        if match := _DIAGNOSTIC.match(line):
            file, at, column, severity, message = match.groups()
            if "error" in severity or (severity == "warning" and strict.is_refused(message)):
                found.append(shown.complete(file, int(at), int(column), strict.reword(message)))
            elif severity == "note" and found and found[-1].file.startswith(OWN) and not file.startswith(OWN):
                # An assertion of the library: what the user wrote is what led there.
                found[-1] = shown.complete(file, int(at), int(column), found[-1].message)
    if found:
        raise CompileError(name, list(dict.fromkeys(found)))
    if failed:
        raise RuntimeError(f"[emulator] the compiler failed on {name}:\n{stderr}")


def _included(preprocessed: str, name: str) -> list[str]:
    found = dict.fromkeys(re.findall(r'^# \d+ "([^"]+)"', preprocessed, re.MULTILINE))
    return [file for file in found if file != name and not file.startswith("<") and Path(file).is_file()]


def standard_headers() -> Path:
    def make(folder: Path) -> None:
        for header in STANDARD_HEADERS:
            (folder / header).parent.mkdir(exist_ok=True)
            (folder / header).touch()

    return cache.entry(f"headers-{cache.key('headers')}", make)


def standard_library() -> Path:
    """The precompiled standard library (msl/)."""

    def make(folder: Path) -> None:
        command = [*toolchain().clang, *toolchain().target, *_LANGUAGE]
        header, out = str(PACKAGE / "msl" / "library.h"), str(folder / "library.pch")
        # It names the headers it was made of; that they still are the same, the cache's key says. What it
        # uses of its own templates is instantiated here, and not again by every kernel: a fifth of a build.
        once = ("-Xclang", "-fno-pch-timestamp", "-fpch-instantiate-templates")
        must([*command, *once, "-Xclang", "-emit-pch", "-c", header, "-o", out])

    return cache.entry(f"library-{cache.key('library', PACKAGE)}", make) / "library.pch"


def optimise(ir: str, level: str) -> str:
    """The IR after the optimiser, as text."""
    command = [*toolchain().clang, *toolchain().target, level, "-x", "ir", "-fPIC", "-Wno-override-module"]
    no_vectors = ["-fno-vectorize", "-fno-slp-vectorize"]
    return must([*command, *no_vectors, "-S", "-emit-llvm", "-", "-o", "-"], ir)


def own_object(source: Path, out: Path) -> None:
    """Compiles a file of the emulator's own, which uses the standard library."""
    command = [*toolchain().clang, *toolchain().target, *_LANGUAGE]
    text = must([*command, "-S", "-emit-llvm", str(source), "-o", "-"])
    compile_ = [*toolchain().clang, *toolchain().target, "-x", "ir", "-fPIC", "-Wno-override-module", "-O2"]
    must([*compile_, "-c", "-", "-o", str(out)], contraction.contract(text))


def library(ir: str, out: Path, flags: Sequence[str], objects: Sequence[str] = ()) -> None:
    """Compiles IR, and links it with ``objects``, to the shared library ``out``."""
    command = [*toolchain().clang, *toolchain().target, "-x", "ir", "-fPIC", "-Wno-override-module", *flags]
    compiled = out.with_name(f"{out.name}.o")  # as unique as `out`
    try:
        must([*command, "-c", "-", "-o", str(compiled)], ir)
        must([*toolchain().link, str(compiled), *objects, "-o", str(out)])
    finally:
        compiled.unlink(missing_ok=True)
