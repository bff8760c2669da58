"""moefast's CPU kernels on NumPy arrays (``csrc/numpy``). Knows nothing of MLX.

Floats are float32, float16, or bfloat16 as uint16; dtypes are named by word. Weights must be contiguous,
rows of activations may be any constant distance apart. Whatever breaks a rule raises ValueError.
"""

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

_Array = npt.NDArray[Any]

class _Quant(Protocol):
    """A moefast.QuantSpec."""

    @property
    def bits(self) -> int: ...
    @property
    def group_size(self) -> int: ...
    @property
    def mode(self) -> str: ...

class Projection:
    """One linear map or a stack of them; arguments as of moefast.Projection."""

    def __init__(
        self,
        weight: _Array,
        scales: _Array | None = None,
        biases: _Array | None = None,
        *,
        bias: _Array | None = None,
        global_scale: _Array | None = None,
        quant: _Quant | None = None,
    ) -> None: ...

class Ffn:
    """``down(activation(gate(x), up(x)))``: stacked experts, or dense projections of a shared expert.
    ``activation`` is a moefast.Activation."""

    def __init__(
        self, *, up: Projection, down: Projection, gate: Projection | None = None, activation: Any
    ) -> None: ...

class Engine:
    """Threads (0: one per usable core), an instruction set ("": the best here) and scratch memory. Calls from
    several threads queue up; they release the GIL."""

    def __init__(self, threads: int = 0, isa: str = "") -> None: ...
    @property
    def threads(self) -> int: ...
    @property
    def isa(self) -> str: ...
    @property
    def scratch(self) -> int:
        """Bytes of scratch memory held between calls."""

    def matmul(self, x: _Array, weight: Projection, *, out_dtype: str | None = None) -> _Array:
        """x ``[..., in]`` -> ``[..., out]``. Without ``out_dtype`` outputs have that of x, here and below."""

    def switch_glu(self, x: _Array, experts: Ffn, indices: _Array, *, out_dtype: str | None = None) -> _Array:
        """x ``[..., hidden]``, indices ``[..., top_k]`` -> ``[..., top_k, hidden]``."""

    def experts(
        self, x: _Array, experts: Ffn, indices: _Array, weights: _Array, *, out_dtype: str | None = None
    ) -> _Array:
        """x ``[..., hidden]``, indices and weights ``[..., top_k]`` -> ``[..., hidden]``."""

    def route(
        self,
        logits: _Array,
        spec: Any,
        *,
        selection_bias: _Array | None = None,
        expert_scale: _Array | None = None,
        weights_dtype: str = "float32",
    ) -> tuple[npt.NDArray[np.uint32], _Array]:
        """logits ``[..., num_experts]``, a moefast.RouterSpec -> indices and weights ``[..., top_k]``."""

    def moe(
        self,
        x: _Array,
        logits: _Array,
        spec: Any,
        experts: Ffn,
        *,
        selection_bias: _Array | None = None,
        expert_scale: _Array | None = None,
        shared: Ffn | None = None,
        shared_gate: Projection | None = None,
        combine_dtype: str | None = None,
        out_dtype: str | None = None,
    ) -> _Array:
        """x ``[..., hidden]``, logits ``[..., num_experts]`` -> ``[..., hidden]``."""

    def measure_read(self, threads: int, bytes: int) -> float:
        """Bytes per second."""

    def measure_flops(self, threads: int) -> float:
        """Floating point operations per second."""

def isas() -> list[str]:
    """Instruction sets that this build has and this machine runs, best first."""

def usable_cores() -> int: ...
