"""Launching the kernels: by MLX on an Apple GPU, or by the emulator.

A :class:`Function` is a body for ``mx.fast.metal_kernel`` that calls into one file of ``kernels/``. MLX's
kernel object is made once for each. Tests see every launch through :func:`recorded`, and have the emulator
check and shuffle them within :func:`emulation`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, lru_cache
from hashlib import blake2s
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

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


class _Watch(NamedTuple):
    """What is not as on a GPU in use: one thing to ask for at each launch."""

    emulation: Emulation | None = None
    launches: list[Launch] | None = None


_watch: ContextVar[_Watch | None] = ContextVar(
    "moefast_launches", default=_Watch(Emulation()) if settings.metal == "emulate" else None
)


# One for each block that watches, in whatever thread: a launch on a GPU in use looks no further.
_watchers: list[object] = [settings] if settings.metal == "emulate" else []


@contextmanager
def _watching(**changes: Any) -> Iterator[None]:
    token = _watch.set((_watch.get() or _Watch())._replace(**changes))
    _watchers.append(token)
    try:
        yield
    finally:
        _watchers.remove(token)
        _watch.reset(token)


@contextmanager
def emulation(mode: Literal["run", "check"], seed: int | None = None) -> Iterator[None]:
    """Within the block, kernels run in the emulator, in this mode."""
    with _watching(emulation=Emulation(mode, seed)):
        yield


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Every launch made within the block, in order."""
    launches: list[Launch] = []
    with _watching(launches=launches):
        yield launches


# A launch of which all but the inputs and the shapes of the outputs is fixed.
Prepared = Callable[[Sequence[mx.array], Sequence[Shape]], list[mx.array]]


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
        emulation, launches = _watch.get() or _Watch()
        made: list[mx.array]
        result = None
        if emulation is None:
            made = _compiled(self)(**arguments)
        else:
            made, result = _emulated(self, emulation, arguments, with_result=launches is not None)
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

    def prepare(
        self, *, template: Template, grid: Size, threadgroup: Size, dtypes: Sequence[mx.Dtype]
    ) -> Prepared:
        """A call with these arguments, ``dtypes`` being the outputs': what is left of it costs little."""
        kernel = _compiled(self)
        constants, kinds = list(template), list(dtypes)

        def launch(inputs: Sequence[mx.array], shapes: Sequence[Shape]) -> list[mx.array]:
            if not _watchers or _watch.get() is None:
                made: list[mx.array] = kernel(
                    inputs=inputs,
                    output_shapes=shapes,
                    output_dtypes=kinds,
                    grid=grid,
                    threadgroup=threadgroup,
                    template=constants,
                )
                return made
            outputs = list(zip(shapes, kinds, strict=True))
            return self(inputs, template=constants, grid=grid, threadgroup=threadgroup, outputs=outputs)

        return launch


def emulated() -> bool:
    """Whether kernels run in the emulator here and now."""
    watch = _watch.get()
    return watch is not None and watch.emulation is not None


@cache
def _compiled(function: Function) -> Any:
    return mx.fast.metal_kernel(**_construction(function))


@lru_cache(maxsize=256)
def _emulator_kernel(function: Function, how: Emulation) -> Any:
    from ... import emulator

    return emulator.metal_kernel(**_construction(function), mode=how.mode, seed=how.seed)


def _emulated(
    function: Function, how: Emulation, arguments: dict[str, Any], *, with_result: bool
) -> tuple[list[mx.array], Result | None]:
    kernel = _emulator_kernel(function, how)
    if not with_result:  # the call knows transformations, and refuses them in words
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
