"""Imports point one way, and moefast itself needs MLX and NumPy only."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "moefast"

# Each part of the package and the parts it may import; what those may import, it may too. A new file at
# the top of the package needs a row.
ARROWS: dict[str, set[str]] = {
    "__main__": {"cli"},
    "cli": {"lm", "acceleration", "doctor"},
    "lm": {"models", "acceleration", "machine", "pages", "testing"},
    "doctor": {"acceleration", "machine", "ops", "paths"},
    "acceleration": {"families", "nn", "models"},
    "autoload": {"acceleration"},
    "families": {"specs", "weights"},
    "models": {"nn"},
    "nn": {"ops"},
    "ops": {"backends"},
    "pages": {"backends"},
    "backends": {"registry", "emulator", "paths", "testing", "tuning"},
    "tuning": {"registry", "machine"},
    "machine": set(),
    "registry": {"specs", "weights", "routing", "env"},
    "testing": {"specs"},
    "weights": {"specs"},
    "specs": {"errors"},
    "env": {"errors"},
    "routing": set(),
    "errors": set(),
    "paths": set(),
    "emulator": {"env"},  # a general tool: it knows nothing of MoE
}

# Parts that may import more than MLX and NumPy when they are imported themselves.
EXTRAS = {"models", "lm", "emulator"}


class Import(NamedTuple):
    """``module`` is absolute; ``deferred``: inside a function, or for a type checker only."""

    module: str
    names: tuple[str, ...]
    deferred: bool
    line: int


def part_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(source: str, package: str) -> Iterator[Import]:
    """Every import of a module of ``package`` (dotted), relative ones resolved."""

    def visit(node: ast.AST, deferred: bool) -> Iterator[Import]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            deferred = True
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            deferred = True
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, (), deferred, node.lineno)
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")[: -node.level + 1 or None] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            yield Import(module, tuple(alias.name for alias in node.names), deferred, node.lineno)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, deferred)

    yield from visit(ast.parse(source), False)


def parts_imported(found: Import) -> set[str]:
    """The parts of moefast an import reaches; names of the package itself count as none of them."""
    first, *rest = found.module.split(".")
    if first != "moefast":
        return set()
    return {rest[0]} if rest else {name for name in found.names if name in ARROWS}


def reachable(part: str) -> set[str]:
    seen: set[str] = set()
    waiting = [part]
    while waiting:
        waiting += (here := ARROWS[waiting.pop()]) - seen
        seen |= here
    return seen | {part}


def violations(source: str, part: str, package: str) -> list[str]:
    """What a module of ``part`` must not do."""
    found = []
    for one in imports(source, package):
        found += [f"line {one.line}: {part} -> {other}" for other in parts_imported(one) - reachable(part)]
        top = one.module.split(".")[0]
        foreign = top not in {"moefast", "mlx", "numpy", "__future__", *sys.stdlib_module_names}
        if foreign and not one.deferred and part not in EXTRAS:
            found.append(f"line {one.line}: {part} needs {top} to be imported")
        if one.module == "moefast" and not one.deferred and not parts_imported(one):
            found.append(f"line {one.line}: {part} imports the package that imports it")
        if top == "os" and {"environ", "getenv"} & set(one.names) and part != "env":
            found.append(f"line {one.line}: environment variables are read in env.py")
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Attribute)
            and ast.unparse(node) in ("os.environ", "os.getenv")
            and part != "env"
        ):
            found.append(f"line {node.lineno}: environment variables are read in env.py")
    return found


FILES = sorted(file for file in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_down(file: Path) -> None:
    part = part_of(file)
    if part == "__init__":  # it names everything, but importing it must not need the extras
        now = [found for found in imports(file.read_text(), "moefast") if not found.deferred]
        assert not EXTRAS & {part for found in now for part in parts_imported(found)}
        return
    assert part in ARROWS, f"{file.name} needs a row in ARROWS"
    package = ".".join(file.relative_to(ROOT).parent.parts)
    assert violations(file.read_text(), part, package) == []


def test_arrows_have_no_cycle() -> None:
    for part, below in ARROWS.items():
        assert all(part not in reachable(other) for other in below), part


def test_reference_knows_no_other_backend() -> None:
    """It is the yardstick: the others may fall back on it, not the other way round."""
    for file in (PACKAGE / "backends" / "reference").glob("*.py"):
        for found in imports(file.read_text(), "moefast.backends.reference"):
            if found.module.startswith("moefast.backends"):
                assert found.module.startswith("moefast.backends.reference"), (file.name, found)


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("from ..nn import Router", "ops"),
        ("from moefast.nn import Router", "ops"),
        ("import moefast.lm", "models"),
        ("from .. import nn", "ops"),
        ("def f():\n    from ..models import dbrx", "nn"),  # late is still up
        ("import mlx_lm", "nn"),
        ("from mlx_lm.models import cache", "ops"),
        ("from .. import route", "nn"),
        ("import os\nvalue = os.environ['HOME']", "nn"),
        ("from os import getenv", "nn"),
        ("import os\n\ndef f():\n    return os.getenv('HOME')", "lm"),
        ("from ..specs import RouterSpec", "emulator"),
    ],
)
def test_a_violation_is_found(source: str, part: str) -> None:
    assert violations(source, part, f"moefast.{part}")


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("from ..ops import route", "nn"),
        ("from .route import route", "ops"),
        ("from ..specs import RouterSpec", "models"),
        ("def f():\n    import mlx_lm", "nn"),
        ("if TYPE_CHECKING:\n    import mlx_lm", "nn"),
        ("import mlx_lm", "models"),
        ("import os\nvalue = os.environ", "env"),
        ("from .. import ops", "lm"),
    ],
)
def test_what_is_allowed_is_let_through(source: str, part: str) -> None:
    assert violations(source, part, f"moefast.{part}") == []


WITHOUT_EXTRAS = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("mlx_lm", "transformers", "safetensors", "rich", "huggingface_hub"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())

import mlx.core as mx
import moefast

spec = moefast.RouterSpec(num_experts=4, top_k=2)
stack, dense = moefast.Projection(mx.ones((4, 8, 8))), moefast.Projection(mx.ones((8, 8)))
weights = moefast.ExpertWeights(up=stack, gate=stack, down=stack)
shared = moefast.SharedExpert(up=dense, gate=dense, down=dense)
x, logits = mx.ones((3, 8)), mx.ones((3, 4))
routing = moefast.route(logits, spec)
moefast.switch_glu(x, weights, routing.indices)
mx.eval(moefast.experts(x, weights, routing), moefast.quantized_matmul(x, dense))
mx.eval(moefast.moe(x, logits, spec, weights, shared=shared))
import moefast.testing
print("ran")
"""


def run(program: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def test_operations_run_without_mlx_lm() -> None:
    assert run(WITHOUT_EXTRAS) == "ran\n"


def test_import_leaves_mlx_lm_alone() -> None:
    """Installed or not: importing it takes a second, and pulls in transformers."""
    program = "import sys, moefast; print(sorted({'mlx_lm', 'transformers', 'rich'} & set(sys.modules)))"
    assert run(program) == "[]\n"
