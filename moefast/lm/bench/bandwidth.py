"""What this machine can do at most, measured: how fast it reads memory, which bounds a decode step that reads
every weight once, and how fast it multiplies, which bounds a prefill."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ...env import settings
from ...machine import cores
from ...registry import device_name

# Larger than the caches of one processor, as the weights of a model are; twice this is allocated.
_BYTES = 512 << 20
_RUNS = 3
# Still larger than the caches of most, and read in milliseconds.
_SMALL_BYTES = 64 << 20
# Seconds after which the threads that have read sleep, instead of waiting for more with a core of their own.
_REST = 1e-3


class Bandwidth(NamedTuple):
    """Gigabytes (10^9 bytes) per second, by what was done: ``copy, 2 threads`` or ``read, 1 thread``. A
    copy counts what it reads and what it writes."""

    figures: dict[str, float]

    @property
    def roof(self) -> float:
        """The highest figure for reading, which is what weights are: a copy may count more bytes per second,
        because it moves them both ways. On a GPU a copy is all that is measured."""
        reads = [gb_s for what, gb_s in self.figures.items() if what.startswith("read")]
        return max(reads or self.figures.values())

    def __str__(self) -> str:
        return "; ".join(f"{what}: {gb_s:.1f} GB/s" for what, gb_s in self.figures.items())


def measure_bandwidth(size: int = _BYTES, *, clock: Callable[[], float] = time.perf_counter) -> Bandwidth:
    """The best of a few runs over arrays of ``size`` bytes: on a GPU by MLX, on a CPU by NumPy with one
    thread, two, and one per core, and by the native kernels' own reading loop where they are built."""
    if device_name() == "gpu":
        return Bandwidth({"copy, GPU": _best(_gpu_copy(size), 2 * size, clock)})
    source = np.ones(size // 8, np.uint64)
    target = np.zeros_like(source)
    figures = {}
    for threads in sorted({1, 2, cores()}):
        bounds = np.linspace(0, source.size, threads + 1).astype(int)
        parts = [slice(a, b) for a, b in pairwise(bounds)]
        name = "1 thread" if threads == 1 else f"{threads} threads"
        with ThreadPoolExecutor(threads) as pool:

            def copy(pool: ThreadPoolExecutor = pool, parts: list[slice] = parts) -> None:
                list(pool.map(lambda part: np.copyto(target[part], source[part]), parts))

            def read(pool: ThreadPoolExecutor = pool, parts: list[slice] = parts) -> None:
                list(pool.map(lambda part: np.bitwise_or.reduce(source[part]), parts))

            figures[f"copy, {name}"] = _best(copy, 2 * size, clock)
            figures[f"read, {name}"] = _best(read, size, clock)
    engine = _engine()
    if engine is not None:
        for threads in sorted({1, engine.threads}):
            name = "1 thread" if threads == 1 else f"{threads} threads"
            figures[f"read, native, {name}"] = engine.measure_read(threads, size // threads) / 1e9
    return Bandwidth(figures)


def reader(size: int = _SMALL_BYTES) -> Callable[[], float] | None:
    """What reads memory as the native backend does, with as many threads, and says how fast: GB/s, the best
    of a few runs over ``size`` bytes. Short enough to be asked before every run of an operation, so that
    both are measured in the same moments of a machine that is shared. None where nothing native is built."""
    engine = None if device_name() == "gpu" else _engine()
    if engine is None:
        return None
    found = engine

    def read() -> float:
        gb_s: float = found.measure_read(found.threads, size // found.threads) / 1e9
        time.sleep(_REST)
        return gb_s

    return read


def measure_peak() -> dict[str, float]:
    """TFLOP/s (10^12) of the fastest multiply-adds of the native kernels' instruction set, by what was done;
    empty where they are not built or MLX computes on a GPU."""
    engine = None if device_name() == "gpu" else _engine()
    if engine is None:
        return {}
    return {
        f"{engine.isa}, {threads} thread{'s' * (threads > 1)}": engine.measure_flops(threads) / 1e12
        for threads in sorted({1, engine.threads})
    }


def _engine() -> Any:
    try:
        from ... import _kernels
    except ImportError:
        return None
    return _kernels.Engine(threads=settings.threads, isa=settings.isa)


def _gpu_copy(size: int) -> Callable[[], None]:
    source = mx.ones((size // 4,), mx.uint32)
    mx.eval(source)
    return lambda: mx.eval(source + 1)


def _best(run: Callable[[], None], moved: int, clock: Callable[[], float]) -> float:
    fastest = float("inf")
    for _ in range(_RUNS):
        start = clock()
        run()
        fastest = min(fastest, clock() - start)
    return moved / fastest / 1e9
