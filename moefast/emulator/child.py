"""Check mode's other process: a launch there, and what it found."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from . import abi, runtime
from .compile import Kernel

_PAGE = max(mmap.PAGESIZE, 16384)
_SHARED_MEMORY = Path("/dev/shm")


class CrashedError(Exception):
    """The process ended without results."""


def run(
    kernel: Kernel,
    launch: abi.Launch,
    arrays: Mapping[int, np.ndarray],
    uninitialised: Sequence[int],
) -> abi.Request:
    """Run ``launch`` in a child process; arrays that the kernel may write hold its results afterwards.

    Args:
        arrays: contiguous, by buffer index.
        uninitialised: indices whose contents nobody may read before writing them.

    Raises:
        subprocess.TimeoutExpired: it took longer than ``launch.seconds``.
        CrashedError: it could not even report what happened.
    """
    request = abi.Request(launch=launch, buffer_count=len(arrays))
    at = _round(ctypes.sizeof(request))
    parameters = kernel.signature.buffers
    for slot, (index, array) in enumerate(arrays.items()):
        writable = parameters[index].writable
        request.buffers[slot] = abi.BufferRequest(
            at, array.nbytes, index, writable, index not in uninitialised
        )
        at += _round(array.nbytes)
    folder = _SHARED_MEMORY if _room(at) else None
    with tempfile.NamedTemporaryFile(prefix="moefast-check-", dir=folder) as file:
        file.truncate(at)
        with mmap.mmap(file.fileno(), at) as memory:
            memory[: ctypes.sizeof(request)] = bytes(request)
            for slot, array in enumerate(arrays.values()):
                if array.nbytes:
                    view = np.frombuffer(memory, np.uint8, array.nbytes, request.buffers[slot].file_offset)
                    view[:] = array.reshape(-1).view(np.uint8)
                    del view
            done = subprocess.run(
                [str(runtime.child()), str(kernel.check_library), file.name],
                capture_output=True,
                text=True,
                timeout=launch.seconds,
            )
            result = abi.Request.from_buffer_copy(memory)
            for slot, (index, array) in enumerate(arrays.items()):
                if array.nbytes and parameters[index].writable:
                    start = request.buffers[slot].file_offset
                    array.reshape(-1).view(np.uint8)[:] = np.frombuffer(memory, np.uint8, array.nbytes, start)
    if done.returncode and result.outcome.status not in (abi.FAULT, abi.STACK):
        raise CrashedError(done.stderr.strip() or f"exit status {done.returncode}")
    return result


def _round(size: int) -> int:
    return (size + _PAGE - 1) // _PAGE * _PAGE


def _room(size: int) -> bool:
    """Whether the file can live in memory."""
    try:
        status = os.statvfs(_SHARED_MEMORY)
    except OSError:
        return False
    return status.f_bavail * status.f_frsize > 2 * size and os.access(_SHARED_MEMORY, os.W_OK)
