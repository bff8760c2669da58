"""What a launch moved: the proof of a kernel's memory traffic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class BufferCounters:
    """Traffic of one buffer, in bytes as the lanes ask for them.

    Attributes:
        loaded, stored: bytes, each access counted.
        loads, stores, atomics: accesses; the bytes of atomic ones are in neither of the above.
        unique: bytes of the buffer that any thread touched.
        per_threadgroup: bytes distinct within each threadgroup, summed over threadgroups.
    """

    loaded: int
    stored: int
    loads: int
    stores: int
    atomics: int
    unique: int
    per_threadgroup: int


@dataclass(frozen=True)
class Counters:
    """Of one launch. Simd operations and matrix products count once for each simdgroup that executes them.

    Attributes:
        buffers: by name; empty in run mode, which does not look at memory.
        threadgroup_loaded, threadgroup_stored: bytes; 0 in run mode.
        barriers: of threadgroups; simd_barriers: of simdgroups.
        multiplies: products of 8x8 matrices.
        atomics: atomic operations on any memory; 0 in run mode.
    """

    buffers: Mapping[str, BufferCounters]
    threadgroup_loaded: int
    threadgroup_stored: int
    threads: int
    threadgroups: int
    barriers: int
    simd_barriers: int
    simd_operations: int
    multiplies: int
    atomics: int

    @property
    def loaded(self) -> int:
        """Device bytes loaded, of all buffers."""
        return sum(buffer.loaded for buffer in self.buffers.values())

    @property
    def stored(self) -> int:
        """Device bytes stored, of all buffers."""
        return sum(buffer.stored for buffer in self.buffers.values())

    def data(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)
