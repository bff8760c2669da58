"""``moefast tune``: what holds for a machine rather than for a kind of layer: how many threads the native
backend uses, and from where on the metal backend takes which kernels.

The pool of threads has a fixed size, so each number is measured in a process of its own.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn

from ..acceleration import restore
from ..acceleration.look import activation_dtype
from ..backends import native, registry
from ..backends.metal import dispatch
from ..env import environment_of_child
from ..errors import refuse
from .load import folder_of
from .tune import ROUNDS, TOKENS, Kind, Stopwatch, call_of, kinds_of, stopwatch, timed

# Another number of threads must be faster by this, since it was measured in another process.
_THREADS_GAIN = 1.05

# Of the metal backend's thresholds, one after the other: what is tried, and at how many tokens it matters.
_TRIED: dict[str, tuple[tuple[Any, ...], tuple[int, ...]]] = {
    "merged": ((False, True), (1,)),
    "rows": ((4, 2, 1), (1,)),
    "band": ((2, 3, 5), (2, 4)),
    "tiles": ((8, 16, 32), (16, 48, 127)),
    "by_mlx": ((None, 16, 32, 64), (256, 1024)),
}


def best_thresholds(
    kinds: list[Kind], dtype: mx.Dtype, start: dispatch.Thresholds, watch: Stopwatch = stopwatch
) -> dispatch.Thresholds:
    """The metal backend's thresholds that make the blocks among ``kinds`` fastest, one after the other
    changed from ``start``; of equal ones what is there stays."""
    blocks = [kind.layers[0] for kind in kinds if kind.layers[0].what == "block"]
    best = start
    for name, (values, counts) in _TRIED.items():
        took: dict[dispatch.Thresholds, list[float]] = {
            best._replace(**{name: value}): [] for value in (getattr(best, name), *values)
        }
        for layer in blocks:
            for tokens in counts:
                call = call_of(layer, dtype, tokens)
                for limits, runs in took.items():
                    with dispatch.trying(limits):
                        registry.forget()  # some are looked at when a kernel is bound
                        several = [timed(layer, call, True, dtype, watch) for _ in range(ROUNDS)]
                    runs.append(statistics.median(several[1:]))
        best = min(took, key=lambda limits: sum(took[limits]))
    registry.forget()
    return best


def fastest_threads(
    path: str, seconds: float, run: Callable[[int, str, float], float] | None = None
) -> tuple[int, dict[int, float]]:
    """Which number of threads of the native backend is fastest.

    Args:
        path: the model.
        seconds: for all numbers.
        run: ``(threads, path, seconds)`` -> seconds of the accelerated side; by default a process each.

    Returns:
        The number, 0 for the default (one per usable core), and what each took.
    """
    most = int(native.describe()["threads"])
    counts = sorted({most, *(n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n < most), max(1, most // 2)})
    if len(counts) == 1:
        return 0, {}
    measure = run or _in_process
    took = {n: measure(n, path, seconds / len(counts)) for n in counts}
    best = min(took, key=lambda n: took[n])
    return (best if took[best] * _THREADS_GAIN < took[most] else 0), took


def _in_process(threads: int, path: str, seconds: float) -> float:
    """Another process loads the model and measures the accelerated side with so many threads."""
    command = [sys.executable, "-m", "moefast.lm.tune_machine", path, str(seconds)]
    environment = environment_of_child(MOEFAST_THREADS=str(threads))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        refuse("tune", f"a process with MOEFAST_THREADS={threads} must measure", done.stderr.strip()[-500:])
    return float(json.loads(done.stdout.splitlines()[-1]))


def accelerated_seconds(model: mlx.nn.Module, seconds: float, watch: Stopwatch = stopwatch) -> float:
    """The accelerated side alone: of each kind and phase the best of a few runs, all of them together."""
    restore(model)
    dtype = activation_dtype(model)
    jobs = [(kind, phase) for kind in kinds_of(model) for phase in kind.layers[0].verdict.backends]
    end, total = time.perf_counter() + seconds, 0.0
    for i, (kind, phase) in enumerate(jobs):
        layer = kind.layers[0]
        call = call_of(layer, dtype, TOKENS[phase])
        now = time.perf_counter()
        until = now + max(0.0, end - now) / (len(jobs) - i)
        runs = [timed(layer, call, True, dtype, watch) for _ in range(3)]
        while len(runs) < 2 * ROUNDS and time.perf_counter() < until:
            runs.append(timed(layer, call, True, dtype, watch))
        total += min(runs)
    return total


def load(path: str) -> mlx.nn.Module:
    """mlx-lm's model, in evaluation mode."""
    from mlx_lm.utils import load_model

    model, _ = load_model(folder_of(path))
    model.eval()
    return model


if __name__ == "__main__":
    print(json.dumps(accelerated_seconds(load(sys.argv[1]), float(sys.argv[2]))))
