"""The C++ build that ``make venv`` leaves behind: its objects, and the test programs it can make."""

from __future__ import annotations

import fcntl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "editable"


def cache() -> dict[str, str]:
    """CMake's variables there. Skips the test where there is no such build."""
    file = FOLDER / "CMakeCache.txt"
    lines = file.read_text().splitlines() if file.is_file() else []
    values = dict(line.split("=", 1) for line in lines if "=" in line and line[0] not in "#/")
    variables = {name.split(":")[0]: value for name, value in values.items()}
    if variables.get("MOEFAST_TESTS") != "ON":
        pytest.skip(f"moefast was not built in {FOLDER}: make venv")
    if variables.get("CMAKE_CXX_COMPILER", "NOTFOUND").endswith("NOTFOUND"):
        pytest.skip("moefast was built without a C++ compiler")
    return variables


@contextmanager
def locked() -> Iterator[None]:
    """One process at a time builds there: ninja itself does not see to it."""
    with (FOLDER / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run(*command: str | Path) -> str:
    """What a program prints; fails the test with it where the program fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout
