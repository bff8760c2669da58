"""What is compiled for new CPUs stays where only they get to it.

The linker keeps one copy of an inline function, whoever brought it, and what runs when a library is loaded
runs everywhere. So nothing that other objects could use may come out of the objects of an instruction set,
and none of its instructions may be in the others.
"""

from __future__ import annotations

import json
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import cpp_build
import pytest

# What a line of a disassembly has where the oldest CPU of an architecture cannot run it.
NEWER = {
    "x86_64": re.compile(
        r"%[yz]mm|%tmm|%k[0-7]|\t(?!ver[rw]\b)v[a-z]"  # AVX and later; VERR and VERW are older
        r"|\t(ldtilecfg|sttilecfg|tile[a-z]+|tdp[a-z0-9]+)\b"
        # TZCNT is not among them: older CPUs run it as BSF, which is how compilers mean it.
        r"|\t(andn|bextr|bls(i|r|msk)|bzhi|lzcnt|movbe|mulx|pdep|pext|popcnt|rorx|sarx|shlx|shrx)[lqw]?\b"
    ),
    "aarch64": re.compile(
        r"\t([us]|us|su)dot\t|\t([us]|us|bf)mmla\t|\tbf(cvt|dot|ml)\w*\t"
        r"|\tf\w+\tv\d+\.[48]h, v\d+\.[48]h"  # arithmetic in float16
    ),
}
# A compiler's options that let it use more than the oldest CPU has.
SPECIAL = ("-march=", "-mcpu=", "-mavx", "-mfma", "-mf16c", "-mamx", "-mbmi", "-msse4")


def newer_instructions(listing: str, architecture: str) -> Iterator[str]:
    """Functions of a disassembly, each with its first instruction that is not for every CPU."""
    function, found = "?", False
    for line in listing.splitlines():
        if head := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            function, found = head[1], False
        elif not found and NEWER[architecture].search(line):
            found = True
            yield f"{function}: {' '.join(line.split()[1:])}"


def shared(symbols: str) -> Iterator[str]:
    """Functions of a list of symbols that the linker may take for another object's, too."""
    for line in symbols.splitlines():
        entry = re.match(r"(.*) W [0-9a-f]", line)  # weak, and no variable: inline, or of a template
        if entry:
            yield entry[1]


def objdump(*arguments: str | Path) -> str:
    return cpp_build.run(tool("objdump"), *arguments)


def tool(name: str) -> str:
    if path := shutil.which(name):
        return path
    pytest.skip(f"{name} (GNU binutils) is not installed")


def generic_problems(file: Path, architecture: str) -> list[str]:
    """What an object for all CPUs must not have."""
    listing = objdump("--disassemble", "--no-show-raw-insn", "--demangle", file)
    return [f"{file.name}: {problem}" for problem in newer_instructions(listing, architecture)]


def isa_problems(file: Path) -> list[str]:
    """What an object of an instruction set must not have."""
    symbols = cpp_build.run(tool("nm"), "--defined-only", "--demangle", "--format=posix", file)
    problems = [f"{file.name}: {name} may replace another object's" for name in shared(symbols)]
    if re.search(r"\s\.(init_array|ctors|preinit_array)", objdump("--section-headers", file)):
        problems.append(f"{file.name}: some of it runs when the library is loaded")
    return problems


# -- this build --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def architecture() -> str:
    cpp_build.cache()  # or skips
    if sys.platform != "linux" or platform.machine() not in NEWER:
        pytest.skip(f"knows no objects of {sys.platform} on {platform.machine()}")
    return platform.machine()


@pytest.fixture(scope="module")
def objects(architecture: str) -> dict[Path, bool]:
    """The objects of the Python modules; whether each is compiled for a particular instruction set."""
    commands = json.loads((cpp_build.FOLDER / "compile_commands.json").read_text())
    return {
        cpp_build.FOLDER / entry["output"]: any(
            option.startswith(SPECIAL) for option in shlex.split(entry["command"])
        )
        for entry in commands
        if "csrc/tests" not in entry["file"]
    }


def test_code_for_all_cpus_runs_on_all(objects: dict[Path, bool], architecture: str) -> None:
    generic = [file for file, special in objects.items() if not special]
    assert {"isa.cpp.o", "isa_portable.cpp.o", "ffn.cpp.o"} <= {file.name for file in generic}
    assert [problem for file in generic for problem in generic_problems(file, architecture)] == []


def test_code_for_one_instruction_set_is_its_own(objects: dict[Path, bool], architecture: str) -> None:
    special = [file for file, special in objects.items() if special]
    assert {file.name for file in special} >= {
        "x86_64": {"isa_avx2.cpp.o", "isa_avx512.cpp.o", "isa_amx.cpp.o"},
        "aarch64": {"isa_neon.cpp.o"},
    }[architecture]
    assert [problem for file in special for problem in isa_problems(file)] == []


# -- the checks find what they are for ---------------------------------------------------------------------

INSTRUCTIONS = {
    "x86_64": [
        "vaddps %ymm0, %ymm1, %ymm2",
        "vmovss %xmm0, %xmm1, %xmm2",
        "vpxord %zmm16, %zmm17, %zmm18",
        "kmovw %eax, %k1",
        "ldtilecfg (%rax)",
        "tilerelease",
        "tdpbf16ps %tmm0, %tmm1, %tmm2",
        "andn %eax, %ecx, %edx",
        "lzcnt %rax, %rcx",
    ],
    "aarch64": [
        "sdot v0.4s, v1.16b, v2.16b",
        "usdot v0.4s, v1.16b, v2.16b",
        "smmla v0.4s, v1.16b, v2.16b",
        "fmla v0.8h, v1.8h, v2.8h",
    ],
}


def compiled(source: str, folder: Path) -> Path:
    file = folder / "planted.cpp"
    file.write_text(source)
    made = folder / "planted.o"
    cpp_build.run(cpp_build.cache()["CMAKE_CXX_COMPILER"], "-fPIC", "-c", file, "-o", made)
    return made


def test_an_instruction_for_some_cpus_is_found(architecture: str, tmp_path: Path) -> None:
    enable = '".arch armv8.2-a+dotprod+i8mm+fp16\\n"' if architecture == "aarch64" else ""
    for instruction in INSTRUCTIONS[architecture]:
        text = instruction.replace("%", "%%")
        (problem,) = generic_problems(
            compiled(f'void planted() {{ asm volatile({enable} "{text}" ::); }}', tmp_path), architecture
        )
        assert re.match(rf"planted.o: planted\(\): {instruction.split()[0]}", problem)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("inline int planted() { return 1; } int (*call())() { return planted; }", "planted() may replace"),
        ("template <class T> T planted(T x) { return x; } int call() { return planted(1); }", "may replace"),
        ("struct S { S(); }; S made;", "runs when the library is loaded"),
    ],
)
def test_what_others_could_run_is_found(source: str, message: str, architecture: str, tmp_path: Path) -> None:
    (problem,) = isa_problems(compiled(source, tmp_path))
    assert message in problem


def test_what_is_in_order_passes(architecture: str, tmp_path: Path) -> None:
    source = """
        namespace { template <class T> T twice(T x) { return x + x; } struct S { int i = 1; } kept; }
        float planted(float x) { return twice(x) + kept.i; }
    """
    file = compiled(source, tmp_path)
    assert isa_problems(file) == generic_problems(file, architecture) == []
