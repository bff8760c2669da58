"""Finding the extension modules: which binding of the kernels can be used here, and why not."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import mlx.core as mx

from ... import tuning
from ...env import settings
from ...weights import Layout


class Bindings(NamedTuple):
    """What was found: at most one of the two modules.

    Attributes:
        native: ``moefast._native``, ready to use.
        kernels: ``moefast._kernels``, to use in its place.
        reason: why there is no ``native``; and no ``kernels`` either, where both are None.
    """

    native: Any
    kernels: Any
    reason: str


_found: Bindings | None = None
_lock = threading.Lock()


def bindings() -> Bindings:
    """Import and try out the extension modules, the faster one first; warns where it has to be the other."""
    global _found
    if _found is None:
        with _lock:
            if _found is None:
                _found = _look()
    return _found


def probe() -> str | None:
    """Why no kernel can run here, or None."""
    found = bindings()
    return None if found.native or found.kernels else found.reason


def threads() -> int:
    """How many the kernels are to use: as the environment says, or as was found fastest; 0 for every core."""
    return settings.threads or tuning.threads()


def build_info(name: str) -> str:
    """What the build wrote down; empty where nothing was built (a bare checkout on sys.path)."""
    try:
        return str(getattr(import_module("moefast._build_info"), name))
    except ImportError:
        return ""


def describe() -> dict[str, str | int]:
    """For ``moefast doctor``: the binding, the instruction set and the threads in use, and what was built.
    Empty where no kernel can run."""
    found = bindings()
    if found.native:
        engine: dict[str, str | int] = {
            "runs through": "MLX primitives",
            "isa": found.native.engine_isa(),
            "threads": found.native.engine_threads(),
        }
    elif found.kernels:
        from .through_numpy import engine as numpy_engine

        engine = {
            "runs through": f"NumPy: {found.reason}",
            "isa": numpy_engine().isa,
            "threads": numpy_engine().threads,
        }
    else:
        return {}
    return {
        **engine,
        "isas": ", ".join((found.native or found.kernels).isas()),
        "built for MLX": build_info("BUILT_FOR_MLX") or "none",
        "compiler": build_info("COMPILER"),
    }


def _look() -> Bindings:
    native, reason = _usable("_native", _mismatch(), _try_native)
    if native is not None:
        return Bindings(native, None, "")
    kernels, numpy_reason = _usable("_kernels", build_info("NO_KERNELS"), _try_kernels)
    if kernels is None:
        return Bindings(None, None, reason if reason == numpy_reason else f"{reason}; {numpy_reason}")
    warnings.warn(
        f"moefast's CPU kernels run through NumPy, more slowly and not under mx.compile: {reason}. "
        f"To mend it, {_remedy()}.",
        RuntimeWarning,
        stacklevel=2,
    )
    return Bindings(None, kernels, reason)


def _mismatch() -> str:
    """Why ``moefast._native`` must not even be imported: with another MLX it may end the process."""
    if reason := build_info("NO_NATIVE"):
        return f"moefast._native was not built ({reason})"
    built, running = build_info("BUILT_FOR_MLX"), mx.__version__  # type: ignore[attr-defined]
    if built and built != running:
        return f"moefast._native was built for MLX {built}, and this is MLX {running}"
    return ""


def _remedy() -> str:
    rebuild = "pip install --no-build-isolation --no-deps --force-reinstall moefast (or its checkout)"
    built = build_info("BUILT_FOR_MLX")
    return f"pip install mlx=={built}, or rebuild: {rebuild}" if built else f"rebuild: {rebuild}"


def _usable(name: str, reason: str, attempt: Callable[[ModuleType], None]) -> tuple[ModuleType | None, str]:
    if reason:
        return None, reason
    try:
        module = import_module(f"moefast.{name}")
        attempt(module)
    except (ImportError, TypeError, ValueError, RuntimeError, MemoryError) as error:
        return None, f"moefast.{name} cannot be used: {error}"
    return module, ""


# An extension built with another nanobind imports, and then takes no array: only a call can tell.


def _try_native(module: Any) -> None:
    module.configure(threads(), settings.isa)
    layout = Layout(0, 1, 1, mx.float32, None, None, False)
    operator = module.plan(
        "quantized_matmul", ["float32"], layout=layout, out_dtype="float32", reference=lambda arrays: arrays
    )
    with mx.stream(mx.cpu):
        one = mx.ones((1, 1))
        y = operator.matmul(one, module.Weights([one]))
    if y.item() != 1.0:
        raise RuntimeError(f"1 x 1 must be 1, got {y.item()}")


def _try_kernels(module: Any) -> None:
    import numpy as np

    one = np.ones((1, 1), np.float32)
    y = module.Engine(threads(), settings.isa).matmul(one, module.Projection(one))
    if y.item() != 1.0:
        raise RuntimeError(f"1 x 1 must be 1, got {y.item()}")
