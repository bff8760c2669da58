"""``moefast tune``: what is faster on this machine for each kind of layer of a model, measured.

Layers of one kind take turns, original and accelerated alternate, and each figure is the median of its runs.
A backend is chosen where it is at least as fast; otherwise the layer stays as mlx-lm has it. On a CPU the
native backend's number of threads is measured as well, in processes of their own: a pool's size is fixed.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn

from .. import tuning
from ..acceleration import restore
from ..acceleration.dbrx import AcceleratedDbrx
from ..acceleration.look import Found, activation_dtype, look, look_beside
from ..acceleration.model import apply
from ..backends import backends, native
from ..errors import refuse
from ..registry import device_name
from ..weights import ExpertLayout, Layout, dtype_name
from .load import folder_of

# Runs something, and says how many seconds it took.
Stopwatch = Callable[[Callable[[], mx.array]], float]

# One call of each phase; a short prefill, for the sake of originals that take seconds for it.
_TOKENS = {"decode": 1, "band": 16, "prefill": 128}

# A layer's figures of a phase are enough after so many rounds, or after two where one side takes this much
# longer. What takes a moment has so many rounds whatever the time left.
_ROUNDS = 7
_CLEAR = 1.5
_MOMENT = 0.05
# Another number of threads must be faster by this, since it was measured in another process.
_THREADS_GAIN = 1.05
# Experts of a token, where they are called without a router.
_CHOSEN = 4


@dataclass
class Kind:
    """Layers that are alike, and what was measured of them.

    Attributes:
        what: for people: class and sizes.
        layers: of the model.
        seconds: phase -> ``original`` or a backend -> the runs' seconds.
    """

    key: str
    what: str
    layers: list[Found]
    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def decided(self) -> dict[str, dict[str, Any]]:
        """Phase -> what is faster, and the medians."""
        found = {}
        for phase, sides in self.seconds.items():
            medians = {side: statistics.median(runs) for side, runs in sides.items() if runs}
            if len(medians) < 2:
                continue
            backend = next(side for side in medians if side != tuning.ORIGINAL)
            faster = backend if medians[backend] <= medians[tuning.ORIGINAL] else tuning.ORIGINAL
            found[phase] = {"choice": faster, "seconds": medians}
        return found


def stopwatch(run: Callable[[], mx.array]) -> float:
    """Seconds until what ``run`` returns is evaluated."""
    began = time.perf_counter()
    mx.eval(run())
    return time.perf_counter() - began


def tune(
    model: mlx.nn.Module,
    *,
    seconds: float,
    watch: Stopwatch = stopwatch,
    progress: Callable[[float, str], None] = lambda done, what: None,
) -> list[Kind]:
    """Measure every kind of layer that a backend takes, and leave the model as it was.

    Args:
        model: that mlx-lm loaded, in evaluation mode.
        seconds: for everything, about; each kind and phase has at least one run of each side.
        watch: times a run.
        progress: told which part of the time is over, and what is being measured.

    Returns:
        The kinds, with what was measured of them. Nothing is stored.
    """
    restore(model)
    kinds = kinds_of(model)
    jobs = [(kind, phase) for kind in kinds for phase in kind.layers[0].verdict.backends]
    end = time.perf_counter() + seconds
    for i, (kind, phase) in enumerate(jobs):
        progress(i / len(jobs), f"{kind.what}: {phase}")
        share = max(0.0, end - time.perf_counter()) / (len(jobs) - i)
        _measure(model, kind, phase, share, watch)
    progress(1.0, "done")
    return kinds


def kinds_of(model: mlx.nn.Module) -> list[Kind]:
    """The kinds of layers that a backend takes."""
    dtype = activation_dtype(model)
    kinds: dict[str, Kind] = {}
    with tuning.ignored():
        layers = [*look(model, "auto", dtype), *look_beside(model, "auto", dtype)]
    for layer in layers:
        # DBRX's original would have to be unstacked between two runs; it is slower anyway.
        stacked = any(swap.ahead is AcceleratedDbrx for swap in layer.swaps)
        if not layer.swaps or not layer.verdict.problems or stacked:
            continue
        key = tuning.key_of(next(iter(layer.verdict.problems.values())))
        if key not in kinds:
            kinds[key] = Kind(key, _describe(layer), [])
        kinds[key].layers.append(layer)
    return list(kinds.values())


def _describe(layer: Found) -> str:
    """Class, sizes and format."""
    layout = next(
        part for part in layer.verdict.problems["decode"].details if isinstance(part, ExpertLayout | Layout)
    )
    if isinstance(layout, Layout):
        return f"{layer.kind} {layout.in_dims} x {layout.out_dims}, {_format(layout)}"
    sizes = f"{layout.num_experts} experts {layout.hidden} x {layout.width}"
    return f"{layer.kind} of {sizes}, {_format(layout.up)}"


def _format(layout: Layout) -> str:
    if layout.quant is None:
        return dtype_name(layout.dtype)
    return f"{layout.quant.mode} {layout.quant.bits} bits"


def _call(layer: Found, dtype: mx.Dtype, tokens: int) -> Callable[[], mx.array]:
    """What runs the layer on random input, drawn now."""
    module: Any = layer.module
    hidden = layer.verdict.hidden
    x = mx.random.normal((1, tokens, hidden)).astype(dtype)
    mx.eval(x)
    if layer.what == "experts":
        layout: Any = layer.verdict.problems["decode"].details[0]
        indices = mx.random.randint(0, layout.num_experts, (1, tokens, _CHOSEN)).astype(mx.uint32)
        weights = mx.full(indices.shape, 1 / _CHOSEN, dtype)
        mx.eval(indices, weights)
        if layer.kind == "Experts":  # of a router apart: it combines
            return lambda: module(x, indices, weights)
        return lambda: module(x, indices)
    if isinstance(module, mlx.nn.Embedding | mlx.nn.QuantizedEmbedding):
        head: Any = module
        return lambda: head.as_linear(x)
    return lambda: module(x)


def _measure(model: mlx.nn.Module, kind: Kind, phase: str, seconds: float, watch: Stopwatch) -> None:
    """Rounds of original and accelerated, until their order is clear or the time is over."""
    backend = kind.layers[0].verdict.backends[phase]
    sides: dict[str, list[float]] = {tuning.ORIGINAL: [], backend: []}
    kind.seconds[phase] = sides
    dtype = activation_dtype(model)
    end = time.perf_counter() + seconds
    for i in range(_ROUNDS + 1):
        layer = kind.layers[i % len(kind.layers)]
        call = _call(layer, dtype, _TOKENS[phase])
        took = {side: _run(layer, call, side != tuning.ORIGINAL, dtype, watch) for side in sides}
        slow = max(took.values()) > max(_MOMENT, seconds / 4)
        # The first run compiles and warms up. It counts where there is no time for another.
        if i > 0 or slow:
            for side, runs in sides.items():
                runs.append(took[side])
        clear = i >= 2 and _are_apart(sides)
        if all(sides.values()) and (clear or (slow and time.perf_counter() > end)):
            return


def _run(
    layer: Found, call: Callable[[], mx.array], accelerated: bool, dtype: mx.Dtype, watch: Stopwatch
) -> float:
    """Seconds of one run of a layer that is its original before and after."""
    if accelerated:
        apply([layer], "auto")
        apply(list(look_beside(layer.module, "auto", dtype)), "auto")
    try:
        return watch(call)
    finally:
        restore(layer.module)


def _are_apart(sides: dict[str, list[float]]) -> bool:
    first, second = sides.values()
    return min(first) > _CLEAR * max(second) or min(second) > _CLEAR * max(first)


def as_stored(kinds: list[Kind]) -> dict[str, Any]:
    """What :func:`moefast.tuning.store` keeps."""
    return {
        "when": time.strftime("%Y-%m-%d"),
        "layers": {kind.key: {"what": kind.what, "phases": kind.decided()} for kind in kinds},
    }


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
    command = [sys.executable, "-m", "moefast.lm.tune", path, str(seconds)]
    environment = {**os.environ, "MOEFAST_THREADS": str(threads)}
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
        call = _call(layer, dtype, _TOKENS[phase])
        now = time.perf_counter()
        until = now + max(0.0, end - now) / (len(jobs) - i)
        runs = [_run(layer, call, True, dtype, watch) for _ in range(3)]
        while len(runs) < 2 * _ROUNDS and time.perf_counter() < until:
            runs.append(_run(layer, call, True, dtype, watch))
        total += min(runs)
    return total


def rows(found: dict[str, Any]) -> Iterator[tuple[str, str, str, str, str]]:
    """What is stored, as rows: layer, phase, original ms, backend ms, choice."""
    for layer in found.get("layers", {}).values():
        for phase, of in layer["phases"].items():
            seconds = dict(of["seconds"])
            original = seconds.pop(tuning.ORIGINAL)
            backend, took = next(iter(seconds.items()))
            yield (
                layer["what"],
                phase,
                f"{1e3 * original:.3g}",
                f"{backend} {1e3 * took:.3g}",
                of["choice"],
            )


def show(found: dict[str, Any]) -> None:
    """Print what is stored."""
    from rich.console import Console
    from rich.table import Table

    out = Console()
    out.print(f"{tuning.identity()} ({found.get('when', 'never')})")
    table = Table("layer", "phase", "original, ms", "backend, ms", "chosen")
    for row in rows(found):
        table.add_row(*row)
    out.print(table)
    threads = found.get("threads", 0)
    out.print(f"threads of the native backend: {threads or 'one per usable core'}")
    out.print(f"kept in {tuning.file()}")


def run(arguments: Any) -> int:
    """The command."""
    if arguments.clear:
        print("forgotten" if tuning.clear() else f"nothing is stored for {tuning.identity()}")
        return 0
    if arguments.show:
        found = dict(tuning.stored())
        if arguments.json:
            print(json.dumps({"identity": tuning.identity(), **found}))
        elif found:
            show(found)
        else:
            print(f"nothing is stored for {tuning.identity()}")
        return 0
    if not 0 < arguments.budget < float("inf"):
        refuse("tune", "--budget must be above 0 seconds", arguments.budget)
    return _tune_and_store(arguments)


def _tune_and_store(arguments: Any) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    model = _load(arguments.model)
    of_threads = backends()["native"] is None and device_name() == "cpu" and not arguments.no_threads
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("loading", total=1.0)

        def progress(done: float, what: str) -> None:
            bars.update(task, completed=done, description=what)

        part = 0.6 if of_threads else 1.0
        kinds = tune(model, seconds=part * arguments.budget, progress=progress)
        found = as_stored(kinds)
        if not kinds:
            print(f"moefast: no layer of {arguments.model} is one that a backend takes here", file=sys.stderr)
            return 0
        if of_threads:
            progress(0.0, "threads of the native backend")
            found["threads"], took = fastest_threads(arguments.model, 0.4 * arguments.budget)
            found["seconds_by_threads"] = {str(n): seconds for n, seconds in took.items()}
    tuning.store(found)
    if arguments.json:
        print(json.dumps({"identity": tuning.identity(), **found}))
    else:
        show(found)
    return 0


def _load(path: str) -> mlx.nn.Module:
    from mlx_lm.utils import load_model

    model, _ = load_model(folder_of(path))
    model.eval()
    return model


if __name__ == "__main__":
    print(json.dumps(accelerated_seconds(_load(sys.argv[1]), float(sys.argv[2]))))
