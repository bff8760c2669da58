"""The kernels of ``kernels/``, on an Apple GPU through ``mx.fast.metal_kernel``: no build step, a stock MLX.

Where there is no such GPU, ``MOEFAST_METAL=emulate`` runs the same sources in :mod:`moefast.emulator`,
eagerly: to test and to debug them, not to be fast.

==================  ==========================================================
:mod:`.source`      a file of ``kernels/`` as one text
:mod:`.launch`      how a kernel is launched, there or in the emulator
:mod:`.device`      whether there is anything to run on
:mod:`.operands`    weights as the kernels take them
==================  ==========================================================
"""

from __future__ import annotations

from ...registry import Backend, Kernel
from .device import probe

_KERNELS: dict[str, Kernel] = {}

METAL = Backend(name="metal", kernels=_KERNELS, probe=probe)

__all__ = ["METAL"]
