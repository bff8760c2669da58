"""``moefast tune``: the command."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from .. import tuning
from ..acceleration.look import activation_dtype
from ..backends import backends
from ..backends.metal import dispatch
from ..errors import refuse
from ..registry import device_name
from .tune import as_stored, tune
from .tune_machine import best_thresholds, fastest_threads, load


def rows(found: dict[str, Any]) -> Iterator[tuple[str, str, str, str, str]]:
    """What is stored, as rows: layer, phase, original ms, backend ms, choice."""
    for layer in found.get("layers", {}).values():
        for phase, of in layer["phases"].items():
            seconds = dict(of["seconds"])
            original = seconds.pop(tuning.ORIGINAL, None)
            backend, took = next(iter(seconds.items()))
            slow = f"~{1e3 * of['expected']:.3g}" if original is None else f"{1e3 * original:.3g}"
            yield (
                layer["what"],
                phase,
                slow,
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
    if any(row[2].startswith("~") for row in rows(found)):
        out.print("~: what it would take, by its time for fewer tokens; not run")
    threads = found.get("threads", 0)
    out.print(f"threads of the native backend: {threads or 'one per usable core'}")
    limits = found.get("metal_thresholds")
    if limits is not None:
        out.print(f"thresholds of the metal backend: {limits}")
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

    model = load(arguments.model)
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
    if device_name() == "gpu" and backends()["metal"] is None:
        limits = best_thresholds(kinds, activation_dtype(model), dispatch.thresholds())
        found["metal_thresholds"] = limits._asdict()
    tuning.store(found)
    if arguments.json:
        print(json.dumps({"identity": tuning.identity(), **found}))
    else:
        show(found)
    return 0
