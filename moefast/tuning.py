"""What ``moefast tune`` measured on this machine, kept in the user's cache and read by ``auto``.

For each machine, and the releases it was measured with: of every kind of layer, phase by phase, whether a
backend or the original is faster; and how many threads. Nothing stored means nothing decided: what can run on
a backend does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from hashlib import blake2s
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import mlx.core as mx

from .env import cache_folder
from .machine import cores, cpu_model, release_of
from .registry import Problem, device_name, log

# What stands for a backend's name where the model's own computation is faster.
ORIGINAL = "original"

_ignored: ContextVar[bool] = ContextVar("moefast_tuning_ignored", default=False)


def choice(problem: Problem) -> str | None:
    """The backend that was fastest for this kind of layer in this phase, ``"original"``, or None where nobody
    has measured it."""
    if _ignored.get():
        return None
    try:
        chosen = stored()["layers"][key_of(problem)]["phases"][problem.phase]["choice"]
    except (KeyError, TypeError):  # not measured, or someone has edited the file
        return None
    return chosen if isinstance(chosen, str) else None


@contextmanager
def ignored() -> Iterator[None]:
    """Within the block nothing has been measured: what measures must be able to choose freely."""
    token = _ignored.set(True)
    try:
        yield
    finally:
        _ignored.reset(token)


def threads() -> int:
    """The native backend's fastest number of threads, 0 where nobody has measured it."""
    found = stored().get("threads", 0)
    return found if isinstance(found, int) and found > 0 else 0


def key_of(problem: Problem) -> str:
    """Names a kind of layer: everything about a problem but its phase."""
    text = repr((problem.op, problem.device, str(problem.dtype), problem.details))
    return blake2s(text.encode(), digest_size=8).hexdigest()


@cache
def stored() -> Mapping[str, Any]:
    """What was found on this machine with these releases; empty where nothing was."""
    return _dict(everything().get(identity()))


@cache
def identity() -> str:
    """What figures hold for: the machine, and the releases of moefast, MLX and mlx-lm."""
    if device_name() == "gpu":
        machine = str(mx.device_info().get("device_name", "gpu"))
    else:
        machine = f"{cpu_model()}, {cores()} cores"
    releases = ", ".join(f"{name} {release_of(name)}" for name in ("moefast", "mlx", "mlx-lm"))
    return f"{machine}; {releases}"


def everything() -> dict[str, Any]:
    """All that is kept, by :func:`identity`; where the file cannot be read, nothing, and the log says so."""
    try:
        found = json.loads(file().read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("tuning: %s cannot be read, and is ignored: %s", file(), error)
        return {}
    return _dict(found)


def store(found: Mapping[str, Any]) -> Path:
    """Keep what was found on this machine; layers that were measured before, and not now, are kept too, be it
    by another process meanwhile."""
    with _locked():
        content = everything()
        before = _dict(content.get(identity()))
        layers = {**_dict(before.get("layers")), **found.get("layers", {})}
        _write({**content, identity(): {**before, **found, "layers": layers}})
    return file()


def clear() -> bool:
    """Forget what was found on this machine with these releases; whether there was something."""
    with _locked():
        kept = everything()
        if identity() not in kept:
            return False
        del kept[identity()]
        _write(kept)
    return True


def file() -> Path:
    """Where it is kept."""
    return cache_folder("tuning") / "tuning.json"


@contextmanager
def _locked() -> Iterator[None]:
    """Within the block no other process writes the file, where the system can lock one."""
    file().parent.mkdir(parents=True, exist_ok=True)
    try:
        from fcntl import LOCK_EX, flock
    except ImportError:
        yield
        return
    with file().with_suffix(".lock").open("a") as held:
        flock(held, LOCK_EX)  # until it is closed
        yield


def _write(content: dict[str, Any]) -> None:
    with NamedTemporaryFile(
        "w", encoding="utf-8", dir=file().parent, prefix="tuning", suffix=".new", delete=False
    ) as beside:
        beside.write(json.dumps(content, indent=2) + "\n")
    Path(beside.name).replace(file())  # whole or not at all
    stored.cache_clear()


def _dict(found: Any) -> dict[str, Any]:
    return found if isinstance(found, dict) else {}
