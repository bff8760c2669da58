"""What ``moefast verify`` prints: a table for people, JSON for programs."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..testing import Error
from .compare import Comparison, Result, Say, verify
from .compare_layers import Figures
from .generate import _hush_transformers

_PASSED, _FAILED = 0, 1
# Narrower output (a pipe, a file) would fold every cell.
_WIDTH = 150


def run(arguments: argparse.Namespace) -> int:
    """``moefast verify``: 0 if all that was compared agrees, 1 if not."""
    _hush_transformers()
    with _progress() as say:
        result = verify(
            arguments.model,
            tokens=arguments.tokens,
            prompt=arguments.prompt,
            backend=arguments.backend,
            say=say,
        )
    if arguments.json:
        print(json.dumps(to_dict(result)))
    else:
        show(result)
    return _PASSED if result.passed else _FAILED


@contextmanager
def _progress() -> Iterator[Say]:
    """A bar on standard error, where that is a terminal."""
    err = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, disable=not err.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=1)

        def say(text: str, steps: int) -> None:
            if text:
                bar.reset(task, description=text, total=steps)
            else:
                bar.advance(task, steps)

        yield say


def show(result: Result) -> None:
    """Print the tables and, in the last line, the verdict."""
    out = Console(highlight=False, markup=False)
    if not out.is_terminal:
        out = Console(highlight=False, markup=False, width=_WIDTH)
    for comparison in result.comparisons:
        out.print(_table(comparison))
        for line in _summary(comparison):
            out.print(line)
        out.print()
    for entry in result.report.original:
        out.print(f"{entry.path}: {entry.kind}: left to mlx-lm, not compared: {entry.reason}")
    if not result.report.accelerated:
        out.print("no MoE layer was accelerated: there was none to compare")
    out.print("passed" if result.passed else "failed")


def _table(comparison: Comparison) -> Table:
    table = Table(
        title="Layers on the same input: "
        f"accelerated in {comparison.dtype}, plain in {comparison.plain_dtype}",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("layer", no_wrap=True)
    table.add_column("runs as", no_wrap=True)
    for name in ("max error", "limit", "RMS error", "limit", "same experts"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict")
    for f in comparison.layers:
        worst = _worst(f)
        limit = ("", "") if f.limit is None else (_share(f.limit.max), _share(f.limit.rms))
        table.add_row(
            f.path,
            f"{f.what} on {', '.join(dict.fromkeys(f.backends.values()))}",
            _share(worst.max) if worst else "",
            limit[0],
            _share(worst.rms) if worst else "",
            limit[1],
            _experts(f),
            _verdict(f),
        )
    return table


def _worst(f: Figures) -> Error | None:
    errors = list(f.errors.values())
    return Error(max(e.max for e in errors), max(e.rms for e in errors)) if errors else None


def _share(value: float) -> str:
    return f"{value:.2g}"


def _experts(f: Figures) -> str:
    if not f.routed:
        return "the original's" if f.what == "experts" else ""
    return f"{f.alike} of {f.routed}" + (f", {f.ties} ties" if f.ties else "")


def _verdict(f: Figures) -> str:
    notes = [] if f.remark is None else [f.remark]
    if f.passed is None:
        return f.problem or ""
    if f.passed:
        return "; ".join(["ok", *notes])
    at = "" if f.first is None else f" from token {f.first[1]} on"
    return "; ".join([f"{f.problem}{at}", *notes])


def first_difference(comparison: Comparison) -> str | None:
    """Where what fails begins: a layer before the logits that come of it."""
    for f in comparison.layers:
        if f.passed is False:
            phase, token = f.first or ("", 0)
            return f"{f.path} ({f.kind}), {phase}, token {token}: {f.problem}"
    if comparison.problem is not None:
        return f"the model, {comparison.problem}"
    limit, wrong = comparison.limit, comparison.wrong_steps()
    if limit is None or comparison.passed:
        return None
    if not wrong:
        return f"the logits of all steps: RMS error {comparison.rms:.2g}, limit {limit.rms:.2g}"
    step = comparison.steps[wrong[0]]
    if step.plain != step.accelerated and not step.tied:
        return f"the token of step {wrong[0]}: {step.accelerated} instead of {step.plain}"
    return f"the logits of step {wrong[0]}: max error {step.error.max:.2g}, limit {limit.max:.2g}"


def _summary(comparison: Comparison) -> Iterator[str]:
    steps, limit = comparison.steps, comparison.limit
    if steps:
        same = sum(step.plain == step.accelerated for step in steps)
        first = next((i for i, step in enumerate(steps) if step.plain != step.accelerated), None)
        at = "" if first is None else f", the first other one at step {first}"
        yield f"greedy tokens: {same} of {len(steps)} the same{at}"
        worst = max(range(len(steps)), key=lambda i: steps[i].error.max)
        allowed = (
            "not judged in this dtype" if limit is None else f"limits {limit.max:.2g} and {limit.rms:.2g}"
        )
        yield (
            f"logits: max error {steps[worst].error.max:.2g} at step {worst}, RMS error {comparison.rms:.2g}"
            f" ({allowed})"
        )
    if limit is not None and any(step.unsure for step in steps):
        since = next(i for i, step in enumerate(steps) if step.unsure)
        yield f"from step {since} on logits are not judged: a token up to there is routed by a hair's breadth"
    if comparison.remark is not None:
        yield comparison.remark
    where = first_difference(comparison)
    if where is not None:
        yield f"first difference: {where}"


def to_dict(result: Result) -> dict[str, Any]:
    """What JSON can hold; what is infinite becomes null."""
    return {
        "model": result.model,
        "passed": result.passed,
        "prompt_tokens": result.prompt_tokens,
        "comparisons": [_comparison(c) for c in result.comparisons],
        "left_alone": [{"path": e.path, "kind": e.kind, "reason": e.reason} for e in result.report.original],
    }


def _comparison(c: Comparison) -> dict[str, Any]:
    return {
        "dtype": c.dtype,
        "plain_dtype": c.plain_dtype,
        "passed": c.passed,
        "first_difference": first_difference(c),
        "logits_limit": _error(c.limit),
        "logits_rms": c.rms if math.isfinite(c.rms) else None,
        "problem": c.problem,
        "remark": c.remark,
        "steps": [
            {
                "error": _error(s.error),
                "plain_token": s.plain,
                "token": s.accelerated,
                "tied": s.tied,
                "unsure": s.unsure,
            }
            for s in c.steps
        ],
        "layers": [
            {
                "path": f.path,
                "kind": f.kind,
                "what": f.what,
                "backends": f.backends,
                "errors": {phase: _error(e) for phase, e in f.errors.items()},
                "limit": _error(f.limit),
                "same_experts": f.alike,
                "routed_tokens": f.routed,
                "ties": f.ties,
                "remark": f.remark,
                "problem": f.problem,
                "first": f.first,
                "passed": f.passed,
            }
            for f in c.layers
        ],
    }


def _error(value: Any) -> dict[str, float | None] | None:
    if value is None:
        return None
    return {
        name: getattr(value, name) if math.isfinite(getattr(value, name)) else None for name in ("max", "rms")
    }
