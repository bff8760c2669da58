"""Corners of accelerate: routers in a wider dtype, odd layers beside the experts, attention that someone
replaced, several threads, and figures of ``moefast tune`` that several processes store."""

from __future__ import annotations

import json
import multiprocessing
import sys
import threading
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from marks import needs_native
from mlx_lm.generate import BatchGenerator, generate_step, speculative_generate_step
from mlx_lm.models import base
from mlx_lm.models import glm4_moe as glm4_moe_of_mlx_lm
from mlx_lm_models import MODELS, Tiny, build, tokens

import moefast
from moefast import tuning, use_backend
from moefast.acceleration.attention import attention_class
from moefast.acceleration.look import look
from moefast.acceleration.routing import part
from moefast.env import settings
from moefast.families import BLOCKS, Block
from moefast.testing import assert_logits_close, error

pytestmark = pytest.mark.usefixtures("cpu")


def tiny(module: str) -> Tiny:
    return next(t for t in MODELS if t.module == module)


def first_block(model: nn.Module) -> Any:
    return next(found.module for found in look(model, "reference", mx.bfloat16) if found.what == "block")


def widen(block: Any, row: Block) -> None:
    """Its router in float32, like that of checkpoints that keep it so."""
    owner, _, name = row.logits.rpartition(".")
    router = part(block, row.logits)
    holder = part(block, owner) if owner else block
    if isinstance(router, mx.array):
        holder[name] = router.astype(mx.float32)
    elif isinstance(router, nn.QuantizedLinear):
        plain = nn.Linear(1, 1, bias="bias" in router)
        plain.weight = mx.dequantize(
            router.weight, router.scales, router.biases, router.group_size, router.bits
        ).astype(mx.float32)
        if "bias" in router:
            plain.bias = router.bias
        plain.eval()
        holder[name] = plain
    else:
        router.set_dtype(mx.float32)


WITH_ROUTER = [row for row in BLOCKS if any(t.module == row.module for t in MODELS)]


@pytest.mark.parametrize("row", [pytest.param(row, id=row.module) for row in WITH_ROUTER])
def test_a_float32_router_of_a_bfloat16_model(row: Block) -> None:
    """The output has the dtype it has without us, whichever that is in the family, and the values."""
    model = build(tiny(row.module), bits=4, dtype=mx.bfloat16)
    block = first_block(model)
    widen(block, row)
    x = mx.random.normal((2, 5, 64)).astype(mx.bfloat16)
    want = block(x)
    moefast.accelerate(model, backend="reference")
    got = block(x)
    assert got.dtype == want.dtype
    assert (got.dtype == mx.float32) == row.promotes
    moefast.restore(model)
    model.set_dtype(mx.float32)
    truth = block(x.astype(mx.float32))
    assert error(got, truth).rms < 2 * error(want, truth).rms


@needs_native
@pytest.mark.parametrize("module", ["qwen2_moe", "kimi_k3", "mixtral", "longcat_flash"])
def test_a_float32_router_on_the_native_backend(module: str) -> None:
    row = next(row for row in BLOCKS if row.module == module)
    model = build(tiny(module), bits=4, dtype=mx.bfloat16)
    block = first_block(model)
    widen(block, row)
    x = mx.random.normal((2, 5, 64)).astype(mx.bfloat16)
    want = block(x)
    moefast.accelerate(model, backend="native")
    again = [block(x) for _ in range(2)]
    moefast.restore(model)
    model.set_dtype(mx.float32)
    truth = block(x.astype(mx.float32))
    for got in again:
        assert got.dtype == want.dtype
        assert error(got, truth).rms < error(want, truth).rms


def test_float32_weights_of_experts_apart() -> None:
    model = build(tiny("gemma4_text"), bits=4, dtype=mx.bfloat16)
    experts = next(m for _, m in model.named_modules() if type(m).__name__ == "Experts")
    x = mx.random.normal((1, 4, 64)).astype(mx.bfloat16)
    indices = mx.array([[[0, 1], [2, 3], [4, 5], [6, 7]]], mx.uint32)
    weights = mx.random.uniform(shape=indices.shape)
    want = experts(x, indices, weights)
    moefast.accelerate(model, backend="reference")
    got = experts(x, indices, weights)
    assert got.dtype == want.dtype == mx.float32
    moefast.restore(model)
    model.set_dtype(mx.float32)
    truth = experts(x.astype(mx.float32), indices, weights)
    assert error(got, truth).rms < 2 * error(want, truth).rms


# Attention


@needs_native
def test_attention_replaced_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every module has someone's own function, it is not passed over."""

    def theirs(*arguments: Any, **named: Any) -> mx.array:
        raise AssertionError

    monkeypatch.setattr(base, "scaled_dot_product_attention", theirs)
    monkeypatch.setattr(glm4_moe_of_mlx_lm, "scaled_dot_product_attention", theirs)
    model = build(tiny("glm4_moe"))
    report = moefast.accelerate(model, backend="native")
    assert report.dense
    assert "Attention" not in {entry.kind for entry in report.dense}


@needs_native
def test_attention_replaced_later(monkeypatch: pytest.MonkeyPatch) -> None:
    model, text, calls = build(tiny("glm4_moe")), tokens(1, 6), []
    report = moefast.accelerate(model, backend="native")
    assert "Attention" in {entry.kind for entry in report.dense}
    want = model(text)

    def theirs(*arguments: Any, **named: Any) -> mx.array:
        calls.append(1)
        return base.scaled_dot_product_attention(*arguments, **named)

    monkeypatch.setattr(glm4_moe_of_mlx_lm, "scaled_dot_product_attention", theirs)
    assert_logits_close(model(text), want, layers=2, hidden=64)
    assert len(calls) == 2


def test_attention_that_imports_where_it_runs() -> None:
    """Python looks up the package of a relative import without asking for missing names."""
    made: dict[str, Any] = {
        "__name__": "mlx_lm.models.made_up",
        "__package__": "mlx_lm.models",
        "scaled_dot_product_attention": base.scaled_dot_product_attention,
        "nn": nn,
    }
    exec(  # a module that is not on disk
        """
class Attention(nn.Module):
    def __call__(self, x):
        from .base import create_attention_mask
        return scaled_dot_product_attention(x, x, x, None, scale=1.0, mask=create_attention_mask(x[0]))
""",
        made,
    )
    layer = made["Attention"]().eval()
    ahead = attention_class(layer)
    assert ahead is not None
    x = mx.random.normal((1, 2, 5, 16))
    want = layer(x)
    layer.__class__ = type("Accelerated", (ahead, type(layer)), {})
    assert_logits_close(layer(x), want, layers=1, hidden=64)


@needs_native
def test_another_backend_is_asked_for_later() -> None:
    """Layers beside the experts that it does not have run as they were."""
    model, text = build(tiny("glm4_moe"), bits=4), tokens(1, 6)
    want = model(text)
    moefast.accelerate(model, backend="native")
    with use_backend("metal"):
        assert_logits_close(model(text), want, layers=2, hidden=64)


# Layers beside the experts


@pytest.mark.parametrize("what", ["shape", "mode"])
def test_an_odd_layer_is_left_alone(what: str) -> None:
    model, text = build(tiny("glm4_moe")), tokens(1, 6)
    if what == "shape":
        odd: Any = nn.Linear(4, 4)
        odd.weight = mx.zeros((2, 4, 4))
    else:
        odd = nn.QuantizedLinear(64, 64)
        odd.mode = "another"
    model.odd = odd
    want = model(text)
    report = moefast.accelerate(model, backend="reference", dense=True)
    assert report.accelerated
    assert type(odd) in (nn.Linear, nn.QuantizedLinear)
    assert_logits_close(model(text), want, layers=2, hidden=64)


def test_the_report_tells_the_backend_of_layers_beside_the_experts() -> None:
    model = build(tiny("glm4_moe"), bits=4)
    report = moefast.accelerate(model, backend="reference", dense=True)
    assert {b for entry in report.dense for b in entry.backends.values()} == {"reference"}
    assert "QuantizedLinear, 1 QuantizedEmbedding: reference" in str(report)
    assert not {"RMSNorm", "RoPE", "Attention"} & {entry.kind for entry in report.dense}


# Ways to run a model


def in_batches(model: nn.Module) -> list[list[int]]:
    """Prompts of several lengths: left padding and masks of arrays."""
    made = BatchGenerator(model, max_tokens=6)
    ids = made.insert([[1, 2, 3, 4, 5, 6, 7, 8, 9], [5, 6], [9, 8, 7, 6, 5]])
    text: dict[int, list[int]] = {i: [] for i in ids}
    for _ in range(60):
        _, generated = made.next()
        for one in generated:
            text[one.uid].append(int(one.token))
        if all(len(words) == 6 for words in text.values()):
            break
    assert all(text.values())
    return list(text.values())


def speculative(model: nn.Module) -> list[int]:
    draft = build(tiny("qwen3_moe"), seed=5)
    moefast.accelerate(draft, backend="native")
    steps = speculative_generate_step(
        mx.array(list(range(1, 12))), model, draft, max_tokens=12, num_draft_tokens=3
    )
    return [int(step[0]) for step in steps]


def rotating(model: nn.Module) -> list[int]:
    prompt = mx.array(list(range(1, 40)))
    steps = generate_step(prompt, model, max_tokens=20, max_kv_size=24, prefill_step_size=7)
    return [int(token) for token, _ in steps]


@needs_native
@pytest.mark.parametrize("how", [in_batches, speculative, rotating])
@pytest.mark.parametrize("module", ["glm4_moe", "gpt_oss", "deepseek_v3", "qwen3_moe"])
def test_other_ways_to_generate(module: str, how: Any) -> None:
    model = build(tiny(module))
    want = how(model)
    moefast.accelerate(model, backend="native")
    assert how(model) == want


@needs_native
def test_accelerate_while_another_thread_generates(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(tiny("qwen2_moe"), bits=4)

    def text() -> list[int]:
        steps = generate_step(mx.array([1, 2, 3, 4, 5]), model, max_tokens=12)
        return [int(token) for token, _ in steps]

    want, over, wrong = text(), threading.Event(), []

    def keep_on() -> None:
        while not over.is_set():
            try:
                got = text()
                if got != want:
                    wrong.append(repr(got))
            except Exception as error:
                wrong.append(repr(error))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=keep_on) for _ in range(2)]
    try:
        for thread in threads:
            thread.start()
        moefast.accelerate(model, backend="native")
        assert text() == want
    finally:
        over.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert not wrong


# What moefast tune found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    object.__setattr__(settings, "cache", str(tmp_path))
    tuning.stored.cache_clear()
    yield tmp_path
    object.__setattr__(settings, "cache", "")
    tuning.stored.cache_clear()


def _store(folder: str, first: int) -> None:
    object.__setattr__(settings, "cache", folder)
    for i in range(first, first + 20):
        tuning.store({"layers": {str(i): {"what": "x" * 2000, "phases": {}}}})


def test_two_processes_store(folder: Path) -> None:
    """Neither loses what the other found, and the file is whole."""
    start = multiprocessing.get_context("spawn").Process
    both = [start(target=_store, args=(str(folder), first)) for first in (0, 100)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert len(tuning.stored()["layers"]) == 40
    assert sorted(path.name for path in folder.iterdir()) == ["tuning.json", "tuning.lock"]


@pytest.mark.parametrize(
    "kept",
    [[], {"layers": []}, {"layers": None, "threads": "many"}, {"threads": -1}],
)
def test_a_file_of_another_shape_decides_nothing(folder: Path, kept: Any) -> None:
    tuning.file().write_text(json.dumps({tuning.identity(): kept}))
    assert tuning.threads() == 0
    model = build(tiny("glm4_moe"), bits=4)
    moefast.accelerate(model)
    tuning.store({"layers": {"a": {}}})
    assert tuning.stored()["layers"] == {"a": {}}


@needs_native
@pytest.mark.parametrize("choice", ["metal", "nobody"])
def test_a_choice_that_cannot_run_here_is_not_obeyed(
    folder: Path, choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "choice", lambda problem: choice)
    report = moefast.accelerate(build(tiny("glm4_moe"), bits=4))
    assert {b for entry in report.accelerated for b in entry.backends.values()} == {"native"}
