"""Metal kernels on a CPU: run them, check them for memory and synchronisation errors, count what they move.

``metal_kernel`` is the twin of ``mx.fast.metal_kernel``; ``compile`` and ``launch`` take plain Metal sources.
What it
does, how, and where it differs from a GPU: docs/emulator.md.
"""

from .compile import Kernel, compile
from .counters import BufferCounters, Counters
from .errors import CompileError, Diagnostic, EmulatorError, ToolchainError
from .launch import Mode, Output, Result, launch
from .metal_kernel import MetalKernel, metal_kernel, mlx_include_dir
from .report import KINDS, Finding, Place

__all__ = [
    "KINDS",
    "BufferCounters",
    "CompileError",
    "Counters",
    "Diagnostic",
    "EmulatorError",
    "Finding",
    "Kernel",
    "MetalKernel",
    "Mode",
    "Output",
    "Place",
    "Result",
    "ToolchainError",
    "compile",
    "launch",
    "metal_kernel",
    "mlx_include_dir",
]
