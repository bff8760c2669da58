"""What modules of a model are called with and what they answer, while a model runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.nn

_CALLS = "_moefast_calls"


class Call(NamedTuple):
    """One call: its arguments in their order, and the answer."""

    arguments: tuple[Any, ...]
    answer: Any


class _Recorder:
    """Goes before a module's class: ``__call__`` of an instance is not looked up by Python."""

    def __call__(self: Any, *arguments: Any, **named: Any) -> Any:
        answer = super().__call__(*arguments, **named)  # type: ignore[misc]
        self.__dict__[_CALLS].append(Call((*arguments, *named.values()), answer))
        return answer


@contextmanager
def recorded(modules: Sequence[mlx.nn.Module]) -> Iterator[list[list[Call]]]:
    """Within the ``with`` block every call is recorded; yields a growing list for each module."""
    calls: list[list[Call]] = [[] for _ in modules]
    former = [type(module) for module in modules]
    try:
        for module, kind, own in zip(modules, former, calls, strict=True):
            module.__dict__[_CALLS] = own
            names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
            module.__class__ = type(kind.__name__, (_Recorder, kind), names)
        yield calls
    finally:
        for module, kind in zip(modules, former, strict=True):
            module.__class__ = kind
            module.__dict__.pop(_CALLS, None)
