"""Metal kernels in the tests: emulated, checked, and with threads in an order drawn from a seed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import pytest

from moefast.backends import registry
from moefast.backends.metal import METAL, METAL_FAST, launch
from moefast.env import settings

needs_emulator = pytest.mark.skipif(
    find_spec("ziglang") is None and not settings.clang, reason="needs the compiler of moefast[emulator]"
)


@contextmanager
def emulated(*, check: bool = True, seed: int | None = 0) -> Iterator[list[launch.Launch]]:
    """Within the block ``metal`` and ``metal-fast`` run in the emulator; gives every launch, with its
    counters.

    With ``check`` any finding raises ``EmulatorError``; threads run in an order drawn from ``seed``.
    """
    former = METAL.unavailable
    for backend in (METAL, METAL_FAST):
        backend.__dict__["unavailable"] = None
    try:
        with (
            launch.emulation("check" if check else "run", seed if check else None),
            launch.recorded() as made,
        ):
            yield made
    finally:
        for backend in (METAL, METAL_FAST):
            backend.__dict__["unavailable"] = former
        for key, choice in list(registry._choices.items()):
            if choice.backend.startswith("metal"):
                del registry._choices[key]
