"""Compiled kernels and the runtime on disk, found again by content.

An entry is a folder, written beside its place and renamed into it: two processes that build the same kernel
both succeed, and an interrupted build leaves nothing that looks complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..env import settings
from .toolchain import toolchain

PACKAGE = Path(__file__).resolve().parent


@lru_cache(maxsize=1)
def root() -> Path:
    """The folder of all entries: ``MOEFAST_CACHE``, or the user's cache folder."""
    if settings.cache:
        place = Path(settings.cache)
    else:
        place = (
            Path.home()
            / ("Library/Caches" if sys.platform == "darwin" else ".cache")
            / "moefast"
            / "emulator"
        )
    try:
        place.mkdir(parents=True, exist_ok=True)
        if os.access(place, os.W_OK):
            return place
    except OSError:
        if settings.cache:
            raise
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
    """The folder ``name``, made by ``make(folder)`` if it is not there."""
    place = root() / name
    if not place.is_dir():
        made = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root()))
        try:
            make(made)
            try:
                made.rename(place)
            except OSError:
                if not place.is_dir():
                    raise
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return place


def put(file: Path, make: Callable[[Path], None]) -> Path:
    """``file`` inside an entry, made by ``make(temporary)`` if it is not there."""
    if not file.exists():
        handle, name = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
        os.close(handle)
        made = Path(name)
        try:
            make(made)
            made.replace(file)
        finally:
            made.unlink(missing_ok=True)
    return file


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


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value))


def replace_json(file: Path, value: Any) -> None:
    """As ``write_json``, over what is there: readers see the old or the new, never a part."""
    handle, name = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
    os.close(handle)
    write_json(Path(name), value)
    Path(name).replace(file)
