"""Every environment variable moefast reads, in one place.

======================  =================================================================================
``MOEFAST``             ``0``, false, no or off: :func:`moefast.accelerate` does nothing
``MOEFAST_BACKEND``     default backend: ``auto`` (fastest available), or a name of
                        ``moefast.backends()``
``MOEFAST_CACHE``       folder of what the Metal emulator compiles, and of what ``moefast doctor`` found
                        out of this machine's GPU; by default in the user's cache folder
``MOEFAST_CLANG``       clang (19 or newer) of the Metal emulator; by default the one of the wheel
                        ``ziglang``
``MOEFAST_HUGE_PAGES``  ``0``, false, no or off: :func:`moefast.huge_pages` moves nothing
``MOEFAST_ISA``         instruction set of the native backend, one of ``ISAS``; by default the best there
                        is
``MOEFAST_LOG``         ``1``, true, yes or on: log which kernel each operation chose and why others
                        refused
``MOEFAST_METAL``       ``emulate``: run Metal kernels on the CPU, through the emulator; by default on a
                        GPU only
``MOEFAST_REPLAY``      ``0``, false, no or off: every decoding step is made by the model's Python
``MOEFAST_THREADS``     threads of the native backend; 0, the default: one per usable core
======================  =================================================================================

They are read once, when moefast is imported.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .errors import refuse

# What csrc/cpu/isa.cpp knows. Which of them this machine runs, `moefast doctor` tells.
ISAS = ("amx", "avx512", "avx2", "neon", "portable")

_MOST_THREADS = 1024

_ON, _OFF = ("1", "true", "yes", "on"), ("0", "false", "no", "off", "")


@dataclass(frozen=True)
class Settings:
    """The environment, parsed."""

    backend: str = "auto"
    cache: str = ""
    clang: str = ""
    enabled: bool = True
    huge_pages: bool = True
    isa: str = ""
    log: bool = False
    metal: str = ""
    replay: bool = True
    threads: int = 0

    @staticmethod
    def variable(field: str) -> str:
        """The name of the variable that sets a field."""
        return "MOEFAST" if field == "enabled" else f"MOEFAST_{field.upper()}"

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Settings:
        """Parse ``environ``. Raises ValueError naming the variable."""
        isa = environ.get("MOEFAST_ISA", "")
        if isa and isa not in ISAS:
            refuse("env", f"MOEFAST_ISA must be one of {ISAS}", repr(isa))
        metal = environ.get("MOEFAST_METAL", "")
        if metal not in ("", "emulate"):
            refuse("env", "MOEFAST_METAL must be 'emulate' or empty", repr(metal))
        threads = environ.get("MOEFAST_THREADS", "") or "0"
        if not threads.isdecimal() or int(threads) > _MOST_THREADS:
            refuse("env", f"MOEFAST_THREADS must be in 0..{_MOST_THREADS}", repr(threads))
        return cls(
            backend=environ.get("MOEFAST_BACKEND", "") or "auto",
            cache=environ.get("MOEFAST_CACHE", ""),
            clang=environ.get("MOEFAST_CLANG", ""),
            enabled=_switch(environ, "MOEFAST", default="1"),
            huge_pages=_switch(environ, "MOEFAST_HUGE_PAGES", default="1"),
            isa=isa,
            log=_switch(environ, "MOEFAST_LOG", default="0"),
            metal=metal,
            replay=_switch(environ, "MOEFAST_REPLAY", default="1"),
            threads=int(threads),
        )


def _switch(environ: Mapping[str, str], name: str, *, default: str) -> bool:
    """Whether a variable says on; empty is unset."""
    word = environ.get(name, "").lower() or default
    if word not in (*_ON, *_OFF):
        refuse("env", f"{name} must be one of {(*_ON, *_OFF)}", repr(word))
    return word in _ON


settings = Settings.read(os.environ)


def environment_of_child(**changes: str) -> dict[str, str]:
    """This process's environment, changed, for one that it starts."""
    return {**os.environ, **changes}


def cache_folder(part: str) -> Path:
    """Where ``part`` of moefast keeps what may be deleted at any time. It need not exist."""
    if settings.cache:
        return Path(settings.cache)
    caches = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return caches / "moefast" / part
