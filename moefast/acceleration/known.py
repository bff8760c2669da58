"""Whether a class of mlx-lm still is what :mod:`moefast.families` was read from.

What an adapter takes over must compute what the row says, not what a class of that name once computed. So the
text of each function is compared, by digest, with the text that was read; and the function that runs must be
the one that stands in the file. A class that another release changed, that someone patched or derived from,
is left alone.

    python -m moefast.acceleration.known           # write the digests of the installed mlx-lm

is run only after the rows have been checked against it (tests/test_acceleration_families.py does).
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
import textwrap
from collections.abc import Iterable
from functools import cache
from importlib import import_module
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from ..families import BLOCKS

DIGESTS = Path(__file__).with_name("known.json")
PACKAGE = "mlx_lm.models"

# Beside the blocks: stacks of experts, the activations between their projections, and attention.
OTHERS = (
    "switch_layers.SwitchGLU.__call__",
    "switch_layers.SwitchMLP.__call__",
    "switch_layers.SwitchLinear.__call__",
    "switch_layers.QuantizedSwitchLinear.__call__",
    "switch_layers.SwiGLU.__call__",
    "activations.swiglu",
    "activations.SwigluOAI.__call__",
    "activations.swiglu_oai",
    "activations.precise_swiglu",
    "gemma4_text.GeGLU.__call__",
    "gemma4_text.geglu",
    "gemma4_text.Router.__call__",
    "gemma4_text.Experts.__call__",
    "step3p5.ClampedSwiGLU.__call__",
    "step3p5.clamped_swiglu",
    "deepseek_v41.DeepseekV41SwiGLU.__call__",
    "kimi_k3.SiTU.__call__",
    "kimi_k3._situ",
    "muse_spark.PreciseSwiGLU.__call__",
    "dbrx.SparseMoeBlock.__call__",
    "dbrx.Router.__call__",
    "dbrx.MLP.__call__",
    "base.scaled_dot_product_attention",
)


def why_changed(sources: Iterable[str]) -> str | None:
    """Why one of these functions of ``mlx_lm.models`` is not what was read, or None.

    Args:
        sources: ``module.function`` or ``module.Class.function``.
    """
    for source in sources:
        reason = _why_changed(source)
        if reason is not None:
            return reason
    return None


def why_unlike(module: Any, kind: str) -> str | None:
    """Why an ``mlx.nn.Module`` is not plainly of the class ``kind`` (``module.Class`` of mlx-lm's models), as
    it was read; or None."""
    found = f"{type(module).__module__.removeprefix(PACKAGE + '.')}.{type(module).__qualname__}"
    if found != kind:
        return f"it is a {found}, not mlx-lm's {kind}"
    return why_changed([f"{kind}.__call__"])


def _why_changed(source: str) -> str | None:
    # Not remembered: a function may be patched between two calls.
    module_name, *path = source.split(".")
    try:
        module = import_module(f"{PACKAGE}.{module_name}")
    except ImportError as error:
        return f"mlx_lm.models.{module_name} cannot be imported ({error})"
    written = _written(module)
    if written is None:
        return f"the source of mlx_lm.models.{module_name} cannot be read"
    name = ".".join(path)
    found = written.get(name)
    if found is None:
        return f"mlx-lm has no {source}"
    if found[0] != _digests().get(source):
        return f"mlx-lm's {source} is not the one moefast knows"
    running: Any = module
    for part in path:
        running = running.__dict__.get(part)
    if isinstance(running, FunctionType):
        code = running.__code__
        if (code.co_filename, code.co_firstlineno) != (module.__file__, found[1]):
            return f"{source} has been patched ({code.co_filename}:{code.co_firstlineno})"
    elif len(path) > 1:  # a function that MLX compiled is no Python function, a method always is one
        return f"{source} has been patched"
    return None


@cache
def _digests() -> dict[str, str]:
    known: dict[str, str] = json.loads(DIGESTS.read_text(encoding="utf-8"))
    return known


@cache
def _written(module: ModuleType) -> dict[str, tuple[str, int]] | None:
    """Name -> digest of the text and first line, of all functions and methods in a module's file."""
    try:
        text = Path(str(module.__file__)).read_text(encoding="utf-8")
    except OSError:
        return None
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = _digest(text, node)
        elif isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    found[f"{node.name}.{inner.name}"] = _digest(text, inner)
    return found


def _digest(text: str, node: ast.FunctionDef) -> tuple[str, int]:
    """Of the lines as they stand, but for their common indentation; decorators belong to them."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    lines = "\n".join(line.rstrip() for line in text.splitlines()[first - 1 : node.end_lineno])
    return hashlib.sha256(textwrap.dedent(lines).encode()).hexdigest()[:16], first


def _sources() -> list[str]:
    shared = [f"{block.shared_class}.__call__" for block in BLOCKS if block.shared_class is not None]
    return sorted({*OTHERS, *shared, *(source for block in BLOCKS for source in block.sources)})


def main() -> None:
    """Write the digests of the installed mlx-lm."""
    digests = {}
    for source in _sources():
        module, _, name = source.partition(".")
        written = _written(import_module(f"{PACKAGE}.{module}"))
        if written is None or name not in written:
            sys.exit(f"no {source}")
        digests[source] = written[name][0]
    DIGESTS.write_text(json.dumps(digests, indent=0) + "\n", encoding="utf-8")
    print(f"{DIGESTS}: {len(digests)} functions")


if __name__ == "__main__":
    main()
