"""What was measured, on what: the facts without which a figure means nothing."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mlx.core as mx

from ...env import settings
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
            **{name: _version(name) for name in ("mlx", "mlx-lm", "moefast")},
        },
        "git": git_state(Path(__file__).resolve().parents[3]),
        "environment": {settings.variable(name): value for name, value in vars(settings).items()},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def cpu_model() -> str:
    """The processor's own name, such as ``Apple M4 Pro``."""
    if platform.system() == "Darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
    top = _output("git", "-C", str(checkout), "rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() != checkout:
        return None
    commit = _output("git", "-C", str(checkout), "rev-parse", "HEAD")
    if not commit:
        return None
    return {"commit": commit, "dirty": bool(_output("git", "-C", str(checkout), "status", "--porcelain"))}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _output(*command: str) -> str:
    """What a command prints, or nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
