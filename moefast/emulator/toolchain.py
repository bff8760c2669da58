"""The C++ compiler: where it is, and how it is called.

By default the one of the wheel ``ziglang``, which needs nothing else on the machine; ``MOEFAST_CLANG`` names
another clang, 19 or newer (older ones have no bfloat arithmetic).
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..env import settings
from .errors import ToolchainError

_OLDEST = 19
_MACHINES = {"x86_64": "x86_64", "amd64": "x86_64", "arm64": "aarch64", "aarch64": "aarch64"}


@dataclass(frozen=True)
class Toolchain:
    """Commands, without arguments, and the flags that name the host.

    Attributes:
        clang: the compiler driver, for kernels.
        cxx: for the runtime: finds system headers and links programs.
        link: makes a shared library of one object file.
        target: flags of ``clang``.
        identity: changes whenever the compiler does.
    """

    clang: tuple[str, ...]
    cxx: tuple[str, ...]
    link: tuple[str, ...]
    target: tuple[str, ...]
    identity: str


@lru_cache(maxsize=1)
def toolchain() -> Toolchain:
    """The compiler to use.

    Raises:
        ToolchainError: there is none, it is too old, or the machine is neither x86-64 nor arm64.
    """
    machine = _MACHINES.get(platform.machine().lower())
    if machine is None or sys.platform not in ("linux", "darwin"):
        raise ToolchainError(
            "[emulator] the host must be Linux or macOS on x86-64 or arm64, "
            f"got {sys.platform} on {platform.machine()}."
        )
    # A fixed instruction set: the same code, hence the same numbers, on every host. It must have fused
    # multiply-add, or contraction would go unseen.
    features = ("-march=x86-64-v3",) if machine == "x86_64" else ()
    if settings.clang:
        return _system_clang(settings.clang, features)
    return _zig(machine, features)


def _zig(machine: str, features: tuple[str, ...]) -> Toolchain:
    try:
        import ziglang
    except ImportError:
        raise ToolchainError(
            "[emulator] a C++ compiler is needed: pip install 'moefast[emulator]' "
            f"(or set MOEFAST_CLANG to a clang >= {_OLDEST})."
        ) from None
    zig = Path(ziglang.__file__).resolve().parent / "zig"
    linux = sys.platform == "linux"
    triple = f"{machine}-linux-gnu" if linux else f"{machine}-macos"
    cpu = ("-mcpu=x86_64_v3",) if machine == "x86_64" else ()
    cxx = (str(zig), "cc", "-target", triple, *cpu, "-fno-sanitize=all")
    link = (str(zig), "ld.lld", "-shared") if linux else (*cxx, "-shared", "-undefined", "dynamic_lookup")
    return Toolchain((str(zig), "clang"), cxx, link, ("-target", triple, *features), _identity(zig))


def _system_clang(program: str, features: tuple[str, ...]) -> Toolchain:
    try:
        version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise ToolchainError(
            f"[emulator] MOEFAST_CLANG must be a clang >= {_OLDEST}, got {program!r}: {error}."
        ) from None
    found = re.search(r"clang version (\d+)", version)
    if not found or int(found[1]) < _OLDEST:
        first_line = version.partition("\n")[0]
        raise ToolchainError(f"[emulator] MOEFAST_CLANG must be a clang >= {_OLDEST}, got {first_line!r}.")
    # macOS's linker insists on the system's library.
    rest = ("-nostdlib",) if sys.platform == "linux" else ("-undefined", "dynamic_lookup")
    link = (program, "-shared", *rest)
    return Toolchain((program,), (program, *features), link, features, program + version)


def _identity(program: Path) -> str:
    status = program.stat()
    return f"{program}:{status.st_size}:{status.st_mtime_ns}"


def run(command: Sequence[str], text: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a compiler, ``text`` on its standard input."""
    return subprocess.run(
        command,
        input=text,
        stdin=subprocess.DEVNULL if text is None else None,
        capture_output=True,
        text=True,
    )


def must(command: Sequence[str], text: str | None = None) -> str:
    """As ``run``; its output.

    Raises:
        RuntimeError: it failed, on input of the emulator's own making.
    """
    done = run(command, text)
    if done.returncode:
        raise RuntimeError(f"[emulator] {' '.join(command)} failed:\n{done.stderr}")
    return done.stdout
