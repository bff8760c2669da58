"""Launching the kernels: by MLX on an Apple GPU, or by the emulator.

A :class:`Function` is a body for ``mx.fast.metal_kernel`` that calls into one file of ``kernels/``. MLX's
kernel object is made once for each. Tests see every launch through :func:`recorded`, and have the emulator
check and shuffle them within :func:`emulation`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, lru_cache
from hashlib import blake2s
from typing import TYPE_CHECKING, Any, Literal

import mlx.core as mx

from ...env import settings
from ...weights import Shape
from .source import header_of

if TYPE_CHECKING:
    from ...emulator import Result

Template = Sequence[tuple[str, bool | int | mx.Dtype]]
Size = tuple[int, int, int]


@dataclass(frozen=True)
class Emulation:
    """How the emulator runs kernels: fast, or checked, in an order of threads drawn from ``seed``."""

    mode: Literal["run", "check"] = "run"
    seed: int | None = None


@dataclass(frozen=True, eq=False)
class Launch:
    """A launch that was made.

    Attributes:
        name: of the function.
        inputs, outputs: by name.
        result: the emulator's: counters, time; None on a GPU.
    """

    name: str
    inputs: dict[str, mx.array]
    outputs: dict[str, mx.array]
    result: Result | None


_emulation: ContextVar[Emulation | None] = ContextVar(
    "moefast_emulation", default=Emulation() if settings.metal == "emulate" else None
)
_launches: ContextVar[list[Launch] | None] = ContextVar("moefast_launches", default=None)


@contextmanager
def emulation(mode: Literal["run", "check"], seed: int | None = None) -> Iterator[None]:
    """Within the block, kernels run in the emulator, in this mode."""
    token = _emulation.set(Emulation(mode, seed))
    try:
        yield
    finally:
        _emulation.reset(token)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Every launch made within the block, in order."""
    launches: list[Launch] = []
    token = _launches.set(launches)
    try:
        yield launches
    finally:
        _launches.reset(token)


@dataclass(frozen=True)
class Function:
    """A kernel as ``mx.fast.metal_kernel`` takes it. Equal functions share one kernel object.

    Attributes:
        name: of the kernel; a letter first, then letters, digits and underscores.
        file: the one of ``kernels/`` that it calls into.
        inputs, outputs: names of the buffers.
        body: what each thread does. Inputs of fewer than 8 elements are ``constant`` there, others
            ``device``: hand pointers on to templates.
    """

    name: str
    file: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    body: str

    def __call__(
        self,
        inputs: Sequence[mx.array],
        *,
        template: Template,
        grid: Size,
        threadgroup: Size,
        outputs: Sequence[tuple[Shape, mx.Dtype]],
    ) -> list[mx.array]:
        """Launch it.

        Args:
            inputs: in the order of their names, row-contiguous: MLX would copy others without a word.
            template: compile-time arguments, by name.
            grid: threads, a whole number of threadgroups in each dimension.
            threadgroup: threads of one of them.
            outputs: shape and dtype of each.

        Raises:
            EmulatorError, CompileError: of the emulator, where that runs it.
        """
        arguments: dict[str, Any] = {
            "inputs": inputs,
            "template": template,
            "grid": grid,
            "threadgroup": threadgroup,
            "output_shapes": [shape for shape, _ in outputs],
            "output_dtypes": [dtype for _, dtype in outputs],
        }
        result = None
        how = _emulation.get()
        if how is not None:
            made, result = _emulated(self, how, arguments)
        else:
            made = _compiled(self)(**arguments)
        launches = _launches.get()
        if launches is not None:
            launches.append(
                Launch(
                    self.name,
                    dict(zip(self.inputs, inputs, strict=True)),
                    dict(zip(self.outputs, made, strict=True)),
                    result,
                )
            )
        return made


def emulated() -> bool:
    """Whether kernels run in the emulator here and now."""
    return _emulation.get() is not None


@cache
def _compiled(function: Function) -> Any:
    return mx.fast.metal_kernel(**_construction(function))


@lru_cache(maxsize=256)
def _emulator_kernel(function: Function, how: Emulation) -> Any:
    from ... import emulator

    return emulator.metal_kernel(**_construction(function), mode=how.mode, seed=how.seed)


def _emulated(
    function: Function, how: Emulation, arguments: dict[str, Any]
) -> tuple[list[mx.array], Result | None]:
    kernel = _emulator_kernel(function, how)
    if _launches.get() is None:  # the call knows transformations, and refuses them in words
        made: list[mx.array] = kernel(**arguments)
        return made, None
    result, made = kernel.run(**arguments)
    return made, result


def _construction(function: Function) -> dict[str, Any]:
    # MLX builds a kernel anew whenever another source has come under its name.
    source = "\n".join((function.file, *function.inputs, "", *function.outputs, "", function.body))
    digest = blake2s(source.encode(), digest_size=4).hexdigest()
    return {
        "name": f"moefast_{function.name}_{digest}",
        "input_names": function.inputs,
        "output_names": function.outputs,
        "source": function.body,
        "header": header_of(function.file),
    }
