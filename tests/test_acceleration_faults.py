"""What is not exactly what mlx-lm's release has is left alone, with the reason; nothing is half-applied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from marks import needs_native
from mlx_lm.models import (
    activations,
    dbrx,
    gemma4_text,
    glm4_moe,
    kimi_k3,
    llama,
    qwen2_moe,
    step3p5,
    switch_layers,
)
from mlx_lm.models.switch_layers import SwitchGLU, SwitchLinear
from mlx_lm_models import MODELS, build, parameters, tokens

import moefast
from moefast.acceleration import Report, look
from moefast.acceleration import model as acceleration
from moefast.env import Settings
from moefast.testing import assert_logits_close

pytestmark = pytest.mark.usefixtures("cpu")
BACKENDS = pytest.mark.parametrize("backend", [pytest.param("native", marks=needs_native), "reference"])


def fresh(module: str = "glm4_moe", **how: Any) -> nn.Module:
    return build(next(t for t in MODELS if t.module == module), **how)


def mlp(model: nn.Module) -> Any:
    """The MoE block of the last layer."""
    return model.layers[-1].mlp


def classes(model: nn.Module) -> list[type]:
    return [type(module) for _, module in model.named_modules()]


def assert_left_alone(model: nn.Module, *words: str, experts: bool = False) -> Report:
    """The only block of the model is the original, for a reason with these words; it computes what it did.
    With ``experts`` its stack, which is plain, is accelerated on its own."""
    text = tokens(2, 7)
    before, kinds, want = parameters(model), classes(model), model(text)
    mx.eval(want)
    report = moefast.accelerate(model, backend="reference", dense=False)
    (entry,) = report.original
    assert all(word in (entry.reason or "") for word in words), entry.reason
    assert entry.reason in str(report)
    assert [e.what for e in report.accelerated] == (["experts"] if experts else [])
    if not experts:
        assert classes(model) == kinds
    assert all(parameters(model)[path] is value for path, value in before.items())
    got = model(text)
    assert mx.array_equal(got, want).item() if not experts else assert_close_logits(got, want)
    moefast.restore(model)
    assert classes(model) == kinds
    assert mx.array_equal(model(text), want).item()
    return report


def assert_close_logits(got: mx.array, want: mx.array) -> bool:
    assert_logits_close(got, want, layers=2, hidden=64)
    return True


# Blocks that are not what they were.


def test_a_patched_block(monkeypatch: pytest.MonkeyPatch) -> None:
    original = glm4_moe.MoE.__call__
    monkeypatch.setattr(glm4_moe.MoE, "__call__", lambda self, x: 2 * original(self, x))
    assert_left_alone(fresh(), "glm4_moe.MoE.__call__ has been patched", __file__, experts=True)


def test_a_patched_router(monkeypatch: pytest.MonkeyPatch) -> None:
    original = glm4_moe.MoEGate.__call__
    monkeypatch.setattr(glm4_moe.MoEGate, "__call__", lambda self, x: original(self, x))
    assert_left_alone(fresh(), "glm4_moe.MoEGate.__call__ has been patched", experts=True)


def test_a_patched_function_that_a_router_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    original = glm4_moe.group_expert_select
    monkeypatch.setattr(glm4_moe, "group_expert_select", lambda *a: original(*a))
    assert_left_alone(fresh(), "glm4_moe.group_expert_select has been patched", experts=True)


def test_a_compiled_function_put_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    original = glm4_moe.group_expert_select
    monkeypatch.setattr(glm4_moe, "group_expert_select", mx.compile(lambda *a: original(*a)))
    assert_left_alone(fresh(), "glm4_moe.group_expert_select has been patched", experts=True)


def test_a_patched_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    original = SwitchGLU.__call__
    monkeypatch.setattr(SwitchGLU, "__call__", lambda self, x, i: original(self, x, i))
    report = moefast.accelerate(fresh(), backend="reference", dense=False)
    assert not report.accelerated
    assert all("SwitchGLU.__call__ has been patched" in (e.reason or "") for e in report.original)


@pytest.mark.parametrize(
    ("module", "owner", "name"),
    [
        ("glm4_moe", switch_layers.SwiGLU, "__call__"),
        ("glm4_moe", activations, "swiglu"),
        ("gpt_oss", activations, "swiglu_oai"),
        ("gemma4_text", gemma4_text, "geglu"),
        ("step3p5", step3p5, "clamped_swiglu"),
        ("kimi_k3", kimi_k3, "_situ"),
    ],
)
def test_a_patched_activation(module: str, owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *a, **k: original(*a, **k))
    report = moefast.accelerate(fresh(module), backend="reference", dense=False)
    assert [e.what for e in report.accelerated] == ["router"] * 2 * (module == "gemma4_text")
    assert all(f"{name} has been patched" in (e.reason or "") for e in report.original)


@pytest.mark.parametrize(
    ("name", "words"),
    [("per_expert_scale", "per_expert_scale"), ("config", "config"), ("proj", "proj")],
)
def test_a_router_without_its_parts(name: str, words: str) -> None:
    model = fresh("gemma4_text")
    router = model.layers[0].router
    delattr(router, name)
    report = moefast.accelerate(model, backend="reference", dense=False)
    (entry,) = report.original
    assert entry.path == "model.layers.0.router"
    assert words in (entry.reason or "")
    assert type(router) is gemma4_text.Router
    assert [e.what for e in report.accelerated] == ["experts", "experts", "router"]


def test_a_patched_router_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    original = gemma4_text.Router.__call__
    monkeypatch.setattr(gemma4_text.Router, "__call__", lambda self, x: original(self, x))
    report = moefast.accelerate(fresh("gemma4_text"), backend="reference", dense=False)
    assert [e.what for e in report.entries] == ["experts", "original"] * 2


class Doubled(glm4_moe.MoE):
    def __call__(self, x: mx.array) -> mx.array:
        return 2 * super().__call__(x)


def test_a_block_of_a_derived_class() -> None:
    model = fresh()
    mlp(model).__class__ = Doubled
    text = tokens(2, 7)
    want = model(text)
    report = moefast.accelerate(model, backend="reference", dense=False)
    # An unknown block: it goes on routing, its experts are plain and accelerated.
    assert [(e.path, e.what) for e in report.entries] == [("model.layers.1.mlp.switch_mlp", "experts")]
    assert_close_logits(model(text), want)


class UnknownBlock(nn.Module):
    """Weighs its experts in a way that no family does."""

    def __init__(self, **stack: Any) -> None:
        super().__init__()
        self.gate = nn.Linear(64, 8)
        self.experts = SwitchGLU(64, 128, 8, **stack)

    def __call__(self, x: mx.array) -> mx.array:
        scores = mx.tanh(self.gate(x))
        indices = mx.argsort(-scores, axis=-1)[..., :2]
        return (self.experts(x, indices) * mx.take_along_axis(scores, indices, -1)[..., None]).sum(-2)


def test_an_unknown_block_gets_fast_experts() -> None:
    block, x = UnknownBlock().eval(), mx.random.normal((2, 5, 64))
    want = block(x)
    report = moefast.accelerate(block, backend="reference")
    assert [(e.path, e.what) for e in report.entries] == [("experts", "experts")]
    assert_close_logits(block(x), want)


def test_a_renamed_attribute() -> None:
    model = fresh()
    gate = mlp(model).gate
    gate.number_of_groups = gate.n_group
    del gate.n_group
    with pytest.raises(AttributeError):
        model(tokens(1, 3))
    report = moefast.accelerate(model, backend="reference", dense=False)
    (entry,) = report.original
    assert "its parameters are not what its class has" in entry.reason
    assert "n_group" in entry.reason
    assert type(mlp(model)) is glm4_moe.MoE


def test_a_missing_selection_bias() -> None:
    model = fresh()
    del mlp(model).gate.e_score_correction_bias
    report = moefast.accelerate(model, backend="reference", dense=False)
    (entry,) = report.original
    assert "e_score_correction_bias" in entry.reason
    assert type(mlp(model)) is glm4_moe.MoE


def test_a_selection_bias_of_another_length() -> None:
    model = fresh()
    mlp(model).gate.e_score_correction_bias = mx.zeros(5)
    report = moefast.accelerate(model, backend="reference", dense=False)
    (entry,) = report.original
    assert "selection_bias" in entry.reason


class LoggedSwitchLinear(SwitchLinear):
    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        return super().__call__(*args, **kwargs)


def test_a_derived_projection() -> None:
    model = fresh()
    mlp(model).switch_mlp.up_proj.__class__ = LoggedSwitchLinear
    text = tokens(2, 7)
    want = model(text)
    report = moefast.accelerate(model, backend="reference", dense=False)
    assert not report.accelerated
    # The block, and then its stack, which could have been accelerated alone.
    assert [e.path for e in report.original] == ["model.layers.1.mlp", "model.layers.1.mlp.switch_mlp"]
    assert all("of up_proj: it is a" in (e.reason or "") for e in report.original)
    assert all("LoggedSwitchLinear" in (e.reason or "") for e in report.original)
    assert mx.array_equal(model(text), want).item()


class OtherGate(nn.Module):
    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        return mx.zeros((*x.shape[:-1], 1), mx.uint32), mx.ones((*x.shape[:-1], 1))


def test_a_replaced_gate() -> None:
    model = fresh()
    mlp(model).gate = OtherGate()
    assert_left_alone(model, "OtherGate", "not mlx-lm's glm4_moe.MoEGate", experts=True)


def test_a_gate_replaced_later() -> None:
    """Parts are looked up in every call: another gate raises, it is not mistaken for the old one."""
    model = fresh()
    moefast.accelerate(model, backend="reference", dense=False)
    mlp(model).gate = OtherGate()
    with pytest.raises(AttributeError, match="OtherGate"):
        mx.eval(model(tokens(1, 3)))


class Swish(nn.Module):
    def __call__(self, x: mx.array, gate: mx.array) -> mx.array:
        return gate * mx.sigmoid(1.702 * gate) * x


def test_an_unknown_activation() -> None:
    model = fresh()
    mlp(model).switch_mlp.activation = Swish()
    text = tokens(2, 7)
    want = model(text)
    report = moefast.accelerate(model, backend="reference", dense=False)
    assert not report.accelerated
    assert all(e.reason == "its activation Swish has no kernel" for e in report.original)
    assert mx.array_equal(model(text), want).item()


def test_an_activation_replaced_later() -> None:
    model, text = fresh(), tokens(2, 7)
    moefast.accelerate(model, backend="reference", dense=False)
    model(text)
    mlp(model).switch_mlp.activation = Swish()
    plain = fresh()
    mlp(plain).switch_mlp.activation = Swish()
    assert_close_logits(model(text), plain(text))


@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
def test_a_projection_of_another_shape(name: str) -> None:
    model = fresh()
    stack = mlp(model).switch_mlp
    stack[name].weight = stack[name].weight[:, :32]
    report = moefast.accelerate(model, backend="reference", dense=False)
    assert not report.accelerated
    assert all("its parameters are not what its class has" in (e.reason or "") for e in report.original)
    assert type(mlp(model)) is glm4_moe.MoE


def test_a_shared_expert_of_another_class_is_called() -> None:
    class Halved(glm4_moe.MLP):
        def __call__(self, x: mx.array) -> mx.array:
            return super().__call__(x) / 2

    model, text = fresh(), tokens(2, 7)
    mlp(model).shared_experts.__class__ = Halved
    want = model(text)
    report = moefast.accelerate(model, backend="reference", dense=False)
    assert [e.what for e in report.accelerated] == ["block"]
    assert_close_logits(model(text), want)


def test_one_dbrx_expert_that_is_not_like_the_others() -> None:
    model, text = fresh("dbrx"), tokens(2, 7)
    expert = model.layers[1].ffn.experts[3]
    expert.w1 = nn.QuantizedLinear.from_linear(expert.w1, 64, 4)
    want, names = model(text), list(parameters(model))
    report = moefast.accelerate(model, backend="reference", dense=False)
    assert [e.what for e in report.entries] == ["block", "original"]
    assert "w1 are not alike" in (report.original[0].reason or "")
    assert isinstance(model.layers[1].ffn.experts[3], dbrx.MLP)
    assert_close_logits(model(text), want)
    moefast.restore(model)
    assert sorted(parameters(model)) == sorted(names)
    assert mx.array_equal(model(text), want).item()


# Changes after accelerate, which the next call sees.


@pytest.mark.parametrize(
    ("module", "change"),
    [
        ("glm4_moe", lambda model: setattr(mlp(model).gate, "top_k", 2)),
        ("glm4_moe", lambda model: setattr(mlp(model).gate, "topk_group", 3)),
        ("glm4_moe", lambda model: setattr(mlp(model).gate, "norm_topk_prob", False)),
        ("glm4_moe", lambda model: setattr(mlp(model).gate, "routed_scaling_factor", 0.5)),
        ("glm4_moe", lambda model: setattr(mlp(model).gate, "e_score_correction_bias", mx.arange(8) * 0.5)),
        ("qwen2_moe", lambda model: setattr(mlp(model), "top_k", 1)),
        ("minimax", lambda model: setattr(model.layers[0].block_sparse_moe, "num_experts_per_tok", 5)),
        ("gemma4_text", lambda model: setattr(model.layers[0].router.config, "top_k_experts", 1)),
        ("glm4_moe", lambda model: mlp(model).switch_mlp.up_proj.update({"weight": mx.ones((8, 128, 64))})),
    ],
)
@BACKENDS
def test_a_change_after_accelerate(module: str, change: Callable[[nn.Module], None], backend: str) -> None:
    model, plain, text = fresh(module), fresh(module), tokens(2, 7)
    moefast.accelerate(model, backend=backend)
    mx.eval(model(text))
    unchanged = plain(text)
    change(model)
    change(plain)
    want = plain(text)
    assert not mx.array_equal(want, unchanged).item()
    assert_close_logits(model(text), want)


# Models, backends, environments.


def test_nothing_to_do() -> None:
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=64,
            num_hidden_layers=2,
            intermediate_size=128,
            num_attention_heads=4,
            rms_norm_eps=1e-5,
            vocab_size=128,
        )
    ).eval()
    text, kinds = tokens(1, 5), classes(model)
    want = model(text)
    report = moefast.accelerate(model)
    assert not report.entries
    assert "no MoE layers" in str(report)
    assert classes(model) == kinds
    assert mx.array_equal(model(text), want).item()
    assert moefast.restore(model) == 0


def test_a_backend_that_cannot_run() -> None:
    reason = moefast.backends()["metal"]
    if reason is None:
        pytest.skip("metal runs here")
    model = fresh()
    kinds = classes(model)
    with pytest.raises(ValueError, match=r"^\[accelerate\] backend 'metal' must be able to run here, got "):
        moefast.accelerate(model, backend="metal")
    assert classes(model) == kinds


def test_a_backend_that_there_is_not() -> None:
    model = fresh()
    with pytest.raises(ValueError, match="cuda"):
        moefast.accelerate(model, backend="cuda")


def test_what_is_no_model() -> None:
    with pytest.raises(ValueError, match=r"^\[accelerate\] model must be an mlx.nn.Module, got dict"):
        moefast.accelerate({})  # type: ignore[arg-type]


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceleration, "settings", Settings.read({"MOEFAST": "0"}))
    model = fresh()
    kinds = classes(model)
    report = moefast.accelerate(model, backend="reference")
    assert not report.entries
    assert str(report) == "moefast: MOEFAST=0: the model is as it was"
    assert classes(model) == kinds


def test_nothing_is_half_applied_when_looking_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong while blocks are looked at: none of them has been changed."""
    model = fresh("qwen2_moe")
    kinds, calls = classes(model), iter([True, False])
    look_at_block = look.look_at_block

    def broken(*args: Any) -> Any:
        if not next(calls):
            raise MemoryError
        return look_at_block(*args)

    monkeypatch.setattr(look, "look_at_block", broken)
    with pytest.raises(MemoryError):
        moefast.accelerate(model, backend="reference")
    assert classes(model) == kinds


def test_the_context_restores_after_an_error() -> None:
    model = fresh()
    kinds = classes(model)

    def fails() -> None:
        with moefast.accelerated(model, backend="reference"):
            assert classes(model) != kinds
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert classes(model) == kinds


@BACKENDS
def test_float16_inputs_to_a_float32_model(backend: str) -> None:
    """mlx-lm lets MLX promote dtypes; so does an accelerated block, one way or another."""
    model = fresh()
    block, x = mlp(model), mx.random.normal((2, 5, 64)).astype(mx.float16)
    want = block(x)
    moefast.accelerate(model, backend=backend)
    got = block(x)
    assert got.dtype == want.dtype
    assert_logits_close(got, want, layers=2, hidden=64, dtype=mx.float16)


def test_integers_are_refused_as_ever() -> None:
    model = fresh()
    moefast.accelerate(model, backend="reference")
    with pytest.raises(ValueError, match="float"):
        mx.eval(mlp(model)(mx.zeros((2, 64), mx.int32)))


def test_an_input_of_another_width() -> None:
    model = fresh()
    moefast.accelerate(model, backend="reference")
    with pytest.raises(ValueError, match="63"):
        mx.eval(mlp(model)(mx.zeros((2, 63))))


def test_the_class_that_is_left_alone_is_named() -> None:
    assert qwen2_moe.Qwen2MoeSparseMoeBlock.__name__ in str(
        moefast.accelerate(fresh("qwen2_moe"), backend="reference")
    )
