"""What a release carries, and that an installed one finds its Metal sources."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from email.parser import HeaderParser
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

from moefast.paths import kernels_dir

ROOT = Path(__file__).resolve().parents[1]

# The kernels are compiled here once more, out of the sdist.
pytestmark = pytest.mark.timeout(900)


class Release(NamedTuple):
    sdist: Path
    wheel: Path


def run(*command: str | Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    """The sdist, and the wheel built from that sdist alone. Without the kernels of single instruction sets,
    which are most of the code: this is about where things end up."""
    pytest.importorskip("build")
    pytest.importorskip("scikit_build_core")
    out = tmp_path_factory.mktemp("dist")
    build = (sys.executable, "-m", "build", "--no-isolation", "-C", "cmake.define.MOEFAST_PORTABLE=ON")
    run(*build, "--outdir", out, ROOT)
    (sdist,) = out.glob("*.tar.gz")
    (wheel,) = out.glob("*.whl")
    return Release(sdist, wheel)


@pytest.fixture(scope="module")
def installed(release: Release, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the wheel's content."""
    return install(release.wheel, tmp_path_factory.mktemp("installed"))


def install(wheel: Path, folder: Path) -> Path:
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", folder, wheel)
    return folder


def run_installed(folder: Path, program: str, **environment: str) -> str:
    # -S leaves out the .pth files, and with them the editable install that would answer first;
    # the libraries moefast imports then have to be named.
    libraries = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    paths = os.pathsep.join([str(folder), *sorted(libraries)])
    command = (sys.executable, "-S", "-P", "-c", program)
    return run(*command, env=os.environ | {"PYTHONPATH": paths} | environment).strip()


@pytest.fixture(scope="module")
def wheel_names(release: Release) -> set[str]:
    with zipfile.ZipFile(release.wheel) as archive:
        return set(archive.namelist())


@pytest.mark.parametrize(
    "name",
    [
        "kernels/README.md",
        "kernels/common.h",
        "kernels/route.metal",
        "py.typed",
        "paths.py",
        "_build_info.py",
    ],
)
def test_wheel_carries(wheel_names: set[str], name: str) -> None:
    assert f"moefast/{name}" in wheel_names


@pytest.mark.parametrize("module", ["_native", "_kernels"])
def test_wheel_carries_the_extensions_that_could_be_built(wheel_names: set[str], module: str) -> None:
    # This environment's own install was built by the same rules.
    built = importlib.util.find_spec(f"moefast.{module}") is not None
    found = [name for name in wheel_names if name.startswith(f"moefast/{module}.") and name.endswith(".so")]
    assert len(found) == built


def test_without_a_compiler_the_wheel_is_pure_python_and_says_why(tmp_path: Path) -> None:
    pytest.importorskip("build")
    env = os.environ | {"CXX": str(tmp_path / "no-such-compiler")}
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path, ROOT, env=env)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
        assert "no C++ compiler was found" in archive.read("moefast/_build_info.py").decode()


def test_wheel_holds_nothing_but_the_package(wheel_names: set[str]) -> None:
    folders = {name.split("/")[0] for name in wheel_names}
    assert folders == {"moefast", f"moefast-{pyproject_version()}.dist-info"}


def test_wheel_version_is_pyprojects(release: Release) -> None:
    version = pyproject_version()
    with zipfile.ZipFile(release.wheel) as archive:
        metadata = archive.read(f"moefast-{version}.dist-info/METADATA").decode()
    assert HeaderParser().parsestr(metadata)["Version"] == version


@pytest.mark.parametrize(
    "name",
    [
        "CMakeLists.txt",
        "pyproject.toml",
        "LICENSE",
        "kernels/README.md",
        "kernels/route.metal",
        "csrc/README.md",
        "csrc/CMakeLists.txt",
        "csrc/cmake/Common.cmake",
        "csrc/cpu/moefast.h",
        "csrc/mlx/bindings.cpp",
        "csrc/numpy/bindings.cpp",
        "csrc/spec.h",
    ],
)
def test_sdist_carries(release: Release, name: str) -> None:
    with tarfile.open(release.sdist) as archive:
        assert f"moefast-{pyproject_version()}/{name}" in archive.getnames()


# -- the extension modules ---------------------------------------------------------------------------------

compiled = pytest.mark.skipif(find_spec("moefast._native") is None, reason="no compiler, MLX or nanobind")


@compiled
@pytest.mark.parametrize("module", ["_native", "_kernels"])
def test_wheel_carries_the_module(wheel_names: set[str], module: str) -> None:
    assert f"moefast/{module}{sysconfig.get_config_var('EXT_SUFFIX')}" in wheel_names
    assert f"moefast/{module}.pyi" in wheel_names


@compiled
def test_the_installed_kernels_run(installed: Path) -> None:
    program = """
import mlx.core as mx, moefast, moefast._native
mx.set_default_device(mx.cpu)
y = moefast.quantized_matmul(mx.ones((1, 4)), moefast.Projection(mx.ones((3, 4))), backend="native")
print(y.tolist(), moefast._native.__file__, moefast._native.built_for_mlx == mx.__version__)
"""
    assert run_installed(installed, program).startswith(f"[[4.0, 4.0, 4.0]] {installed}")


@compiled
def test_the_module_finds_mlx_beside_it(installed: Path) -> None:
    """Not where it was built, which may have been a temporary environment."""
    code = (installed / "moefast" / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}").read_bytes()
    origin = b"@loader_path" if sys.platform == "darwin" else b"$ORIGIN"
    assert origin + b"/../mlx/lib" in code
    assert sysconfig.get_path("platlib").encode() not in code


def test_without_a_compiler_it_installs_as_pure_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler")
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith((".so", ".dylib"))]
    program = "import moefast; print(moefast.backends())"
    found = run_installed(install(wheel, tmp_path / "installed"), program)
    reason = "moefast._native was not built (no C++ compiler was found)"
    assert f"'native': '{reason}" in found
    assert "'reference': None" in found


# -- Metal sources -----------------------------------------------------------------------------------------


def test_kernels_dir_of_this_install() -> None:
    assert (kernels_dir() / "README.md").is_file()


def test_kernels_dir_of_an_installed_wheel(installed: Path) -> None:
    program = "from moefast.paths import kernels_dir; print(kernels_dir())"
    assert run_installed(installed, program) == str(installed.resolve() / "moefast" / "kernels")


def test_kernels_dir_names_the_places_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moefast.paths.__file__", str(tmp_path / "moefast" / "paths.py"))
    with pytest.raises(FileNotFoundError) as error:
        kernels_dir()
    assert str(tmp_path.resolve() / "moefast" / "kernels") in str(error.value)
    assert str(tmp_path.resolve() / "kernels") in str(error.value)


def pyproject_version() -> str:
    with (ROOT / "pyproject.toml").open("rb") as file:
        version = tomllib.load(file)["project"]["version"]
    assert isinstance(version, str)
    return version
