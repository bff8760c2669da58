"""Accelerated models train and are adapted like plain ones: same losses, same gradients, same LoRA layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import numpy as np
import pytest
from marks import needs_native
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear
from mlx_lm.tuner.trainer import TrainingArgs, TrainingCallback, train
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm_models import MODELS, Tiny, build, parameters, tokens

import moefast
from moefast.testing import assert_gradients_close, assert_logits_close

pytestmark = [needs_native, pytest.mark.usefixtures("cpu")]


def tiny(module: str) -> Tiny:
    return next(t for t in MODELS if t.module == module)


# Plain, groups and a raw gate, a gated shared expert, biases, router and experts apart, a list of experts.
ADAPTED = ("mixtral", "glm4_moe", "qwen2_moe", "gpt_oss", "gemma4_text")
KEYS: dict[str, list[str] | None] = {
    "everything": None,
    "attention": ["self_attn.q_proj", "self_attn.v_proj"],
    "experts": [
        f"mlp.{stack}.{name}_proj" for stack in ("switch_mlp", "experts") for name in ("gate", "up", "down")
    ]
    + ["experts.switch_glu.up_proj"],
    "one projection": ["mlp.switch_mlp.up_proj", "mlp.experts.up_proj", "experts.switch_glu.down_proj"],
    "shared expert": ["mlp.shared_experts.up_proj", "mlp.shared_expert.down_proj", "mlp.down_proj"],
}


def adapt(model: nn.Module, keys: list[str] | None, *, dropout: float = 0.0) -> nn.Module:
    """LoRA layers whose second matrix is not zero."""
    mx.random.seed(3)
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 2.0, "dropout": dropout, "keys": keys})
    for _, layer in model.named_modules():
        if isinstance(layer, (LoRALinear, LoRASwitchLinear)):
            layer.lora_b = mx.random.normal(layer.lora_b.shape, scale=0.1)
    return model.eval()


@pytest.mark.parametrize(
    ("module", "keys", "bits"),
    [
        (module, keys, bits)
        for module in ADAPTED
        for keys in KEYS
        for bits in (None, 4)
        # One format each, but for two families.
        if module in ("qwen2_moe", "gemma4_text") or (bits is None) == (keys != "everything")
    ],
)
def test_lora_before_and_after(module: str, keys: str, bits: int | None) -> None:
    text, family = tokens(2, 12), tiny(module)
    plain = adapt(build(family, bits=bits), KEYS[keys])
    want = plain(text)
    paths = list(parameters(plain))

    before = build(family, bits=bits)
    moefast.accelerate(before, backend="native")
    before = adapt(before, KEYS[keys])
    after = adapt(build(family, bits=bits), KEYS[keys])
    report = moefast.accelerate(after, backend="native")
    assert report.accelerated or keys == "everything", str(report)

    for model in (before, after):
        assert list(parameters(model)) == paths
        assert_logits_close(model(text), want, layers=family.layers, hidden=64)
    moefast.restore(after)
    assert mx.array_equal(after(text), want).item()


def test_adapted_experts_run_as_they_are_and_say_so() -> None:
    model = adapt(build(tiny("glm4_moe")), ["mlp.switch_mlp.up_proj"])
    report = moefast.accelerate(model, backend="native")
    assert [entry.reason for entry in report.accelerated] == ["its experts are adapted, and run as they are"]


def loss_of(model: nn.Module, text: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(text[:, :-1]), text[:, 1:], reduction="mean")


def gradients(model: nn.Module) -> dict[str, mx.array]:
    text = tokens(2, 13)
    _, found = nn.value_and_grad(model, loss_of)(model, text)
    flat = dict(tree_flatten(found))
    mx.eval(flat)
    return flat


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("module", [*ADAPTED, "dbrx", "kimi_k3", "nemotron_h", "Klear", "longcat_flash"])
def test_gradients_of_everything(module: str, training: bool) -> None:
    family = tiny(module)
    model = build(family).train(training)
    want = gradients(model)
    moefast.accelerate(model, backend="native")
    assert model.training == training
    got = gradients(model)
    if module == "dbrx":
        got = unstacked(got)
    # What multiplies the last layer's output before a norm is divided out again: nothing is left of its
    # gradient but roundings.
    for gradient in (got, want):
        gradient.pop("model.layers.1.layer_scalar", None)
    assert_gradients_close(got, want, layers=family.layers, hidden=64)


def unstacked(gradients: dict[str, mx.array]) -> dict[str, mx.array]:
    """DBRX's, under the names that they have in mlx-lm."""
    names = {"gate_proj": "w1", "up_proj": "v1", "down_proj": "w2"}
    found = {}
    for path, gradient in gradients.items():
        before, stacked, after = path.partition(".switch_mlp.")
        if not stacked:
            found[path] = gradient
            continue
        layer, _, name = after.partition(".")
        for i, of_one in enumerate(gradient):
            found[f"{before}.experts.{i}.{names[layer]}.{name}"] = of_one
    return found


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("module", ADAPTED)
def test_gradients_of_adapters_on_quantized_layers(module: str, training: bool) -> None:
    def adapted() -> nn.Module:
        model = build(tiny(module), bits=4)
        model.freeze()
        return adapt(model, KEYS["attention"]).train(training)

    plain, fast = adapted(), adapted()
    moefast.accelerate(fast, backend="native")
    want, got = gradients(plain), gradients(fast)
    assert want
    assert_gradients_close(got, want, layers=tiny(module).layers, hidden=64)


class Losses(TrainingCallback):
    def __init__(self) -> None:
        self.train: list[float] = []
        self.validation: list[float] = []

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        self.train.append(train_info["train_loss"])

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        self.validation.append(val_info["val_loss"])


@pytest.mark.timeout(600)  # what MLX compiles for a CPU takes its time the first time
@pytest.mark.parametrize("module", ["glm4_moe", pytest.param("qwen2_moe", marks=pytest.mark.slow)])
def test_a_training_loop_of_mlx_lm(module: str, tmp_path: Path) -> None:
    """The original computes in training, so losses are the very same; validation runs accelerated."""
    texts = [(tokens(20, seed=i).tolist(), 0) for i in range(6)]

    def trained(fast: bool) -> tuple[Losses, nn.Module]:
        model = build(tiny(module), bits=4)
        model.freeze()
        if fast:
            moefast.accelerate(model, backend="native")
        model = adapt(model, None)
        losses = Losses()
        np.random.seed(0)
        train(
            model,
            mlx.optimizers.Adam(learning_rate=1e-3),
            texts,
            val_dataset=texts,
            args=TrainingArgs(
                batch_size=2,
                iters=3,
                val_batches=2,
                steps_per_report=1,
                steps_per_eval=2,
                adapter_file=str(tmp_path / "adapters.safetensors"),
            ),
            training_callback=losses,
        )
        return losses, model.eval()

    plain, plain_model = trained(fast=False)
    fast, fast_model = trained(fast=True)
    assert len(plain.train) == 3
    assert fast.train == plain.train
    want, text = mx.array(plain.validation), tokens(2, 9)
    assert_logits_close(mx.array(fast.validation)[None], want[None], layers=2, hidden=64)
    assert_logits_close(fast_model(text), plain_model(text), layers=2, hidden=64)
    moefast.restore(fast_model)
    assert mx.array_equal(fast_model(text), plain_model(text)).item()
