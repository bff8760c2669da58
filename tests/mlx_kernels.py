"""MLX's own Metal headers, one case for each kind of kernel: how MLX launches it, and what it must compute.

The float64 oracles are NumPy; the buffers are those that MLX's eval_gpu functions bind.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from moefast import emulator

ROOT = "mlx/backend/metal/kernels/"
TYPES = {"float": mx.float32, "float16_t": mx.float16, "bfloat16_t": mx.bfloat16}
# Unit roundoffs, for bounds.
ROUNDOFF = {"float": 2.0**-24, "float16_t": 2.0**-11, "bfloat16_t": 2.0**-8}


def bits(array: mx.array) -> np.ndarray:
    """As a buffer: bfloat as uint16."""
    return np.array(array.view(mx.uint16)) if array.dtype == mx.bfloat16 else np.array(array)


def numbers(array: np.ndarray, kind: str = "float") -> np.ndarray:
    """A buffer of type ``kind`` as float64."""
    if kind == "bfloat16_t":
        return np.array(mx.array(array).view(mx.bfloat16).astype(mx.float32)).astype(np.float64)
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return array.astype(np.float64)


def of(kind: str, values: np.ndarray) -> np.ndarray:
    """Values as a buffer of type ``kind``."""
    return bits(mx.array(values.astype(np.float32)).astype(TYPES[kind]))


def scalar(value: Any, dtype: Any = np.int32) -> np.ndarray:
    return np.array([value], dtype)


def i32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def i64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def out(kind: str, *shape: int) -> emulator.Output:
    return emulator.Output(
        shape, np.float32 if kind == "float" else np.float16 if kind == "float16_t" else np.uint16
    )


@dataclass(frozen=True)
class Run:
    """One launch.

    Attributes:
        instantiate: of the kernel, named ``k``.
        buffers: by the name of the kernel's parameter.
        expected: float64, to compare with buffer ``result``.
        error: largest allowed difference, relative to the largest expected magnitude.
        equal_writes: whether several threadgroups of it write the same values to the same place.
    """

    headers: tuple[str, ...]
    instantiate: str
    buffers: dict[str, Any]
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    result: str
    kind: str
    expected: np.ndarray
    error: float
    constants: dict[int | str, Any] = field(default_factory=dict)
    equal_writes: bool = False

    def source(self) -> str:
        includes = "".join(f'#include "{ROOT}{header}"\n' for header in ("utils.h", *self.headers))
        return includes + self.instantiate

    def kernel(self) -> emulator.Kernel:
        return emulator.compile(
            self.source(),
            "k",
            include_dirs=[emulator.mlx_include_dir()],
            function_constants=self.constants,
            name="mlx.metal",
        )

    def launch(
        self, kernel: emulator.Kernel | None = None, **options: Any
    ) -> tuple[emulator.Result, np.ndarray]:
        """The launch's result, and the buffer that counts; of ``kernel`` instead of MLX's header, if there
        is one."""
        kernel = kernel or self.kernel()
        options.setdefault("allow_equal_writes", self.equal_writes)
        named = {index: self.buffers[parameter.name] for index, parameter in kernel.signature.buffers.items()}
        result = emulator.launch(kernel, named, self.grid, self.threadgroup, **options)
        (at,) = (
            index for index, parameter in kernel.signature.buffers.items() if parameter.name == self.result
        )
        return result, result.buffers[at]

    def check(self, values: np.ndarray) -> None:
        got = numbers(values, self.kind).reshape(self.expected.shape)
        finite = np.isfinite(self.expected)
        np.testing.assert_array_equal(got[~finite], self.expected[~finite])
        scale = np.abs(self.expected[finite]).max(initial=1e-30)
        assert np.abs(got[finite] - self.expected[finite]).max(initial=0) <= self.error * scale


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# Sums of K products in float, and the rounding of the result.
def dot_error(kind: str, K: int) -> float:
    return 4 * (ROUNDOFF[kind] + K**0.5 * ROUNDOFF["float"])
