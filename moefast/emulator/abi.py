"""The structs of runtime/abi.h, check.h and child.cpp, for ctypes. Sizes are compared when the runtime is
loaded."""

from __future__ import annotations

import ctypes
from ctypes import Array, c_double, c_int32, c_int64, c_uint32, c_uint64

BUFFERS = 31
ARGUMENTS = 2 * BUFFERS
MOST_FINDINGS = 256
MOST_VARIABLES = 64  # of threadgroup memory; [[threadgroup(i)]] are numbered from here on

Three = c_uint32 * 3


class Launch(ctypes.Structure):
    _fields_ = [
        ("entry", c_uint64),
        ("arguments", c_uint64),
        ("seed", c_uint64),
        ("seconds", c_double),
        ("grid", Three),
        ("threadgroup", Three),
        ("threadgroup_bytes", c_uint32 * BUFFERS),
        ("shuffle", c_uint32),
        ("os_threads", c_uint32),
        ("meets", c_uint32),
        ("allow_equal_writes", c_uint32),
        ("flush", c_uint32),
    ]


class Counts(ctypes.Structure):
    _fields_ = [
        (name, c_uint64)
        for name in ("threads", "threadgroups", "barriers", "simd_barriers", "simd_operations", "multiplies")
    ]


class Outcome(ctypes.Structure):
    _fields_ = [
        ("detail", c_uint64),
        ("address", c_uint64),
        ("counts", Counts),
        ("status", c_uint32),
        ("thread", c_uint32),
        ("group", Three),
    ]


class BufferRequest(ctypes.Structure):
    _fields_ = [
        ("file_offset", c_uint64),
        ("bytes", c_uint64),
        ("index", c_int32),
        ("writable", c_uint32),
        ("initialised", c_uint32),
        ("reserved", c_uint32),
    ]


class BufferCounts(ctypes.Structure):
    _fields_ = [
        (name, c_uint64) for name in ("loaded", "stored", "loads", "stores", "atomics", "touched", "distinct")
    ]


class Finding(ctypes.Structure):
    _fields_ = [
        ("kind", c_uint32),
        ("site", c_uint32),
        ("other_site", c_uint32),
        ("count", c_uint32),
        ("thread", c_uint32),
        ("other_thread", c_uint32),
        ("group", Three),
        ("other_group", Three),
        ("buffer", c_int32),
        ("bytes", c_uint32),
        ("offset", c_int64),
        ("size", c_int64),
        ("detail", c_uint32),
        ("detail2", c_uint32),
    ]


class Request(ctypes.Structure):
    _fields_ = [
        ("launch", Launch),
        ("buffer_count", c_uint32),
        ("reserved", c_uint32),
        ("buffers", BufferRequest * BUFFERS),
        ("outcome", Outcome),
        ("counts", BufferCounts * BUFFERS),
        ("threadgroup_loaded", c_uint64),
        ("threadgroup_stored", c_uint64),
        ("atomics", c_uint64),
        ("finding_count", c_uint32),
        ("completed", c_uint32),
        ("findings", Finding * MOST_FINDINGS),
    ]


SIZES = (Launch, Outcome, Finding)

FINISHED, TIME_LIMIT, FAULT, THREADGROUP_BYTES, STACK = range(5)


def triple(values: Array[c_uint32]) -> tuple[int, int, int]:
    x, y, z = values
    return x, y, z
