"""Compiled kernels and the runtime on disk, found again by content.

An entry is a folder, written beside its place and renamed into it: two processes that build the same kernel
both succeed, and an interrupted build leaves nothing that looks complete. One that has lost files since is
made anew. All of it may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..env import cache_folder, settings
from .toolchain import toolchain

PACKAGE = Path(__file__).resolve().parent


@lru_cache(maxsize=1)
def root() -> Path:
    """The folder of all entries: ``MOEFAST_CACHE``, or the user's cache folder."""
    place = cache_folder("emulator")
    try:
        place.mkdir(parents=True, exist_ok=True)
        writable = os.access(place, os.W_OK)
    except OSError:
        writable = False
    if writable:
        return place
    if settings.cache:
        raise OSError(
            f"[emulator] MOEFAST_CACHE must be a folder that can be written, got {settings.cache!r}."
        )
    # A home that cannot be written, as in many containers.
    return Path(tempfile.mkdtemp(prefix="moefast-emulator-"))


@lru_cache(maxsize=1)
def emulator_identity() -> str:
    """Changes with the emulator's own sources and with the compiler."""
    digest = hashlib.sha256(toolchain().identity.encode())
    for file in sorted([*PACKAGE.glob("*.py"), *PACKAGE.glob("msl/*"), *PACKAGE.glob("runtime/*")]):
        if file.is_file():
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def key(*parts: object) -> str:
    """Of everything a result depends on."""
    digest = hashlib.sha256(emulator_identity().encode())
    for part in parts:
        digest.update(repr(part).encode())
    return digest.hexdigest()[:32]


def entry(name: str, make: Callable[[Path], None]) -> Path:
    """The folder ``name``, made by ``make(folder)`` if it is not there or not complete."""
    place = root() / name
    if not is_whole(place):
        made = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
        try:
            make(made)
            seal(made)
            _install(made, place)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return place


_SIZES = "sizes.json"
_ATTEMPTS = 10


def seal(folder: Path) -> None:
    """Writes down what a complete entry has."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    write_json(folder / _SIZES, {str(file.relative_to(folder)): file.stat().st_size for file in files})


def is_whole(folder: Path) -> bool:
    """Whether an entry has all its files: a full disk, a power cut or a cleaner of old files leave less."""
    sizes = read_json(folder / _SIZES)
    try:
        return sizes is not None and all(
            (folder / file).stat().st_size == size for file, size in sizes.items()
        )
    except OSError:
        return False


def _install(made: Path, place: Path) -> None:
    """Puts ``made`` where nothing, or something broken, is: as other processes may be doing, too."""
    for attempt in range(_ATTEMPTS):
        try:
            made.rename(place)
            return
        except OSError:
            if is_whole(place):
                return  # another process was faster
            if attempt == _ATTEMPTS - 1:
                raise
        broken = tempfile.mkdtemp(prefix=".broken-", dir=place.parent)
        with suppress(FileNotFoundError):
            place.rename(Path(broken) / place.name)
        shutil.rmtree(broken, ignore_errors=True)


def stamps(files: Iterable[str]) -> list[list[Any]]:
    """Size and time of files, to see later whether they are still the same."""
    out = []
    for name in files:
        status = os.stat(name)
        out.append([name, status.st_size, status.st_mtime_ns])
    return out


def unchanged(recorded: list[list[Any]]) -> bool:
    try:
        return stamps(row[0] for row in recorded) == recorded
    except OSError:
        return False


def read_json(file: Path) -> Any:
    """What ``write_json`` wrote; None where there is no such file, or not all of it."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value))


def replace_json(file: Path, value: Any) -> None:
    """As ``write_json``, over what is there: readers see the old or the new, never a part."""
    handle, name = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
    os.close(handle)
    write_json(Path(name), value)
    Path(name).replace(file)
