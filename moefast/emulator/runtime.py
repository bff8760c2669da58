"""The C++ runtime (runtime/): compiled once by the same compiler as the kernels, and loaded."""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from pathlib import Path

from . import abi, cache
from .toolchain import must, toolchain

_SOURCES = Path(__file__).resolve().parent / "runtime"
_SHARED = ("worker.cpp", "schedule.cpp", "context_switch.cpp", "math.cpp", "half.cpp")
_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-fno-exceptions", "-fno-rtti", "-fvisibility=hidden", "-nostdinc++")


def _make(folder: Path) -> None:
    compile_ = [*toolchain().cxx, *_FLAGS]
    shared = [str(_SOURCES / name) for name in _SHARED]
    libraries = ["-lm", "-lpthread"] + (["-ldl"] if sys.platform == "linux" else [])
    must([*compile_, "-shared", *shared, str(_SOURCES / "run.cpp"), *libraries, "-o", str(folder / "run.so")])
    check = [str(_SOURCES / name) for name in ("check.cpp", "shadow.cpp", "child.cpp")]
    # Kernels find the runtime's functions in the program that loads them.
    must([*compile_, "-rdynamic", *shared, *check, *libraries, "-o", str(folder / "child")])


def folder() -> Path:
    return cache.entry(f"runtime-{cache.key('runtime')}", _make)


def child() -> Path:
    """The program of check mode."""
    return folder() / "child"


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The runtime of run mode; kernels find its functions."""
    loaded = ctypes.CDLL(str(folder() / "run.so"), mode=ctypes.RTLD_GLOBAL)
    loaded.msl_run.argtypes = [ctypes.POINTER(abi.Launch), ctypes.POINTER(abi.Outcome)]
    loaded.msl_run.restype = ctypes.c_int
    for number, struct in enumerate(abi.SIZES):
        if loaded.msl_size_of(number) != ctypes.sizeof(struct):
            raise RuntimeError(f"[emulator] the runtime's {struct.__name__} is not abi.py's.")
    return loaded
