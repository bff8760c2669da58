"""The backends, fastest first, and how a caller picks one."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import Token
from types import TracebackType

from ..registry import Registry
from .metal import METAL, METAL_FAST
from .native import NATIVE
from .reference import REFERENCE

registry = Registry((METAL, METAL_FAST, NATIVE, REFERENCE))


def backends() -> Mapping[str, str | None]:
    """Every backend, in the order in which ``"auto"`` asks: name -> None where it can run here, else the
    reason it cannot. ``metal-fast`` must be asked for by name."""
    return {b.name: b.unavailable for b in registry.backends}


class use_backend:  # noqa: N801 (used like a function)
    """Choose the backend that ``backend="auto"`` stands for.

    As a statement it sets the default of the whole process (servers run models on other threads); in a
    ``with`` block it holds for the block's own thread or task only, and ends with the block::

        moefast.use_backend("reference")            # from here on, everywhere

        with moefast.use_backend("reference"):      # here, until the block ends
            ...

    ``mx.compile`` freezes the choice when it traces: a compiled function keeps the backend it was traced
    with.

    Raises:
        ValueError: no such backend.
    """

    def __init__(self, name: str):
        self._name = registry.check(name)
        registry.add_default(name, self)
        self._tokens: list[Token[str | None]] = []

    def __enter__(self) -> use_backend:
        if not self._tokens:  # the statement's effect on the process becomes this context's
            registry.withdraw_default(self)
        self._tokens.append(registry.push(self._name))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        registry.pop(self._tokens.pop())
