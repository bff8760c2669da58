"""The twin of mx.fast.metal_kernel: the same signature, the same source, the same rules; on the CPU, and
eager."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from . import generated
from .compile import Kernel, compile
from .launch import Denormals, Mode, Output, Result, launch
from .reflect import MOST_THREADS

_UTILS = '#include "mlx/backend/metal/kernels/utils.h"\n'
_MATH_MODES = ("safe", "relaxed", "fast")
_T = TypeVar("_T")


def mlx_include_dir() -> Path:
    """Where the installed MLX keeps its Metal headers: the root of ``mlx/backend/metal/kernels``."""
    return Path(mx.__file__).resolve().parent / "include"


@dataclass(frozen=True)
class MetalKernel:
    """A kernel of which the body is given, and the signature made for each call (see ``metal_kernel``).

    Attributes:
        mode, seed, raises, time_limit, denormals, allow_equal_writes: see ``launch``.
    """

    name: str
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    source: str
    header: str
    ensure_row_contiguous: bool
    atomic_outputs: bool
    mode: Mode = "run"
    seed: int | None = None
    raises: bool = True
    time_limit: float = 60.0
    denormals: Denormals = "keep"
    allow_equal_writes: bool = False
    _compiled: dict[str, Kernel] = field(default_factory=dict, compare=False, repr=False)

    def __call__(
        self,
        *,
        inputs: Sequence[mx.array | bool | int | float],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: generated.Template | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: Any = None,
    ) -> list[mx.array]:
        """Run the kernel: as ``mx.fast.metal_kernel``'s call. ``stream`` is of no consequence.

        Raises:
            TypeError, ValueError: as MLX; and a dtype is not Metal's.
            RuntimeError: called under ``mx.compile`` or another transformation.
            CompileError, EmulatorError: see ``compile`` and ``launch``.
        """
        outputs: list[mx.array] = []

        def forward(*arrays: mx.array) -> list[mx.array]:
            _, found = self.run(
                inputs=arrays,
                output_shapes=output_shapes,
                output_dtypes=output_dtypes,
                grid=grid,
                threadgroup=threadgroup,
                template=template,
                init_value=init_value,
                verbose=verbose,
            )
            outputs[:] = found
            return found

        return _refusing_gradients(forward, [_array(value) for value in inputs])

    def run(
        self,
        *,
        inputs: Sequence[mx.array | bool | int | float],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: generated.Template | None = None,
        init_value: float | None = None,
        verbose: bool = False,
    ) -> tuple[Result, list[mx.array]]:
        """As a call, and what the launch reported: counters, findings (with ``raises=False``), time."""
        for what, got, names in (
            ("inputs", inputs, self.input_names),
            ("output_shapes", output_shapes, self.output_names),
            ("output_dtypes", output_dtypes, self.output_names),
        ):
            if len(got) != len(names):
                raise ValueError(
                    f"[metal_kernel] Expected `{what}` to have size {len(names)} but got size {len(got)}."
                )
        arrays = [_array(value) for value in inputs]
        pairs = _template(template)
        _sizes("grid", grid)
        if (threads := math.prod(_sizes("threadgroup", threadgroup))) > MOST_THREADS:
            # As asked for: before it is clamped to the grid.
            raise ValueError(
                f"[metal_kernel] Thread group size ({threads}) is greater than the maximum allowed threads "
                f"per threadgroup ({MOST_THREADS})."
            )
        text = self.generated_source(arrays, output_dtypes, pairs)
        if verbose:
            print(f"Generated source code for `{self.name}`:\n```\n{text}\n```")
        kernel = self._kernel(text, generated.kernel_name(self.name, arrays, output_dtypes, pairs))
        buffers: list[np.ndarray | Output] = []
        uses = generated.uses(self.source, self.input_names)
        for name, array, used in zip(self.input_names, arrays, uses, strict=True):
            buffers += self._input_buffers(name, array, used)
        first_output = len(buffers)
        for shape, dtype in zip(output_shapes, output_dtypes, strict=True):
            buffers.append(_output(tuple(shape), dtype, init_value))
        result = launch(
            kernel,
            buffers,
            grid,
            threadgroup,
            mode=self.mode,
            seed=self.seed,
            raises=self.raises,
            time_limit=self.time_limit,
            denormals=self.denormals,
            allow_equal_writes=self.allow_equal_writes,
        )
        found = [
            _to_mlx(result.buffers[first_output + i], tuple(shape), dtype)
            for i, (shape, dtype) in enumerate(zip(output_shapes, output_dtypes, strict=True))
        ]
        return result, found

    def generated_source(
        self, inputs: Sequence[mx.array], output_dtypes: Sequence[mx.Dtype], template: generated.Template = ()
    ) -> str:
        """What MLX would compile, after its own headers."""
        return generated.source(
            self.name,
            self.header,
            self.source,
            self.input_names,
            inputs,
            self.output_names,
            output_dtypes,
            template,
            self.atomic_outputs,
        )

    def _kernel(self, text: str, name: str) -> Kernel:
        if text not in self._compiled:
            self._compiled[text] = compile(
                text,
                name,
                include_dirs=[mlx_include_dir()],
                name=f"{self.name}.metal",
                prelude=_UTILS,
            )
        return self._compiled[text]

    def _input_buffers(self, name: str, array: mx.array, used: tuple[bool, bool, bool]) -> list[np.ndarray]:
        data, strides = _to_numpy(name, array, self.ensure_row_contiguous)
        if not array.ndim:
            return [data]
        shape: list[np.ndarray] = [np.array(array.shape, np.int32), np.array(strides, np.int64)]
        values = [*shape, np.array([array.ndim], np.int32)]
        return [data, *(value for value, wanted in zip(values, used, strict=True) if wanted)]


def metal_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
    compile_options: Mapping[str, str] | None = None,
    *,
    mode: Mode = "run",
    seed: int | None = None,
    raises: bool = True,
    time_limit: float = 60.0,
    denormals: Denormals = "keep",
    allow_equal_writes: bool = False,
) -> MetalKernel:
    """``mx.fast.metal_kernel`` on the CPU: the same arguments, and a few of the emulator's own after them.

    Args:
        name, input_names, output_names, source, header, ensure_row_contiguous, atomic_outputs: as MLX's.
        compile_options: ``{"math_mode": "safe" | "relaxed" | "fast"}``; computed as ``safe`` in any case.
        mode: ``run`` or ``check``.
        seed, raises, time_limit, denormals, allow_equal_writes: see ``launch``.

    Raises:
        TypeError: names are not a sequence.
        ValueError: there is no output, or an option is unknown.
    """
    for what, names in (("input_names", input_names), ("output_names", output_names)):
        if isinstance(names, str):
            raise TypeError(f"[metal_kernel] Expected `{what}` to be a sequence of names, got {names!r}.")
    if not isinstance(compile_options, Mapping | None):
        raise ValueError(f"[metal_kernel] Expected `compile_options` to be a dict, got {compile_options!r}.")
    if not output_names:
        raise ValueError("[metal_kernel] Must specify at least one output.")
    for option, value in (compile_options or {}).items():
        if option != "math_mode":
            raise ValueError(f"[metal_kernel] Unknown compile option `{option}`.")
        if value not in _MATH_MODES:
            raise ValueError(
                f"[metal_kernel] Expected math_mode to be 'safe', 'relaxed', or 'fast', got {value!r}."
            )
    return MetalKernel(
        name,
        tuple(input_names),
        tuple(output_names),
        source,
        header,
        ensure_row_contiguous,
        atomic_outputs,
        mode,
        seed,
        raises,
        time_limit,
        denormals,
        allow_equal_writes,
    )


def _template(template: generated.Template | None) -> list[tuple[str, bool | int | mx.Dtype]]:
    pairs = []
    for pair in template or ():
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[0], str):
            raise TypeError(
                f"[metal_kernel] Expected `template` to be pairs of name and value, got {pair!r}."
            )
        key, value = pair
        fits = not isinstance(value, int) or -(2**31) <= value < 2**31
        if not isinstance(value, bool | int | mx.Dtype) or not fits:
            raise ValueError(
                "[metal_kernel] Invalid template argument. Must be `mlx.core.Dtype`, `int` or `bool`, "
                f"got {key}={value!r}."
            )
        pairs.append((key, value))
    return pairs


def _sizes(what: str, sizes: tuple[int, int, int]) -> tuple[int, int, int]:
    indices = isinstance(sizes, tuple | list) and [hasattr(size, "__index__") for size in sizes]
    if indices != [True] * 3:
        raise TypeError(f"[metal_kernel] Expected `{what}` to be three ints, got {sizes!r}.")
    return sizes


def _array(value: mx.array | bool | int | float) -> mx.array:
    if isinstance(value, list | tuple | str | None):
        # As MLX's, which takes arrays and scalars only.
        raise ValueError(f"Invalid type {type(value).__name__} received in array initialization.")
    return value if isinstance(value, mx.array) else mx.array(value)


def _refusing_gradients(run: Callable[..., list[mx.array]], inputs: list[mx.array]) -> list[mx.array]:
    """Runs, and refuses to be differentiated: a result without a gradient would be a wrong gradient."""
    function: Any = mx.custom_function(run)

    def refuse(*_: Any) -> Any:
        raise RuntimeError(
            "[metal_kernel] an emulated kernel is eager and has no gradient: call it outside of mx.grad, "
            "mx.vjp, mx.jvp and mx.vmap, or wrap it in an mx.custom_function with one."
        )

    function.vjp(refuse)
    function.jvp(refuse)
    function.vmap(refuse)
    return list(function(*inputs))


def _to_numpy(name: str, array: mx.array, contiguous: bool) -> tuple[np.ndarray, list[int]]:
    """The array's memory, C-contiguous, and its strides in elements."""
    try:
        mx.eval(array)
    except (RuntimeError, ValueError) as error:
        raise RuntimeError(
            "[metal_kernel] an emulated kernel is eager: it cannot be called under mx.compile, mx.vmap or "
            f"another transformation ({error})"
        ) from None
    bits = array.view(mx.uint16) if array.dtype == mx.bfloat16 and array.ndim else array
    if array.dtype == mx.bfloat16 and not array.ndim:
        bits = array.reshape(1).view(mx.uint16)
    if contiguous or array.ndim == 0:
        data = np.ascontiguousarray(np.array(bits))
        strides = [step // data.itemsize for step in data.strides] if array.ndim else []
        return data.reshape(-1), strides
    # As the array lies in memory: the view's first element onwards, to the end of what its strides reach.
    view = np.asarray(memoryview(bits))  # type: ignore[arg-type]
    strides = [step // view.itemsize for step in view.strides]
    if view.size and min(strides) < 0:
        raise ValueError(
            f"[metal_kernel] with ensure_row_contiguous=False the emulator takes no negative strides, got "
            f"{strides} of {name}."
        )
    last = sum((size - 1) * step for size, step in zip(view.shape, strides, strict=True)) if view.size else -1
    flat = np.lib.stride_tricks.as_strided(view, (last + 1,), (view.itemsize,))
    return np.ascontiguousarray(flat), strides


def _output(shape: tuple[int, ...], dtype: mx.Dtype, init_value: float | None) -> np.ndarray | Output:
    if init_value is None:
        return Output(shape, _numpy_dtype(dtype))
    filled = mx.full(shape, init_value, dtype)
    bits = filled.reshape(-1).view(mx.uint16) if dtype == mx.bfloat16 else filled.reshape(-1)
    return np.array(bits)


def _numpy_dtype(dtype: mx.Dtype) -> np.dtype:
    generated.type_name(dtype)
    if dtype == mx.bfloat16:
        return np.dtype(np.uint16)
    return np.dtype(str(dtype).removeprefix("mlx.core.").removesuffix("_"))


def _to_mlx(array: np.ndarray, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    made = mx.array(array.reshape(-1))
    return (made.view(mx.bfloat16) if dtype == mx.bfloat16 else made).reshape(shape)
