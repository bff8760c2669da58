"""What was measured, on what: the facts without which a figure means nothing."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mlx.core as mx

from ...env import settings
from ...machine import cores, cpu_model, output_of, release_of
from ...registry import device_name


def describe() -> dict[str, Any]:
    """Machine, versions, commit, environment and date, ready for JSON. Memory is in bytes."""
    return {
        "machine": {
            "cpu": cpu_model(),
            "cores": cores(),
            "memory": memory(),
            "os": f"{platform.system()} {platform.release()}",
            "arch": platform.machine(),
            "device": device_name(),
            "device_name": str(mx.device_info().get("device_name", "")),
            "load": load(),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: release_of(name) or "unknown" for name in ("mlx", "mlx-lm", "moefast")},
        },
        "git": git_state(Path(__file__).resolve().parents[3]),
        "environment": {settings.variable(name): value for name, value in vars(settings).items()},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def memory() -> int:
    """Bytes of main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def load() -> float:
    """Processes that wanted to run, averaged over the last minute: above 0.5 before a run starts, the
    figures are those of a busy machine."""
    return round(os.getloadavg()[0], 2)


def git_state(checkout: Path) -> dict[str, Any] | None:
    """``{"commit": ..., "dirty": ...}`` of the checkout this package runs from; None for an installed one.

    A wheel inside a virtual environment inside some other project's checkout is installed: only a
    repository whose top is ``checkout`` itself counts.
    """
    top = output_of("git", "-C", str(checkout), "rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() != checkout:
        return None
    commit = output_of("git", "-C", str(checkout), "rev-parse", "HEAD")
    if not commit:
        return None
    return {"commit": commit, "dirty": bool(output_of("git", "-C", str(checkout), "status", "--porcelain"))}
