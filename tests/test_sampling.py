"""mlx-lm's log-probabilities, taken by moefast's kernel while a model of its lives."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import Floats
from marks import needs_native

import moefast
from moefast.acceleration import sampling
from moefast.backends import use_backend
from moefast.backends.native.loading import Bindings

pytest.importorskip("mlx_lm")

from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models import qwen2_moe

from moefast.lm import init_model, load

MODULE: Any = sys.modules["mlx_lm.generate"]  # mlx_lm.generate is the function
PROMPT = mx.array([3, 17, 20, 41, 5])
pytestmark = needs_native


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return init_model("qwen2_moe", tmp_path_factory.mktemp("sampling") / "m").path


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """Models of other tests may live on: what mlx-lm has is restored for them."""
    found = MODULE.mx
    others = dict(sampling._models)
    sampling._models.clear()
    MODULE.mx = mx
    yield
    gc.collect()
    assert not sampling._models
    assert MODULE.mx is mx
    sampling._models.update(others)
    MODULE.mx = found


def stock() -> qwen2_moe.Model:
    """A tiny model of mlx-lm's."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "vocab_size": 5000}
    counts = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2, "num_experts": 4}
    args = qwen2_moe.ModelArgs(
        model_type="qwen2_moe",
        num_hidden_layers=2,
        shared_expert_intermediate_size=64,
        rms_norm_eps=1e-5,
        **sizes,
        **counts,
    )
    model = qwen2_moe.Model(args)
    model.eval()
    return model


def generated(model: Any, **options: Any) -> tuple[list[int], np.ndarray[Any, Any]]:
    """Tokens and log-probabilities."""
    steps = list(generate_step(PROMPT, model, max_tokens=6, **options))
    probabilities = mx.stack([p for _, p in steps]).astype(mx.float32)
    return [token for token, _ in steps], np.asarray(probabilities)


def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that the kernel is asked for from now on."""
    shapes: list[tuple[int, ...]] = []
    choose = sampling.choose

    def noted(x: mx.array, backend: str) -> Any:
        shapes.append(x.shape)
        return choose(x, backend)

    monkeypatch.setattr(sampling, "choose", noted)
    return shapes


def test_loaded_models_have_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = load(folder)
    assert isinstance(MODULE.mx, sampling.Core)
    shapes = calls(monkeypatch)
    tokens, probabilities = generated(model)
    assert shapes == [(1, probabilities.shape[-1])] * 7  # mlx-lm is one step ahead
    sampling.detach(model)
    plain_tokens, plain = generated(model)
    assert len(shapes) == 7
    assert tokens == plain_tokens
    assert np.array_equal(probabilities, plain)  # both are rounded to bfloat16


def test_the_last_model_takes_it_along(folder: Path) -> None:
    first, second = (load(folder)[0] for _ in range(2))
    sampling.attach(first)  # twice is once
    del first
    gc.collect()
    assert isinstance(MODULE.mx, sampling.Core)
    sampling.detach(stock())  # was never attached
    assert isinstance(MODULE.mx, sampling.Core)
    del second
    gc.collect()
    assert MODULE.mx is mx


def test_accelerated_models_have_it_until_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    model = stock()
    with moefast.accelerated(model):
        shapes = calls(monkeypatch)
        generated(model)
        assert shapes
    assert MODULE.mx is mx
    moefast.accelerate(model, dense=False)
    assert MODULE.mx is mx


def test_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several rows of logits, each by itself."""
    model = stock()

    def tokens() -> list[Any]:
        batch = BatchGenerator(model, max_tokens=4)
        batch.insert([[1, 2, 3], [7, 8]])
        found = []
        while responses := batch.next_generated():
            found += [(r.uid, r.token) for r in responses]
        return found

    want = tokens()
    sampling.attach(model)
    shapes = calls(monkeypatch)
    assert tokens() == want
    assert (2, 5000) in shapes


def test_what_the_kernel_does_not_take_is_mlx(floats: Floats, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = calls(monkeypatch)
    core = sampling.Core("mx")
    x = floats(3, 40)
    for arguments, named in (
        ((x,), {}),
        ((x, -1), {}),
        ((x,), {"keepdims": True}),
        ((x, 0, True), {}),
        ((x, (0, 1), True), {}),
        ((x, -1, True), {"stream": mx.cpu}),
        ((mx.arange(5), -1, True), {}),
        ((mx.array(2.0),), {"keepdims": True}),
    ):
        assert mx.array_equal(core.logsumexp(*arguments, **named), mx.logsumexp(*arguments, **named))
    with use_backend("reference"):
        assert mx.array_equal(core.logsumexp(x, -1, True), mx.logsumexp(x, -1, True))
    assert shapes == []
    for arguments, named in (
        ((x,), {"axis": -1, "keepdims": True}),
        ((x[:1], None, True), {}),
        ((x, 1, True), {}),
    ):
        got, want = core.logsumexp(*arguments, **named), mx.logsumexp(*arguments, **named)
        assert got.shape == want.shape
        assert mx.allclose(got, want, rtol=1e-6)
    assert len(shapes) == 3
    with pytest.raises(ValueError, match="empty"):
        core.logsumexp(mx.zeros((0, 4)), -1, True)


def test_everything_else_is_mlx_core() -> None:
    core = sampling.Core("mx")
    assert core.array is mx.array
    assert core.fast is mx.fast
    assert set(dir(core)) == set(dir(mx))
    with pytest.raises(AttributeError, match="no_such_function"):
        _ = core.no_such_function


def test_another_one_there_is_left_alone() -> None:
    """Someone else's replacement, before and after ours."""
    model, theirs = stock(), object()
    MODULE.mx = theirs
    assert not sampling.attach(model)
    assert MODULE.mx is theirs
    MODULE.mx = mx
    assert sampling.attach(model)
    MODULE.mx = theirs
    sampling.detach(model)
    assert MODULE.mx is theirs
    MODULE.mx = mx


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sampling, "settings", replace(sampling.settings, enabled=False))
        assert not sampling.attach(stock())
    with monkeypatch.context() as patch:
        patch.setattr(
            sampling, "bindings", lambda: Bindings(None, object(), "of another MLX")
        )  # through NumPy
        assert not sampling.attach(stock())
    monkeypatch.setattr(sampling, "device_name", lambda: "gpu")
    assert not sampling.attach(stock())


def test_a_program_ends_without_a_word(folder: Path) -> None:
    """Models that live until the end, in a cycle and in a module."""
    program = f"""
import sys
import moefast
model, tokenizer = moefast.load({str(folder)!r})
model.cycle = [model]
sys.modules["kept"] = model
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stderr == ""
