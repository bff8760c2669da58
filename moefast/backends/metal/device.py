"""Whether there is anything to run Metal kernels on."""

from __future__ import annotations

import mlx.core as mx

from .launch import emulated


def probe() -> str | None:
    """Why the kernels cannot run in this process, or None."""
    if emulated():
        from ...emulator.errors import ToolchainError
        from ...emulator.toolchain import toolchain

        try:
            toolchain()
        except ToolchainError as error:
            return str(error)
        return None
    if not mx.metal.is_available():
        return "there is no Metal device (MOEFAST_METAL=emulate runs its kernels on a CPU, slowly)"
    return None


def here() -> str:
    """The device that problems must name: ``cpu`` in the emulator, whose arrays MLX keeps there."""
    return "cpu" if emulated() else "gpu"
