"""The C++ tests of the kernels (csrc/tests), built and run like the kernels installed here."""

from __future__ import annotations

import cpp_build
import pytest

PROGRAMS = sorted(file.stem for file in (cpp_build.ROOT / "csrc" / "tests").glob("*_test.cpp"))

pytestmark = pytest.mark.timeout(900)  # they are compiled first


@pytest.fixture(scope="module")
def ctest() -> str:
    """The program that runs them, once they are up to date."""
    cache = cpp_build.cache()
    with cpp_build.locked():
        cpp_build.run(cache["CMAKE_COMMAND"], "--build", cpp_build.FOLDER, "--target", "moefast_tests")
    return cache["CMAKE_CTEST_COMMAND"]


@pytest.mark.parametrize(
    "program",
    # Timings are for an idle machine.
    [pytest.param(p, marks=pytest.mark.slow if p.endswith("_speed_test") else ()) for p in PROGRAMS],
)
def test_program(program: str, ctest: str) -> None:
    cpp_build.run(
        ctest,
        *("--test-dir", cpp_build.FOLDER),
        *("--tests-regex", f"^{program}$"),
        *("--no-tests=error", "--output-on-failure"),
    )
