"""MLX operations on moefast's CPU kernels (``csrc/mlx``), for ``moefast.backends.native``."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from .specs import RouterSpec
from .weights import ExpertLayout, Layout

built_for_mlx: str
"""The MLX it was built for; it runs with no other."""

class Weights:
    """The arrays of weights, in the order of a plan. It holds the Python objects: a change in place shows."""

    def __init__(self, arrays: Sequence[mx.array]) -> None: ...

class Operator:
    """An operation for one kind of call. Shapes and dtypes other than those it was made for raise ValueError;
    indices out of range do when they are evaluated."""

    def matmul(self, x: mx.array, weights: Weights, /) -> mx.array: ...
    def matmuls(self, x: mx.array, weights: Weights, /) -> list[mx.array]: ...
    def switch_glu(self, x: mx.array, indices: mx.array, weights: Weights, /) -> mx.array: ...
    def experts(self, x: mx.array, indices: mx.array, mix: mx.array, weights: Weights, /) -> mx.array: ...
    def route(
        self, logits: mx.array, bias: mx.array | None, scale: mx.array | None
    ) -> tuple[mx.array, mx.array]: ...
    def moe(
        self,
        x: mx.array,
        logits: mx.array,
        bias: mx.array | None,
        scale: mx.array | None,
        weights: Weights,
        shared: Weights | None,
    ) -> mx.array: ...
    # See moefast.registry.Bound.
    def matmul_of(
        self, x: mx.array, layer: object, type: type, low: int, high: int, /
    ) -> mx.array | None: ...
    def matmuls_of(
        self, x: mx.array, layers: tuple[object, ...], types: tuple[type, ...], low: int, high: int, /
    ) -> list[mx.array] | None: ...
    def moe_of(
        self,
        x: mx.array,
        logits: mx.array,
        bias: mx.array | None,
        experts: object,
        shared: object | None,
        shared_gate: object | None,
        types: tuple[type, ...],
        low: int,
        high: int,
    ) -> mx.array | None: ...
    def moe_inputs_of(
        self,
        device: mx.DeviceType,
        x: mx.array,
        logits: mx.array,
        bias: mx.array | None,
        experts: object,
        shared: object | None,
        shared_gate: object | None,
        types: tuple[type, ...],
        low: int,
        high: int,
    ) -> tuple[mx.array, ...] | None:
        """The arrays of such a call, for kernels that are launched on ``device``. None also where MLX traces
        a transformation, or a weight does not lie row by row in memory."""

def plan(
    op: str,
    dtypes: Sequence[str | None],
    *,
    spec: RouterSpec | None = None,
    layout: Layout | ExpertLayout | tuple[Layout, ...] | None = None,
    shared: ExpertLayout | None = None,
    shared_gate: Layout | None = None,
    combine_dtype: str | None = None,
    out_dtype: str,
    reference: Callable[[list[mx.array]], list[mx.array]],
) -> Operator:
    """Make an operation, for as long as the process lives. ``dtypes`` are those of its own arrays, None for
    one that is not there; see ``csrc/mlx/reading.h``."""

def attention(queries: mx.array, keys: mx.array, values: mx.array, scale: float, causal: bool) -> mx.array:
    """See :func:`moefast.ops.attention`."""

def logsumexp(x: mx.array) -> mx.array:
    """See :func:`moefast.ops.logsumexp`."""

def embed(
    indices: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    global_scale: mx.array | None,
    group_size: int,
    bits: int,
    mode: str,
) -> mx.array:
    """See :func:`moefast.ops.embed`."""

def embed_of(
    group_size: int,
    bits: int,
    mode: str,
    has_global_scale: bool,
    indices: mx.array,
    layer: object,
    type: type,
    low: int,
    high: int,
    /,
) -> mx.array | None:
    """See :class:`moefast.registry.Bound`."""

class Decoding:
    """A model's decoding steps, made from what was seen of the last two; see moefast/models/decoding.py."""

    def __init__(self) -> None: ...
    def record(
        self,
        model: Any,
        inputs: mx.array,
        caches: list[Any],
        offset: int,
        before: list[mx.array],
        logits: mx.array,
        facts: Any,
    ) -> bool:
        """Watch a step that was made in full; whether the next can be made from what has been seen."""

    def again(self, model: Any, inputs: mx.array, caches: Any, facts: Any) -> mx.array | None:
        """Make a step and advance the caches; None, and nothing done, where that cannot be."""

def configure(threads: int, isa: str) -> None:
    """Settings of the engine; ValueError once it runs with others."""

def engine_isa() -> str: ...
def engine_threads() -> int: ...
def isas() -> list[str]:
    """Instruction sets that this build has and this machine runs, best first."""

def usable_cores() -> int: ...
def huge_pages(arrays: Sequence[mx.array]) -> int:
    """Bytes of those that are evaluated which are in huge pages now; nothing else is touched."""
