"""What :mod:`.selfcheck` found out on this machine, kept for later processes: one verdict for each MLX, GPU
and version of the kernels.

Without one the kernels do not run on a GPU. The emulator has shown that they are right, and that decode's
bits are those of the MLX they were written for; that this GPU, its compiler and its MLX agree, only a check
on it can show.
"""

from __future__ import annotations

import json
from functools import cache
from hashlib import blake2s
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from ...env import cache_folder
from ...paths import kernels_dir

# Parts that are checked and refused apart from one another.
PARTS = ("route", "decode", "band", "decode-fast", "band-fast", "tiles")


def reason_against(part: str) -> str | None:
    """Why a part must not run on this GPU, or None."""
    verdict = stored()
    if verdict is None:
        return f"not checked on this GPU with MLX {mlx_version()} yet: run `moefast doctor` once"
    reason = verdict["failed"].get(part)
    return None if reason is None else f"self-check: {reason} (moefast doctor)"


@cache
def stored() -> dict[str, Any] | None:
    """The verdict on this machine: ``failed``, part -> reason, and what else :func:`store` was given."""
    return _all().get(identity())


def store(verdict: dict[str, Any]) -> None:
    """Keep a verdict, beside those of other releases."""
    file = _file()
    verdicts = _all()
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix(".new")
    beside.write_text(json.dumps({**verdicts, identity(): verdict}, indent=2) + "\n")
    beside.replace(file)
    stored.cache_clear()


def mlx_version() -> str:
    """Of the MLX that runs."""
    installed: str = mx.__version__  # type: ignore[attr-defined]
    return installed


@cache
def identity() -> str:
    """What a verdict is about: the release of MLX and moefast, the GPU, the parts and the kernels' text."""
    digest = blake2s(" ".join(PARTS).encode(), digest_size=8)
    for file in sorted(kernels_dir().iterdir()):
        digest.update(file.name.encode() + file.read_bytes())
    gpu = mx.device_info().get("architecture", "none")
    return f"mlx {mlx_version()}, moefast {version('moefast')}, {gpu}, kernels {digest.hexdigest()}"


def _all() -> dict[str, dict[str, Any]]:
    """Every verdict that is kept, by what it is about; none where the file cannot be read as such."""
    try:
        verdicts = json.loads(_file().read_text())
    except (OSError, ValueError):
        return {}
    return verdicts if isinstance(verdicts, dict) else {}


def _file() -> Path:
    return cache_folder("metal") / "verdicts.json"
