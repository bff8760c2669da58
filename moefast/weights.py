"""The weights an expert operation works on: references to arrays, in MLX's own layouts, never copies.

Constructors look at shapes and dtypes only; they never evaluate an array.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import mlx.core as mx

from .errors import refuse
from .specs import Activation, QuantSpec

FLOATS = (mx.float32, mx.float16, mx.bfloat16)

Shape = tuple[int, ...]


class Layout(NamedTuple):
    """What a kernel must know of a projection before it sees a value: static and hashable.

    Attributes:
        num_experts: length of the stack, or 0 for the weight of a single dense layer.
        out_dims, in_dims: logical sizes.
        dtype: of an unquantized weight, or of the scales: float for affine, uint8 for the float modes.
        quant: None for an unquantized weight.
        bias: dtype of the output bias as a string (an mx.Dtype cannot be compared with None), or None.
        global_scale: nvfp4's float32 scale per expert.
    """

    num_experts: int
    out_dims: int
    in_dims: int
    dtype: mx.Dtype
    quant: QuantSpec | None
    bias: str | None
    global_scale: bool


class Projection:
    """The weight of one linear map ``x @ w.T + bias``, or of a stack of them, one per expert.

    Args:
        weight: unquantized ``[(E,) out, in]`` in float32, float16 or bfloat16; or packed uint32
            ``[(E,) out, in * bits / 32]``.
        scales: ``[(E,) out, in / group_size]``: float for affine, uint8 for mxfp4, mxfp8 and nvfp4.
        biases: the affine offsets, shaped like ``scales``.
        bias: output bias ``[(E,) out]``.
        global_scale: nvfp4's float32 scale ``[E]`` (``[]`` without a stack): what MLX stores, the largest
            magnitude of the tensor.
        quant: the packing, or None for an unquantized weight.

    Raises:
        ValueError: a shape or dtype does not fit ``quant``.
    """

    # prepared: what a backend has made of the arrays, for its next call.
    __slots__ = ("bias", "biases", "global_scale", "layout", "prepared", "quant", "scales", "weight")

    def __init__(
        self,
        weight: mx.array,
        scales: mx.array | None = None,
        biases: mx.array | None = None,
        *,
        bias: mx.array | None = None,
        global_scale: mx.array | None = None,
        quant: QuantSpec | None = None,
    ):
        if not isinstance(weight, mx.array):
            refuse("Projection", "weight must be an mx.array", type(weight).__name__)
        self.weight = weight
        self.scales = scales
        self.biases = biases
        self.bias = bias
        self.global_scale = global_scale
        self.quant = quant
        self.prepared: Any = None
        self.layout = _layout(
            form_of(weight), form_of(scales), form_of(biases), form_of(bias), form_of(global_scale), quant
        )

    @classmethod
    def again(cls, layout: Layout, arrays: Iterator[mx.array]) -> Projection:
        """One of a layout that has been checked before, on the next of ``arrays``: those that the layout
        has, in the order of :attr:`arrays`."""
        made = cls.__new__(cls)
        quant = made.quant = layout.quant
        made.weight = next(arrays)
        made.scales = None if quant is None else next(arrays)
        made.biases = next(arrays) if quant is not None and quant.mode == "affine" else None
        made.bias = None if layout.bias is None else next(arrays)
        made.global_scale = next(arrays) if layout.global_scale else None
        made.prepared = None
        made.layout = layout
        return made

    @property
    def arrays(self) -> tuple[mx.array | None, ...]:
        """``(weight, scales, biases, bias, global_scale)``."""
        return (self.weight, self.scales, self.biases, self.bias, self.global_scale)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(a.nbytes for a in self.arrays if a is not None)

    def __repr__(self) -> str:
        return f"Projection({self.layout})"


Form = tuple[Shape, mx.Dtype] | None


def dtype_name(dtype: mx.Dtype) -> str:
    """``float32`` for ``mx.float32``."""
    return str(dtype).removeprefix("mlx.core.")


def form_of(array: mx.array | None) -> Form:
    """Shape and dtype: all that is ever asked of an array before it runs."""
    return None if array is None else (array.shape, array.dtype)


@lru_cache(maxsize=4096)
def _layout(
    weight: tuple[Shape, mx.Dtype],
    scales: Form,
    biases: Form,
    bias: Form,
    global_scale: Form,
    quant: QuantSpec | None,
) -> Layout:
    """Check the forms against one another. Cached: a model's layers share a handful of layouts."""
    name = "Projection"
    shape, dtype = weight
    if len(shape) not in (2, 3):
        refuse(name, "weight must be [out, in] or [num_experts, out, in]", shape)
    *stack, out_dims, columns = shape
    if 0 in stack:
        refuse(name, "a stack must hold at least one expert", shape)
    if quant is None:
        for field, form in (("scales", scales), ("biases", biases), ("global_scale", global_scale)):
            if form is not None:
                refuse(name, f"an unquantized weight has no {field}", form)
        if dtype not in FLOATS:
            refuse(name, "an unquantized weight must be float32, float16 or bfloat16", dtype)
        in_dims = columns
    else:
        in_dims = _check_packed(shape, dtype, scales, biases, quant)
        if global_scale is not None:
            if quant.mode != "nvfp4":
                refuse(name, "global_scale belongs to mode 'nvfp4'", repr(quant.mode))
            if global_scale != (tuple(stack), mx.float32):
                refuse(name, f"global_scale must be float32 {tuple(stack)}", global_scale)
    if bias is not None and (bias[0] != (*stack, out_dims) or bias[1] not in FLOATS):
        refuse(name, f"bias must be a float array {(*stack, out_dims)}", bias)
    return Layout(
        num_experts=stack[0] if stack else 0,
        out_dims=out_dims,
        in_dims=in_dims,
        dtype=dtype if scales is None else scales[1],
        quant=quant,
        bias=dtype_name(bias[1]) if bias is not None else None,
        global_scale=global_scale is not None,
    )


def _check_packed(shape: Shape, dtype: mx.Dtype, scales: Form, biases: Form, quant: QuantSpec) -> int:
    """Check a quantized weight; return its logical ``in`` size."""
    name = "Projection"
    if dtype != mx.uint32:
        refuse(name, "a quantized weight must be packed uint32", dtype)
    if scales is None:
        refuse(name, "a quantized weight needs scales", None)
    if len(scales[0]) != len(shape):
        refuse(name, f"scales must have the {len(shape)} dimensions of weight", scales[0])
    in_dims = scales[0][-1] * quant.group_size
    packed = (*shape[:-1], in_dims * quant.bits // 32)
    if scales[0][:-1] != shape[:-1] or shape != packed:
        refuse(name, f"weight of {quant} must be {packed} for scales {scales[0]}", shape)
    if quant.mode == "affine":
        if scales[1] not in FLOATS or biases != scales:
            refuse(name, "affine scales and biases must be float arrays alike", (scales, biases))
    elif scales[1] != mx.uint8 or biases is not None:
        refuse(name, f"mode {quant.mode!r} takes uint8 scales and no biases", (scales, biases))
    return in_dims


class ExpertWeights:
    """The experts of one layer: ``down(activation(gate(x), up(x)))`` with stacked projections.

    Each projection may have a format of its own.

    Args:
        up: ``hidden -> width``, stacked ``[E, width, hidden]``.
        down: ``width -> hidden``, stacked ``[E, hidden, width]``.
        gate: like ``up``; given exactly where ``activation`` is gated.
        activation: see :class:`moefast.Activation`.

    Raises:
        ValueError: the projections do not fit one another.
    """

    __slots__ = ("activation", "down", "gate", "layout", "prepared", "up")

    def __init__(
        self,
        *,
        up: Projection,
        down: Projection,
        gate: Projection | None = None,
        activation: Activation = Activation(),  # noqa: B008 (frozen)
    ):
        self.up = up
        self.down = down
        self.gate = gate
        self.activation = activation
        self.prepared: Any = None
        self.layout = _expert_layout(up.layout, down.layout, gate.layout if gate else None, activation)
        if self.layout.num_experts == 0:
            refuse("ExpertWeights", "projections must be stacked [num_experts, out, in]", up.layout)

    @classmethod
    def again(cls, layout: ExpertLayout, arrays: Iterator[mx.array]) -> ExpertWeights:
        """Those of a layout that has been checked before; see :meth:`Projection.again`."""
        made = cls.__new__(cls)
        made.gate = None if layout.gate is None else Projection.again(layout.gate, arrays)
        made.up = Projection.again(layout.up, arrays)
        made.down = Projection.again(layout.down, arrays)
        made.activation = layout.activation
        made.prepared = None
        made.layout = layout
        return made

    @property
    def projections(self) -> tuple[Projection, ...]:
        """``(gate, up, down)`` without a missing gate."""
        return tuple(p for p in (self.gate, self.up, self.down) if p is not None)

    def __repr__(self) -> str:
        return f"ExpertWeights({self.layout})"


class ExpertLayout(NamedTuple):
    """Static description of :class:`ExpertWeights` (``num_experts`` 0: of a shared expert)."""

    num_experts: int
    hidden: int
    width: int
    up: Layout
    down: Layout
    gate: Layout | None
    activation: Activation


@lru_cache(maxsize=1024)
def _expert_layout(up: Layout, down: Layout, gate: Layout | None, activation: Activation) -> ExpertLayout:
    name = "ExpertWeights"
    if (gate is not None) != activation.gated:
        rule = "needs a gate projection" if activation.gated else "takes no gate projection"
        refuse(name, f"activation {activation.name!r} {rule}", gate)
    if gate is not None and gate[:3] != up[:3]:
        refuse(name, f"gate must have up's sizes {up[:3]}", gate[:3])
    if down[:3] != (up.num_experts, up.in_dims, up.out_dims):
        refuse(name, f"down must have sizes {(up.num_experts, up.in_dims, up.out_dims)}", down[:3])
    return ExpertLayout(up.num_experts, up.in_dims, up.out_dims, up, down, gate, activation)


class SharedLayout(NamedTuple):
    """Static description of a :class:`SharedExpert`."""

    layout: ExpertLayout
    output_gate: Layout | None


class SharedExpert:
    """The expert every token passes: dense projections, and optionally a sigmoid gate on its output.

    Args:
        up, down, gate, activation: as in :class:`ExpertWeights`, without the stacking axis.
        output_gate: ``hidden -> 1``; the output is multiplied by ``sigmoid(output_gate(x))`` (Qwen2-MoE).
    """

    __slots__ = ("activation", "down", "gate", "layout", "output_gate", "prepared", "up")

    def __init__(
        self,
        *,
        up: Projection,
        down: Projection,
        gate: Projection | None = None,
        activation: Activation = Activation(),  # noqa: B008 (frozen)
        output_gate: Projection | None = None,
    ):
        self.up = up
        self.down = down
        self.gate = gate
        self.activation = activation
        self.output_gate = output_gate
        self.prepared: Any = None
        layout = _expert_layout(up.layout, down.layout, gate.layout if gate else None, activation)
        if layout.num_experts:
            refuse("SharedExpert", "projections must be dense [out, in]", up.layout)
        if output_gate is not None and output_gate.layout[:3] != (0, 1, up.layout.in_dims):
            refuse("SharedExpert", f"output_gate must map {up.layout.in_dims} to 1", output_gate.layout[:3])
        self.layout = SharedLayout(layout, output_gate.layout if output_gate is not None else None)

    @classmethod
    def again(cls, layout: SharedLayout, arrays: Iterator[mx.array]) -> SharedExpert:
        """One of a layout that has been checked before; see :meth:`Projection.again`."""
        own, output_gate = layout
        made = cls.__new__(cls)
        made.gate = None if own.gate is None else Projection.again(own.gate, arrays)
        made.up = Projection.again(own.up, arrays)
        made.down = Projection.again(own.down, arrays)
        made.activation = own.activation
        made.output_gate = None if output_gate is None else Projection.again(output_gate, arrays)
        made.prepared = None
        made.layout = layout
        return made
