"""``moefast verify``: what is right passes, what is broken fails, and the layer that is broken is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.qwen2_moe import Qwen2MoeSparseMoeBlock
from mlx_lm.models.switch_layers import SwitchGLU

import moefast
from moefast import RouterSpec
from moefast.acceleration import Entry, block
from moefast.cli import main
from moefast.lm import compare, init_model
from moefast.lm.compare import Comparison, Step, verify
from moefast.lm.compare_layers import Layer, Routed, _too_close, close_calls
from moefast.lm.compare_report import first_difference
from moefast.testing import Bound, Error

Checkpoint = Callable[..., str]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """``checkpoint(family, **options)``: the folder of a tiny one, written once."""
    made: dict[str, str] = {}

    def make(family: str, **options: Any) -> str:
        key = f"{family}{sorted(options.items())}"
        if key not in made:
            made[key] = str(init_model(family, tmp_path_factory.mktemp("verify") / "m", **options).path)
        return made[key]

    return make


@pytest.fixture
def fp32(checkpoint: Checkpoint) -> str:
    """Two MoE layers, with a shared expert, in float32: one comparison."""
    return checkpoint("qwen2_moe", bits=None, dtype="float32")


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen2_moe", {"bits": None, "dtype": "float32"}),
        ("granitemoe", {"bits": 4}),
        ("glm4_moe", {"mode": "mxfp4", "bits": 4}),
        ("bailing_moe", {"bits": None, "dtype": "float16"}),
        ("dbrx", {"bits": 8}),
    ],
)
def test_passes(family: str, options: dict[str, Any], checkpoint: Checkpoint) -> None:
    result = verify(checkpoint(family, **options), tokens=3)
    assert result.passed, [first_difference(c) for c in result.comparisons]
    own = {"float32": 1}.get(options.get("dtype", ""), 2)
    assert len(result.comparisons) == own
    first = result.comparisons[0]
    assert first.dtype == first.plain_dtype == "float32"
    assert len(first.steps) == 3
    assert all(step.plain == step.accelerated for step in first.steps)
    for comparison in result.comparisons:
        assert comparison.layers
        for layer in comparison.layers:
            assert set(layer.errors) == {"decode", "band", "prefill"}
            assert layer.routed > 128
            assert layer.alike + layer.ties == layer.routed
            assert layer.limit is not None
            # Another kernel ran: the bits differ.
            assert 0 < max(e.max for e in layer.errors.values()) < layer.limit.max


def test_report(fp32: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--model", fp32, "--tokens", "2", "--prompt", "abc"]) == 0
    out, err = capsys.readouterr()
    assert not err
    assert "model.layers.0.mlp" in out
    assert "greedy tokens: 2 of 2 the same" in out
    assert out.endswith("\npassed\n")


def test_json(checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--model", checkpoint("granitemoe"), "--tokens", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"]
    assert [c["dtype"] for c in found["comparisons"]] == ["float32", "bfloat16"]
    layer = found["comparisons"][0]["layers"][0]
    assert layer["what"] == "block"
    assert layer["errors"]["prefill"]["max"] <= layer["limit"]["max"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/no/where"], "[load] path must be a directory"),
        (["--model", "{model}", "--tokens", "0"], "[verify] tokens must be at least 1, got 0."),
        (["--model", "{model}", "--prompt", ""], "[verify] prompt must not be empty"),
        (["--model", "{model}", "--backend", "cuda"], "[backend] backend must be one of "),
    ],
)
def test_bad_arguments(
    arguments: list[str], message: str, fp32: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", *(a.format(model=fp32) for a in arguments)]) == 2
    assert capsys.readouterr().err.startswith(f"moefast: error: {message}")


def test_switched_off(fp32: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "settings", replace(compare.settings, enabled=False))
    with pytest.raises(ValueError, match="MOEFAST=0"):
        verify(fp32)


def test_a_plain_model_that_cannot_run(fp32: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no Metal")

    monkeypatch.setattr("mlx_lm.models.qwen2_moe.Model.__call__", fail)
    with pytest.raises(ValueError, match="the plain model must be able to run here, got RuntimeError: no M"):
        verify(fp32, tokens=2)


def test_nothing_accelerated(
    fp32: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It passes, the text being the same, and says what was not compared."""
    for kind in (Qwen2MoeSparseMoeBlock, SwitchGLU):
        intact = kind.__call__
        monkeypatch.setattr(kind, "__call__", lambda *given, intact=intact: intact(*given))
    assert main(["verify", "--model", fp32, "--tokens", "2"]) == 0
    out = capsys.readouterr().out
    assert "model.layers.1.mlp: Qwen2MoeSparseMoeBlock: left to mlx-lm, not compared: " in out
    assert "has been patched" in out
    assert "no MoE layer was accelerated" in out


def broken(monkeypatch: pytest.MonkeyPatch, layer: int, harm: Callable[[Any, Any], Any]) -> None:
    """``harm(x, y)`` is what the accelerated block of a layer, of two, answers instead of y."""
    intact = block.AcceleratedBlock.__call__
    seen: list[int] = []  # modules by identity: as dictionaries they may be equal

    def call(module: Any, x: mx.array) -> mx.array:
        if id(module) not in seen:
            seen.append(id(module))
        y = intact(module, x)
        return harm(x, y) if seen.index(id(module)) % 2 == layer else y

    monkeypatch.setattr(block.AcceleratedBlock, "__call__", call)


def failing(model: str, capsys: pytest.CaptureFixture[str], tokens: int = 3) -> str:
    """What is printed of the first difference."""
    assert main(["verify", "--model", model, "--tokens", str(tokens)]) == 1
    out = capsys.readouterr().out
    assert out.endswith("\nfailed\n")
    return next(line for line in out.splitlines() if line.startswith("first difference: "))


@pytest.mark.parametrize("layer", [0, 1])
def test_a_wrong_layer_is_named(
    layer: int, fp32: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken(monkeypatch, layer, lambda x, y: y * 1.0001)
    where = failing(fp32, capsys)
    assert f"model.layers.{layer}.mlp (Qwen2MoeSparseMoeBlock), decode, token 0: decode: max error" in where


def test_a_wrong_phase_and_token_are_named(
    fp32: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def harm(x: mx.array, y: mx.array) -> mx.array:
        rows = x.shape[-2]
        return y + mx.where(mx.arange(rows)[:, None] == 5, 0.01, 0.0) if rows >= 128 else y

    broken(monkeypatch, 1, harm)
    assert "model.layers.1.mlp (Qwen2MoeSparseMoeBlock), prefill, token 5" in failing(fp32, capsys)


def test_what_is_wrong_in_the_checkpoint_s_own_dtype_only(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch, 0, lambda x, y: y * 1.2 if y.dtype == mx.bfloat16 else y)
    result = verify(checkpoint("granitemoe"), tokens=2)
    assert [c.passed for c in result.comparisons] == [True, False]
    assert "layers.0" in str(first_difference(result.comparisons[1]))


def test_nan(fp32: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    broken(monkeypatch, 1, lambda x, y: y * float("nan"))
    assert "model.layers.1.mlp" in failing(fp32, capsys)


def test_a_kernel_that_raises(
    fp32: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(x: mx.array, y: mx.array) -> mx.array:
        raise RuntimeError("out of\nmemory")

    broken(monkeypatch, 1, fail)
    assert "model.layers.1.mlp" in (where := failing(fp32, capsys))
    assert "RuntimeError: out of memory" in where


def test_another_choice_of_experts(
    fp32: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    intact = moefast.ops.route

    def route(logits: mx.array, *arguments: Any, **named: Any) -> Any:
        return intact(-logits, *arguments, **named)

    monkeypatch.setattr(moefast.ops, "route", route)
    assert "other experts for " in failing(fp32, capsys)


def test_what_is_wrong_beside_the_experts(
    fp32: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No MoE layer sees it on the same input; the logits do."""
    if moefast.backends()["native"] is not None:
        pytest.skip("only native runs anything beside the experts")
    intact = moefast.ops.rms_norm
    monkeypatch.setattr(moefast.ops, "rms_norm", lambda *given, **how: intact(*given, **how) * 1.001)
    assert "first difference: the logits of step 0: max error" in failing(fp32, capsys)


def routed(keys: list[list[float]], chosen: list[list[int]], **fields: Any) -> Routed:
    values = np.array(keys)
    spec = RouterSpec(
        num_experts=values.shape[-1], top_k=len(chosen[0]), score="sigmoid", score_dtype="float32"
    )
    known = {
        "indices": np.array(chosen),
        "keys": values,
        "size": np.abs(values).max(axis=-1),
        "logits": np.ones(len(values)),
        "group_gap": np.full(len(values), np.inf),
        "spec": spec,
    }
    return Routed(**(known | fields))


def test_other_experts_are_excused_where_keys_are_too_close() -> None:
    """Rows: nearly a tie, no tie, a tie of others than those that changed places."""
    plain = routed([[0.5, 0.5 - 1e-8, 0.1], [0.5, 0.4, 0.1], [0.5, 0.5, 0.1]], [[0], [0], [0]])
    other = np.array([[1], [1], [2]])
    which = np.arange(3)
    assert _too_close(plain, other, which, mx.float32, 64).tolist() == [True, False, False]
    groups = plain._replace(group_gap=np.array([1.0, 1e-9, 1.0]))
    assert _too_close(groups, other, which, mx.float32, 64).tolist() == [True, True, False]


def test_close_calls() -> None:
    layer = Layer(Entry(path="x", kind="K", what="block"), None, reductions=(64, 64))
    assert not close_calls(layer, mx.float32, 1e-5).any()
    layer.routed = routed([[0.5, 0.5 - 1e-6, 0.1], [0.5, 0.4, 0.1]], [[0], [0]])
    assert close_calls(layer, mx.float32, 1e-5).tolist() == [True, False]
    layer.routed = routed([[0.5, 0.4]], [[0, 1]])  # all experts: nothing to choose
    assert close_calls(layer, mx.float32, 1e-5).tolist() == [False]


def steps(*found: Step) -> Comparison:
    limit = Bound(max=1e-5, rms=5e-6)
    return Comparison(dtype="float32", plain_dtype="float32", layers=(), steps=found, limit=limit)


def test_steps_are_judged() -> None:
    right = Step(Error(1e-6, 1e-6), plain=1, accelerated=1, tied=False, unsure=False)
    wrong = right._replace(error=Error(1.0, 1.0))
    other = right._replace(accelerated=2)
    assert steps(right, right).passed
    assert first_difference(steps(right, right)) is None
    assert steps(right, wrong).wrong_steps() == [1]
    assert "the logits of step 1: max error 1, limit" in str(first_difference(steps(right, wrong)))
    assert "the token of step 0: 2 instead of 1" in str(first_difference(steps(other, right)))
    assert steps(other._replace(tied=True)).passed
    assert steps(right, wrong._replace(unsure=True)).passed
    assert not steps(right._replace(error=Error(float("nan"), 0.0))).passed
    spread = steps(right._replace(error=Error(9e-6, 6e-6)))
    assert not spread.passed
    assert "of all steps: RMS error" in str(first_difference(spread))


def test_the_hook_is_put_back(fp32: str) -> None:
    from mlx_lm import utils

    from moefast.acceleration import hook

    hook.install()
    try:
        result = verify(fp32, tokens=2)
        assert isinstance(utils.load_model, hook.Hook)
    finally:
        hook.uninstall()
    assert result.passed
    assert result.report.accelerated


def test_memory_is_that_of_one_model(checkpoint: Checkpoint) -> None:
    model = checkpoint("dbrx", bits=None, dtype="float32")
    size = sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    verify(model, tokens=2)
    assert mx.get_peak_memory() - before < 1.7 * size
