"""How long the Metal emulator takes: to build a kernel, to find it again, to run it, to check it.

    .venv/bin/python benchmarks/emulator.py

The kernel is MLX's own gathered mat-vec (4 bits in groups of 64, K=2048, N=1408, four experts), on one core.
A figure is a median; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from mlx_quantized import gather_qmv

from moefast import emulator
from moefast.emulator import pipeline, runtime

# Milliseconds.
LIMITS = {"build": 1000.0, "cached": 20.0, "run": 30.0, "check": 200.0}


def times(make: Callable[[], None], repeats: int) -> list[float]:
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        make()
        found.append((time.perf_counter() - start) * 1e3)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    mx.set_default_device(mx.cpu)
    case = gather_qmv("float", 4, "affine", 1408, 2048)
    kernel = case.kernel()
    runtime.library()
    pipeline.standard_library()

    def build() -> None:
        # A new name is a new kernel to the cache.
        made = emulator.compile(
            f"// {uuid.uuid4()}\n" + case.source(),
            "k",
            include_dirs=[emulator.mlx_include_dir()],
        )
        assert made.entry  # what run mode calls: compiled, linked and loaded

    def find() -> None:
        case.kernel()

    def launch(mode: str) -> list[float]:
        case.launch(kernel, mode=mode, threads=1)  # builds, loads
        return [case.launch(kernel, mode=mode, threads=1)[0].seconds * 1e3 for _ in range(repeats)]

    measured = {
        "build": times(build, repeats),
        "cached": times(find, repeats),
        "run": launch("run"),
        "check": launch("check"),
    }
    for name, found in measured.items():
        median, limit = statistics.median(found), LIMITS[name]
        verdict = "ok" if median < limit else "OVER"
        print(
            f"{name:7} {median:8.2f} ms  {min(found):8.2f} to {max(found):8.2f}, limit {limit:4.0f} {verdict}"
        )
    medians = {name: round(statistics.median(found), 3) for name, found in measured.items()}
    print(
        json.dumps(
            {"machine": platform.processor() or platform.machine(), "mlx": mx.__version__, "ms": medians}
        )
    )
    return int(any(medians[name] > limit for name, limit in LIMITS.items()))


if __name__ == "__main__":
    sys.exit(main())
