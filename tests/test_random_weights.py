"""Random parameters: their size, their reproducibility, and what drawing them costs."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from moefast import QuantSpec

pytest.importorskip("mlx_lm")

from moefast.lm import preset, random_parameters
from moefast.lm.random_weights import draw, leaves_of
from moefast.models import get_classes

MODES = [
    *(QuantSpec(bits=bits) for bits in (2, 3, 4, 5, 6, 8)),
    QuantSpec(group_size=32),
    QuantSpec(group_size=128),
    QuantSpec(bits=4, group_size=32, mode="mxfp4"),
    QuantSpec(bits=8, group_size=32, mode="mxfp8"),
    QuantSpec(bits=4, group_size=16, mode="nvfp4"),
]


def quantized(family: str, quant: QuantSpec | None, size: str = "tiny") -> mlx.nn.Module:
    config = preset(family, size)
    model_class, args = get_classes(config)
    model: mlx.nn.Module = model_class(args.from_dict(config))
    if quant is not None:
        mlx.nn.quantize(model, **quant.mlx_arguments())
    return model


@pytest.mark.parametrize("quant", MODES, ids=repr)
def test_packed_weights_have_the_size_of_trained_ones(quant: QuantSpec) -> None:
    model = quantized("qwen2_moe", quant)
    random_parameters(model, seed=1, dtype="float32")
    layer = model.model.layers[1].mlp.switch_mlp.up_proj
    w = mx.dequantize(layer.weight, layer.scales, layer.get("biases"), **quant.mlx_arguments())
    values = np.array(w.astype(mx.float32)) * math.sqrt(layer.input_dims)
    assert np.isfinite(values).all()
    # Scales of the float modes are powers of two, or small fp8 numbers: "about 1" is all there is.
    assert 0.7 < values.std() < 1.4
    assert abs(values.mean()) < 0.02


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_unpacked_weights_have_the_size_of_trained_ones(dtype: str) -> None:
    model = quantized("glm4_moe", None)
    random_parameters(model, dtype=dtype)
    moe = model.model.layers[1].mlp
    assert all(
        v.dtype == getattr(mx, dtype) for k, v in tree_flatten(model.parameters()) if "e_score" not in k
    )
    w = np.array(moe.switch_mlp.down_proj.weight.astype(mx.float32)) * math.sqrt(128)
    assert 0.95 < w.std() < 1.05
    assert abs(w.mean()) < 0.02
    assert (model.model.norm.weight == 1).all()
    bias = moe.gate.e_score_correction_bias
    assert bias.dtype == mx.float32  # the model's cast_predicate keeps it
    assert 0 < mx.abs(bias).max() < 0.05


def test_global_scales_are_taken_into_account() -> None:
    from mlx_lm.models.switch_layers import SwitchLinear

    quant = QuantSpec(bits=4, group_size=16, mode="nvfp4")
    model = mlx.nn.Module()
    model.up_proj = SwitchLinear(256, 64, 4, bias=False).to_quantized(
        **quant.mlx_arguments(), global_scale=True
    )
    random_parameters(model)
    up = model.up_proj
    w = mx.stack(
        [
            mx.dequantize(
                up.weight[e], up.scales[e], **quant.mlx_arguments(), global_scale=up.global_scale[e]
            )
            for e in range(4)
        ]
    )
    assert 0.9 < float(w.astype(mx.float32).std()) * 16 < 1.1


def test_values_depend_on_seed_and_path_alone() -> None:
    model = quantized("bailing_moe", QuantSpec())
    leaves = leaves_of(model, "bfloat16")
    forth = {leaf.path: draw(leaf, 3) for leaf in leaves}
    back = {leaf.path: draw(leaf, 3) for leaf in reversed(leaves)}
    assert all((forth[p][n] == back[p][n]).all() for p in forth for n in forth[p])
    first, second = (f"model.layers.{i}.mlp.switch_mlp.up_proj" for i in (1, 2))
    assert (forth[first]["weight"] != forth[second]["weight"]).any()
    other = draw(next(leaf for leaf in leaves if leaf.path == first), 4)
    assert (forth[first]["weight"] != other["weight"]).any()


def test_random_parameters_evaluates_no_former_parameter() -> None:
    model = quantized("qwen2_moe", QuantSpec(), "small")
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    random_parameters(model)
    mx.eval(model.parameters())
    nbytes = sum(value.nbytes for _, value in tree_flatten(model.parameters()))
    # The former weights in float32 would be seven times as much.
    assert mx.get_peak_memory() - before < 1.5 * nbytes


def test_random_parameters_refuses_a_dtype() -> None:
    with pytest.raises(ValueError, match=r"\[random_parameters\] dtype must be one of .*, got 'int8'\."):
        random_parameters(mlx.nn.Linear(4, 4), dtype="int8")
