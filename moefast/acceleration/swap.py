"""A module becomes accelerated by its class, and the original again the same way.

``__call__`` of an instance is not looked up by Python, and a module put in the place of another would lose
its identity, its parameters' names and every reference to it. A class that derives from the module's own
changes the forward pass and nothing else: parameters, saving, quantizing, ``deepcopy``, ``isinstance``.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.nn

from ..registry import phase_of

_STATE = (
    "_moefast_backend",
    "_moefast_originals",
    "_recall",
    "_recall_rows",
    "_recall_products",
)


def swap(
    module: mlx.nn.Module,
    ahead: type,
    backend: str,
    originals: frozenset[str] = frozenset(),
    **attributes: Any,
) -> None:
    """Put ``ahead`` before the class of ``module``.

    Args:
        module: becomes an instance of a class derived from ``ahead`` and its own.
        ahead: overrides what is to be another.
        backend: its ``_moefast_backend``.
        originals: phases in which the original goes on running.
        attributes: of the new class; hashable.
    """
    module.__dict__["_moefast_backend"] = backend
    if originals:
        module.__dict__["_moefast_originals"] = originals
    module.__class__ = _derived(ahead, type(module), tuple(attributes.items()))


def original_of(module: mlx.nn.Module) -> type | None:
    """The class that ``module`` had before :func:`swap`, or None where it has that class still."""
    found: type | None = type(module).__dict__.get("_moefast_original")
    return found


def unswap(module: mlx.nn.Module) -> bool:
    """Undo :func:`swap`; whether there was something to undo."""
    original = original_of(module)
    if original is None:
        return False
    module.__class__ = original
    for name in _STATE:
        module.__dict__.pop(name, None)
    return True


def runs_original(module: Any, shape: tuple[int, ...]) -> bool:
    """Whether a swapped module runs its original on an input of this shape: in training, and in the phases
    that were said to be."""
    own = module.__dict__
    if own["_training"]:
        return True
    originals = own.get("_moefast_originals")
    return originals is not None and phase_of(shape) in originals


@cache
def _derived(ahead: type, kind: type, attributes: tuple[tuple[str, Any], ...]) -> type:
    # By module and name a class of layers is known, and printed: they stay.
    members = {
        "_moefast_original": kind,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "__reduce_ex__": _reduce,
        "_moefast_made": (ahead.__dict__.get("_moefast_made_by", ahead), kind, attributes),
    }
    return type(kind.__name__, (ahead, kind), {**dict(attributes), **members})


def _reduce(module: Any, protocol: int) -> tuple[Any, ...]:
    """For pickle and copy: a module like any other, but for its class, which is no module's attribute."""
    made: Any = object.__reduce_ex__(module, max(protocol, 2))
    return _bare, type(module)._moefast_made, *made[2:]


def _bare(ahead: Any, kind: type, attributes: tuple[tuple[str, Any], ...]) -> Any:
    """A module of a derived class, before its state; ``ahead`` may be a function and arguments for it."""
    if isinstance(ahead, tuple):
        make, arguments = ahead
        ahead = make(*arguments)
    derived: Any = _derived(ahead, kind, attributes)
    return derived.__new__(derived)
