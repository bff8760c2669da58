"""The stacked experts of a layer, with mlx-lm's parameter names and quantization hooks."""

from __future__ import annotations

import math
from importlib.util import find_spec

import mlx.core as mx
import mlx.nn

from .. import ops
from ..backends.reference.activations import activate
from ..backends.reference.experts import each_route
from ..backends.reference.matmul import gathered
from ..errors import refuse
from ..specs import MODE_DEFAULTS, Activation
from ..weights import ExpertWeights, Projection
from .projection import projection_of
from .recall import training_backend


class _Stack(mlx.nn.Module):
    """What the plain and the quantized stack share: they are called like mlx-lm's SwitchLinear."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """x: ``[..., 1, in]``, indices ``[...]`` -> ``[..., 1, out]``."""
        projection = projection_of(self)
        assert projection is not None
        return gathered(x, projection, indices, in_order=sorted_indices)

    @property
    def num_experts(self) -> int:
        return int(self.weight.shape[0])

    @property
    def output_dims(self) -> int:
        return int(self.weight.shape[1])


class SwitchLinear(_Stack):
    """One linear map per expert: ``weight [num_experts, out, in]``, ``bias [num_experts, out]``."""

    def __init__(self, input_dims: int, output_dims: int, num_experts: int, bias: bool = True):
        super().__init__()
        bound = math.sqrt(1 / input_dims)
        self.weight = mx.random.uniform(-bound, bound, (num_experts, output_dims, input_dims))
        if bias:
            self.bias = mx.zeros((num_experts, output_dims))

    @property
    def input_dims(self) -> int:
        return int(self.weight.shape[2])

    def to_quantized(
        self, group_size: int | None = None, bits: int | None = None, mode: str = "affine"
    ) -> QuantizedSwitchLinear:
        """A quantized approximation of this layer; what ``mlx.nn.quantize`` calls."""
        return QuantizedSwitchLinear(self.weight, self.get("bias"), group_size, bits, mode)


class QuantizedSwitchLinear(_Stack):
    """A quantized :class:`SwitchLinear`: packed ``weight``, ``scales`` and, in affine mode, ``biases``."""

    def __init__(
        self,
        weight: mx.array,
        bias: mx.array | None = None,
        group_size: int | None = None,
        bits: int | None = None,
        mode: str = "affine",
    ):
        super().__init__()
        if mode not in MODE_DEFAULTS:
            refuse("SwitchLinear", f"mode must be one of {tuple(MODE_DEFAULTS)}", repr(mode))
        default_bits, default_group_size = MODE_DEFAULTS[mode]
        self.group_size = group_size or default_group_size
        self.bits = bits or default_bits
        self.mode = mode
        self.weight, self.scales, *biases = mx.quantize(weight, self.group_size, self.bits, mode=mode)
        self.biases = biases[0] if biases else None
        if bias is not None:
            self.bias = bias
        self.freeze()

    @property
    def input_dims(self) -> int:
        return int(self.scales.shape[2]) * self.group_size


def switch_linear(input_dims: int, output_dims: int, num_experts: int, bias: bool) -> mlx.nn.Module:
    """A stacked projection: mlx-lm's own class where mlx-lm is installed, since its LoRA, GPTQ, AWQ and
    fuse look for that very class; else :class:`SwitchLinear`, the same parameters under the same names."""
    if find_spec("mlx_lm") is not None:
        from mlx_lm.models.switch_layers import SwitchLinear as MlxLmSwitchLinear

        layer: mlx.nn.Module = MlxLmSwitchLinear(input_dims, output_dims, num_experts, bias=bias)
        return layer
    return SwitchLinear(input_dims, output_dims, num_experts, bias)


class SwitchGLU(mlx.nn.Module):
    """The gated experts of one layer: ``down_e(activation(gate_e(x), up_e(x)))``.

    Parameters: ``gate_proj``, ``up_proj`` ``[num_experts, hidden_dims, input_dims]`` and ``down_proj``
    ``[num_experts, input_dims, hidden_dims]``: the names of mlx-lm's SwitchGLU, so LoRA, quantization,
    sharding and saving treat it alike.

    Args:
        input_dims: hidden size of the model.
        hidden_dims: width of one expert.
        num_experts: length of the stacks.
        activation: a gated :class:`moefast.Activation`.
        bias: projections have output biases.

    Raises:
        ValueError: ``activation`` is not gated.
    """

    def __init__(
        self,
        input_dims: int,
        hidden_dims: int,
        num_experts: int,
        activation: Activation = Activation(),  # noqa: B008 (frozen)
        bias: bool = False,
    ):
        super().__init__()
        if not activation.gated:
            refuse("SwitchGLU", "activation must be gated", activation)
        self.gate_proj = switch_linear(input_dims, hidden_dims, num_experts, bias)
        self.up_proj = switch_linear(input_dims, hidden_dims, num_experts, bias)
        self.down_proj = switch_linear(hidden_dims, input_dims, num_experts, bias)
        self.activation = activation

    def expert_weights(self) -> ExpertWeights | None:
        """What the operations take; None while a projection is adapted (LoRA) and has to be called."""
        gate, up, down = (projection_of(self[name]) for name in ("gate_proj", "up_proj", "down_proj"))
        if gate is None or up is None or down is None:
            return None
        return ExpertWeights(gate=gate, up=up, down=down, activation=self.activation)

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """x: ``[..., input_dims]``, indices: ``[..., top_k]`` -> ``[..., top_k, input_dims]``."""
        weights = self.expert_weights()
        if weights is not None:
            return ops.switch_glu(x, weights, indices, backend=training_backend(self))

        def expert(rows: mx.array, chosen: mx.array, in_order: bool) -> mx.array:
            gate = _project(self.gate_proj, rows, chosen, in_order)
            up = _project(self.up_proj, rows, chosen, in_order)
            return _project(self.down_proj, activate(self.activation, gate, up), chosen, in_order)

        return each_route(x, indices, int(self.up_proj.num_experts), expert)


def _project(layer: mlx.nn.Module, rows: mx.array, indices: mx.array, in_order: bool) -> mx.array:
    """One projection where some of the three are adapted: the plain ones, and the frozen part under
    mlx-lm's LoRA, are the reference's products; whatever else stands there is called."""
    projection = projection_of(layer)
    if projection is not None:
        return gathered(rows, projection, indices, in_order=in_order)
    if (type(layer).__module__, type(layer).__name__) == ("mlx_lm.tuner.lora", "LoRASwitchLinear"):
        y = _project(layer.linear, rows, indices, in_order)
        low = gathered(layer.dropout(rows), Projection(layer.lora_a), indices, in_order=in_order)
        high = gathered(low, Projection(layer.lora_b), indices, in_order=in_order)
        update: mx.array = (layer.scale * high).astype(rows.dtype)
        return y + update
    called: mx.array = layer(rows, indices, sorted_indices=in_order)
    return called
