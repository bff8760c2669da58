"""Launching a compiled kernel, in run mode or in check mode."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from . import abi, child, runtime
from .compile import Kernel
from .counters import BufferCounters, Counters
from .errors import EmulatorError
from .report import Finding, Reader

Mode = Literal["run", "check"]
Denormals = Literal["keep", "flush"]
_UNWRITTEN = 0xCB  # what an output holds that nobody wrote


@dataclass(frozen=True)
class Output:
    """A buffer the launch allocates; reading it before it is written is a finding."""

    shape: tuple[int, ...]
    dtype: npt.DTypeLike


@dataclass(frozen=True)
class Result:
    """What a launch left behind.

    Attributes:
        buffers: every array by its index; those given are written in place, those asked for with ``Output``
            are new.
        findings: in check mode, if they were asked for as data; empty if all is well.
        counters: of the launch; memory is counted in check mode only.
        seconds: the kernel's own time, without building and, in check mode, with starting a process.
    """

    buffers: dict[int, np.ndarray]
    findings: tuple[Finding, ...]
    counters: Counters
    seconds: float


@dataclass
class _Prepared:
    arrays: dict[int, np.ndarray] = field(default_factory=dict)
    uninitialised: list[int] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)


def launch(
    kernel: Kernel,
    buffers: Mapping[int, np.ndarray | Output] | Sequence[np.ndarray | Output],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    *,
    mode: Mode = "run",
    threadgroup_bytes: Mapping[int, int] | None = None,
    raises: bool = True,
    seed: int | None = None,
    allow_equal_writes: bool = False,
    time_limit: float = 60.0,
    threads: int | None = None,
    denormals: Denormals = "keep",
) -> Result:
    """Run a kernel over a grid of threads.

    Args:
        buffers: C-contiguous arrays by ``[[buffer(i)]]``, or in that order. Those the kernel declares
            writable are
            written in place. bfloat has no NumPy dtype: pass uint16.
        grid: threads in x, y, z.
        threadgroup: threads of a threadgroup in x, y, z; larger than the grid, it is clamped to it.
        mode: ``run``: fast, unchecked, in this process. ``check``: in a child process, every access watched.
        threadgroup_bytes: sizes of ``[[threadgroup(i)]]`` arguments.
        raises: raise what check mode finds; False: give it back as ``Result.findings``.
        seed: check mode: run threadgroups and simdgroups in the random order of this seed; None: in order.
        allow_equal_writes: check mode: unordered writes of the same bytes are no findings
            (``device-equal-writes``, ``threadgroup-equal-writes``).
        time_limit: seconds.
        threads: OS threads of run mode; None: one for each core.
        denormals: ``keep`` them, as IEEE 754 has it, or ``flush`` those of float and bfloat to zero: as
            arguments and results of arithmetic, comparisons and functions, not where values are only moved.

    Raises:
        ValueError: buffers or sizes do not fit the kernel.
        EmulatorError: check mode found something, or the kernel crashed, hung or cannot be launched.
    """
    if mode not in ("run", "check"):
        raise ValueError(f"[launch] mode must be 'run' or 'check', got {mode!r}.")
    if denormals not in ("keep", "flush"):
        raise ValueError(f"[launch] denormals must be 'keep' or 'flush', got {denormals!r}.")
    prepared = _prepare(kernel, buffers)
    request = _request(kernel, grid, threadgroup, threadgroup_bytes or {}, time_limit)
    request.flush = denormals == "flush"
    size, most = tuple(request.threadgroup), kernel.signature.most_threads
    if math.prod(size) > most:
        message = f"{'x'.join(map(str, size))} threads in a threadgroup, more than {most}"
        raise EmulatorError(kernel.name, [Finding("too-many-threads", message)])
    if min(grid) == 0:
        return Result(prepared.arrays, (), _counters(abi.Outcome(), None, prepared.names), 0.0)
    start = time.perf_counter()
    if mode == "run":
        request.os_threads = threads or _cores()
        outcome, findings, raw = _run(kernel, request, prepared)
    else:
        request.shuffle, request.seed = seed is not None, seed or 0
        request.allow_equal_writes = allow_equal_writes
        outcome, findings, raw = _check(kernel, request, prepared)
    seconds = time.perf_counter() - start
    # A launch that did not finish has no result that could be given back.
    if findings and (raises or outcome.status != abi.FINISHED):
        raise EmulatorError(kernel.name, findings)
    return Result(prepared.arrays, tuple(findings), _counters(outcome, raw, prepared.names), seconds)


def _cores() -> int:
    """What this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _prepare(
    kernel: Kernel, buffers: Mapping[int, np.ndarray | Output] | Sequence[np.ndarray | Output]
) -> _Prepared:
    given = dict(buffers) if isinstance(buffers, Mapping) else dict(enumerate(buffers))
    wanted = kernel.signature.buffers
    if missing := sorted(set(wanted) - set(given)):
        names = ", ".join(f"{i} ({wanted[i].name})" for i in missing)
        raise ValueError(f"[launch] {kernel.name} needs buffers {names}, got {sorted(given)}.")
    out = _Prepared(names={i: p.name for i, p in wanted.items()})
    for index in sorted(wanted):
        value = given[index]
        if isinstance(value, Output):
            array = np.empty(value.shape, value.dtype)
            array.reshape(-1).view(np.uint8)[:] = _UNWRITTEN
            out.uninitialised.append(index)
        else:
            array = value
            _check_array(kernel, index, array)
        out.arrays[index] = array
    return out


def _check_array(kernel: Kernel, index: int, array: np.ndarray) -> None:
    what = f"buffer {index} ({kernel.signature.buffers[index].name}) of {kernel.name}"
    if not isinstance(array, np.ndarray):
        raise ValueError(f"[launch] {what} must be a NumPy array or an Output, got {type(array).__name__}.")
    if not array.flags.c_contiguous:
        raise ValueError(f"[launch] {what} must be C-contiguous, got strides {array.strides}.")
    if kernel.signature.buffers[index].writable and not array.flags.writeable:
        raise ValueError(f"[launch] {what} must be writeable: the kernel declares it without const.")


def _request(
    kernel: Kernel,
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    threadgroup_bytes: Mapping[int, int],
    time_limit: float,
) -> abi.Launch:
    for name, sizes, least in (("grid", grid, 0), ("threadgroup", threadgroup, 1)):
        if len(sizes) != 3 or min(sizes) < least or max(sizes) > 0xFFFFFFFF:
            raise ValueError(f"[launch] {name} must be three sizes of at least {least}, got {tuple(sizes)}.")
    if missing := sorted(set(kernel.signature.threadgroup) - set(threadgroup_bytes)):
        raise ValueError(
            f"[launch] {kernel.name} needs threadgroup_bytes of {missing}, got {dict(threadgroup_bytes)}."
        )
    request = abi.Launch(seconds=time_limit, meets=kernel.meets)
    request.grid = abi.Three(*grid)
    request.threadgroup = abi.Three(*(max(1, min(t, g)) for t, g in zip(threadgroup, grid, strict=True)))
    for index, size in threadgroup_bytes.items():
        request.threadgroup_bytes[index] = size
    return request


_Ran = tuple[abi.Outcome, list[Finding], "abi.Request | None"]


def _run(kernel: Kernel, request: abi.Launch, prepared: _Prepared) -> _Ran:
    arguments = (ctypes.c_void_p * abi.ARGUMENTS)()
    for index, array in prepared.arrays.items():
        arguments[index] = array.ctypes.data
    request.entry = kernel.entry
    request.arguments = ctypes.addressof(arguments)
    outcome = abi.Outcome()
    if runtime.library().msl_run(ctypes.byref(request), ctypes.byref(outcome)):
        raise RuntimeError("[launch] the operating system gives no threads.")
    return outcome, _failure(outcome, request), None


def _check(kernel: Kernel, request: abi.Launch, prepared: _Prepared) -> _Ran:
    try:
        raw = child.run(kernel, request, prepared.arrays, prepared.uninitialised)
    except subprocess.TimeoutExpired:
        outcome = abi.Outcome(status=abi.TIME_LIMIT)
        return outcome, _failure(outcome, request), None
    except child.CrashedError as error:
        outcome = abi.Outcome(status=abi.FAULT)
        return outcome, [Finding("crash", f"the kernel's process ended: {error}")], None
    arguments = {index: p.name for index, p in kernel.signature.threadgroup.items()}
    reader = Reader(kernel.sites, prepared.names, kernel.variables, arguments)
    findings = [reader.read(found) for found in raw.findings[: raw.finding_count]]
    return raw.outcome, [*findings, *_failure(raw.outcome, request)], raw


def _failure(outcome: abi.Outcome, request: abi.Launch) -> list[Finding]:
    """Why a launch did not finish."""
    group = abi.triple(outcome.group)
    if outcome.status == abi.TIME_LIMIT:
        message = f"the kernel ran longer than its {request.seconds:g} s"
        return [Finding("time-limit", message, thread=outcome.thread, threadgroup=group)]
    if outcome.status == abi.THREADGROUP_BYTES:
        message = f"the kernel needs {outcome.detail} bytes of threadgroup memory, more than 32768"
        return [Finding("threadgroup-memory", message)]
    if outcome.status == abi.STACK:
        message = (
            f"thread {outcome.thread} of threadgroup {group}: more than {outcome.detail} bytes of variables"
        )
        return [Finding("crash", message, thread=outcome.thread, threadgroup=group)]
    if outcome.status == abi.FAULT:
        name = signal.Signals(outcome.detail).name if outcome.detail else "a signal"
        what = "integer division by zero" if name == "SIGFPE" else f"{name} at address {outcome.address:#x}"
        message = f"thread {outcome.thread} of threadgroup {group}: {what}"
        return [Finding("crash", message, thread=outcome.thread, threadgroup=group)]
    return []


def _counters(outcome: abi.Outcome, raw: abi.Request | None, names: Mapping[int, str]) -> Counters:
    buffers = {}
    if raw is not None:
        for slot in range(raw.buffer_count):
            c = raw.counts[slot]
            name = names[raw.buffers[slot].index]
            buffers[name] = BufferCounters(
                c.loaded, c.stored, c.loads, c.stores, c.atomics, c.touched, c.distinct
            )
    counts = outcome.counts
    return Counters(
        buffers=buffers,
        threadgroup_loaded=raw.threadgroup_loaded if raw else 0,
        threadgroup_stored=raw.threadgroup_stored if raw else 0,
        threads=counts.threads,
        threadgroups=counts.threadgroups,
        barriers=counts.barriers,
        simd_barriers=counts.simd_barriers,
        simd_operations=counts.simd_operations,
        multiplies=counts.multiplies,
        atomics=raw.atomics if raw else 0,
    )
