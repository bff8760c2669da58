"""Projections and experts refuse what does not fit, and never look at a value."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from moefast import Activation, ExpertWeights, Projection, QuantSpec, RouterSpec, SharedExpert, moe

E, OUT, IN = 4, 8, 64
AFFINE = QuantSpec()
NVFP4 = QuantSpec(mode="nvfp4", bits=4, group_size=16)


def zeros(*shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.zeros(shape, dtype)


def packed(*shape: int) -> mx.array:
    return zeros(*shape, dtype=mx.uint32)


def codes(*shape: int) -> mx.array:
    return zeros(*shape, dtype=mx.uint8)


PLAIN = {"weight": zeros(E, OUT, IN)}
PACKED = {
    "weight": packed(E, OUT, 8),
    "scales": zeros(E, OUT, 1),
    "biases": zeros(E, OUT, 1),
    "quant": AFFINE,
}
FLOAT4 = {"weight": packed(E, OUT, 8), "scales": codes(E, OUT, 4), "quant": NVFP4}
FLOAT4_DENSE = {"weight": packed(OUT, 8), "scales": codes(OUT, 4), "quant": NVFP4}

RANK = "weight must be [out, in] or [num_experts, out, in], got "
NO_FLOAT = "an unquantized weight must be float32, float16 or bfloat16, got "
ALIKE = "affine scales and biases must be float arrays alike, got "
CODES = "mode 'nvfp4' takes uint8 scales and no biases, got "

# (arguments that would do but for one, what the message says)
REFUSED_PROJECTIONS: list[tuple[dict[str, Any], str]] = [
    (PLAIN | {"weight": zeros(8)}, RANK + "(8,)."),
    (PLAIN | {"weight": zeros(2, E, OUT, IN)}, RANK + "(2, 4, 8, 64)."),
    (PLAIN | {"weight": zeros(E, OUT, IN, dtype=mx.int8)}, NO_FLOAT + "mlx.core.int8."),
    (PLAIN | {"weight": packed(E, OUT, 8)}, NO_FLOAT + "mlx.core.uint32."),  # its spec was forgotten
    (PLAIN | {"scales": zeros(E, OUT, 1)}, "an unquantized weight has no scales, got "),
    (PLAIN | {"biases": zeros(E, OUT, 1)}, "an unquantized weight has no biases, got "),
    (PLAIN | {"global_scale": zeros(E)}, "an unquantized weight has no global_scale, got "),
    (PLAIN | {"bias": zeros(E, IN)}, "bias must be a float array (4, 8), got "),
    (PLAIN | {"bias": zeros(OUT)}, "bias must be a float array (4, 8), got "),
    (PLAIN | {"bias": zeros(E, OUT, dtype=mx.int32)}, "bias must be a float array (4, 8), got "),
    (PACKED | PLAIN, "a quantized weight must be packed uint32, got mlx.core.float32."),
    (PACKED | {"scales": None}, "a quantized weight needs scales, got None."),
    # Twice the words the scales call for: an 8-bit weight declared as 4-bit.
    (PACKED | {"weight": packed(E, OUT, 16)}, "must be (4, 8, 8) for scales (4, 8, 1), got (4, 8, 16)."),
    (PACKED | {"scales": zeros(3, OUT, 1)}, "for scales (3, 8, 1), got (4, 8, 8)."),
    (PACKED | {"biases": None}, ALIKE),
    (PACKED | {"biases": zeros(E, OUT, 2)}, ALIKE),
    (PACKED | {"biases": zeros(E, OUT, 1, dtype=mx.float16)}, ALIKE),
    (PACKED | {"scales": codes(E, OUT, 1), "biases": codes(E, OUT, 1)}, ALIKE),
    (PACKED | {"global_scale": zeros(E)}, "global_scale belongs to mode 'nvfp4', got 'affine'."),
    (FLOAT4 | {"scales": zeros(E, OUT, 4)}, CODES),
    (FLOAT4 | {"biases": codes(E, OUT, 4)}, CODES),
    (FLOAT4 | {"global_scale": zeros(1)}, "global_scale must be float32 (4,), got "),
    (FLOAT4 | {"global_scale": zeros(E, dtype=mx.float16)}, "global_scale must be float32 (4,), got "),
    (FLOAT4_DENSE | {"global_scale": zeros(1)}, "global_scale must be float32 (), got "),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED_PROJECTIONS)
def test_projection_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape("[Projection] ") + ".*" + re.escape(message)):
        Projection(**arguments)


@pytest.mark.parametrize("arguments", [PLAIN, PACKED, FLOAT4, FLOAT4_DENSE])
def test_the_arguments_refused_above_are_wrong_in_one_thing(arguments: dict[str, Any]) -> None:
    assert Projection(**arguments).layout.in_dims == IN


def stack(out: int, in_: int, experts: int = E) -> Projection:
    return Projection(zeros(experts, out, in_))


def dense(out: int, in_: int) -> Projection:
    return Projection(zeros(out, in_))


EXPERTS = {"gate": stack(8, 16), "up": stack(8, 16), "down": stack(16, 8)}
SHARED = {"gate": dense(8, 16), "up": dense(8, 16), "down": dense(16, 8)}
RELU2 = Activation(name="relu2")

REFUSED_EXPERTS = [
    (EXPERTS | {"gate": None}, "activation 'swiglu' needs a gate projection, got None."),
    (EXPERTS | {"activation": RELU2}, "activation 'relu2' takes no gate projection, got Layout("),
    (EXPERTS | {"gate": stack(9, 16)}, "gate must have up's sizes (4, 8, 16), got (4, 9, 16)."),
    (EXPERTS | {"gate": stack(8, 16, 3)}, "gate must have up's sizes (4, 8, 16), got (3, 8, 16)."),
    (EXPERTS | {"down": stack(8, 16)}, "down must have sizes (4, 16, 8), got (4, 8, 16)."),
    (EXPERTS | {"down": dense(16, 8)}, "down must have sizes (4, 16, 8), got (0, 16, 8)."),
    (SHARED, "projections must be stacked [num_experts, out, in], got Layout("),
]


@pytest.mark.parametrize(("projections", "message"), REFUSED_EXPERTS)
def test_expert_weights_refuse(projections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"[ExpertWeights] {message}")):
        ExpertWeights(**projections)


REFUSED_SHARED = [
    (EXPERTS, "projections must be dense [out, in], got Layout("),
    (SHARED | {"output_gate": dense(2, 16)}, "output_gate must map 16 to 1, got (0, 2, 16)."),
    (SHARED | {"output_gate": dense(1, 8)}, "output_gate must map 16 to 1, got (0, 1, 8)."),
    (SHARED | {"output_gate": stack(1, 16)}, "output_gate must map 16 to 1, got (4, 1, 16)."),
]


@pytest.mark.parametrize(("projections", "message"), REFUSED_SHARED)
def test_shared_expert_refuses(projections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"[SharedExpert] {message}")):
        SharedExpert(**projections)


# -- nothing but shapes and dtypes is looked at -------------------------------------------------------------


def test_constructors_and_operations_evaluate_nothing(tmp_path: Path) -> None:
    """Weights loaded lazily from a file that has lost its data: whoever reads a value, raises."""
    file = tmp_path / "weights.safetensors"
    stored = {
        "up": zeros(E, OUT, IN),
        "down": zeros(E, IN, OUT),
        "weight": packed(E, OUT, 8),
        "scales": zeros(E, OUT, 1),
        "biases": zeros(E, OUT, 1),
        "bias": zeros(E, OUT),
        "x": zeros(3, IN),
        "logits": zeros(3, E),
    }
    mx.save_safetensors(str(file), stored)
    lazy = mx.load(str(file))
    os.truncate(file, 1000)  # the header stays

    quantized = Projection(lazy["weight"], lazy["scales"], lazy["biases"], bias=lazy["bias"], quant=AFFINE)
    plain = Projection(lazy["up"])
    weights = ExpertWeights(gate=quantized, up=plain, down=Projection(lazy["down"]))
    shared = SharedExpert(
        gate=Projection(lazy["up"][0]), up=Projection(lazy["up"][1]), down=Projection(lazy["down"][0])
    )
    spec = RouterSpec(num_experts=E, top_k=2)
    y = moe(lazy["x"], lazy["logits"], spec, weights, shared=shared, backend="reference")
    assert repr(weights).startswith("ExpertWeights(")
    assert (y.shape, y.dtype, quantized.layout.in_dims) == ((3, IN), mx.float32, IN)
    with pytest.raises(RuntimeError, match="read"):
        mx.eval(y)


def test_layouts_are_values() -> None:
    """What a choice of kernel depends on is equal for equal layers, and holds no array."""
    one, other = (ExpertWeights(up=stack(8, 16), gate=stack(8, 16), down=stack(16, 8)) for _ in range(2))
    assert one.layout == other.layout
    assert len({one.layout, other.layout}) == 1


def test_nbytes_counts_every_array() -> None:
    p = Projection(packed(E, OUT, 8), zeros(E, OUT, 1), zeros(E, OUT, 1), bias=zeros(E, OUT), quant=AFFINE)
    assert p.nbytes == sum(4 * n for n in (E * OUT * 8, E * OUT, E * OUT, E * OUT))


def test_projections_in_order() -> None:
    up, gate, down = stack(8, 16), stack(8, 16), stack(16, 8)
    assert ExpertWeights(up=up, gate=gate, down=down).projections == (gate, up, down)
    plain = ExpertWeights(up=up, down=down, activation=Activation(name="relu2"))
    assert plain.projections == (up, down)
