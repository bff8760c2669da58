"""Every MoE family of mlx-lm computes, accelerated, what it computes as it is.

In float32 logits agree and greedy text is the same; in bfloat16 the accelerated model is the closer one to
the float32 model (MLX's CPU adds up in bfloat16, see docs). The daily subset has each model in one format.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import mlx_lm.models
import numpy as np
import pytest
from families_table import PAGE, page
from marks import needs_native
from metal import emulated, needs_emulator
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP
from mlx_lm_models import MODELS, RUNNING, VOCABULARY, Tiny, build, parameters, tokens

import moefast
from moefast.acceleration import Report
from moefast.testing import assert_close, assert_logits_close, error, float64, logits_bound

STEPS = 5
FORMATS: dict[str, int | None] = {"float32": None, "8bit": 8, "4bit": 4}


class Run(NamedTuple):
    """What a model says: logits by name, and the text it would write."""

    logits: dict[str, mx.array]
    text: list[int]


def run(model: nn.Module) -> Run:
    """A batch of 3 prompts in one piece; one prompt in two pieces; then greedy text, token by token."""
    batch, prompt = tokens(3, 20), tokens(1, 24, seed=2)
    logits = {"batch": model(batch)}
    cache = make_prompt_cache(model)
    logits["chunk 1"] = model(prompt[:, :17], cache=cache)
    logits["chunk 2"] = model(prompt[:, 17:], cache=cache)
    last, text = logits["chunk 2"][:, -1:], []
    for step in range(STEPS):
        token = mx.argmax(last, axis=-1)
        text.append(token.item())
        last = model(token, cache=cache)
        logits[f"step {step}"] = last
    mx.eval(logits)
    return Run(logits, text)


def whole_matrix() -> list[Any]:
    """All models, formats and backends; daily each model once, on the backend that is fast here."""
    rows = []
    for backend in ("native", "reference"):
        for i, tiny in enumerate(RUNNING):
            for j, name in enumerate(FORMATS):
                daily = backend == "native" and j == i % len(FORMATS)
                marks = ([] if daily else [pytest.mark.slow]) + (
                    [needs_native] if backend == "native" else []
                )
                rows.append(pytest.param(tiny, name, backend, marks=marks, id=f"{backend}-{tiny}-{name}"))
    return rows


def counts(report: Report) -> dict[str, int]:
    """What was done beside dense layers."""
    return dict(Counter(entry.what for entry in report.entries if entry.what != "dense"))


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize(("tiny", "form", "backend"), whole_matrix())
def test_accelerated_is_the_same_model(tiny: Tiny, form: str, backend: str) -> None:
    model = build(tiny, bits=FORMATS[form])
    plain, before = run(model), parameters(model)

    report = moefast.accelerate(model, backend=backend)
    assert counts(report) == tiny.report, str(report)
    assert {b for e in report.accelerated for b in e.backends.values()} <= {backend}
    if tiny.module != "dbrx":
        assert_same_arrays(parameters(model), before)
    fast = run(model)
    for name, logits in fast.logits.items():
        assert_logits_close(logits, plain.logits[name], layers=tiny.layers, hidden=64)
    assert fast.text == plain.text

    assert moefast.restore(model)
    after = parameters(model)
    if tiny.module != "dbrx":
        assert_same_arrays(after, before)
    assert after.keys() == before.keys()
    assert all(mx.array_equal(after[path], before[path]).item() for path in before)
    again = run(model)
    assert all(mx.array_equal(again.logits[name], plain.logits[name]).item() for name in plain.logits)
    assert again.text == plain.text


def assert_same_arrays(got: dict[str, mx.array], want: dict[str, mx.array]) -> None:
    assert list(got) == list(want)
    assert all(got[path] is want[path] for path in want)


def formats_once() -> list[Any]:
    """All models in all formats; daily each model in one."""
    rows = []
    for i, tiny in enumerate(RUNNING):
        for j, name in enumerate(FORMATS):
            marks = [] if j == (i + 1) % len(FORMATS) else [pytest.mark.slow]
            if name == "float32" and tiny.module == "deepseek_v41":
                continue  # stacks in its attention, too, which MLX's CPU multiplies in float32 only
            rows.append(pytest.param(tiny, FORMATS[name], marks=marks, id=f"{tiny}-{name}"))
    return rows


@needs_native
@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize(("tiny", "bits"), formats_once())
def test_accelerated_bfloat16_is_closer_to_float32(tiny: Tiny, bits: int | None) -> None:
    model, text = build(tiny, bits=bits, dtype=mx.bfloat16), tokens(3, 20)
    # MLX's CPU multiplies unquantized stacks in float32 only.
    stock = None if bits is None and tiny.module != "dbrx" else float64(model(text))
    with moefast.accelerated(model, backend="native"):
        fast = model(text)
        mx.eval(fast)
    model.set_dtype(mx.float32)
    truth = float64(model(text))

    assert fast.dtype == mx.bfloat16
    got, want = typical(fast, truth)
    if stock is not None:
        assert error(got, want).rms < error(*typical(stock, truth)).rms
    limit = logits_bound(mx.bfloat16, layers=2 * tiny.layers, hidden=64)
    if bits is None:  # else layers that the native backend does not have add up in bfloat16, too
        assert error(got, want).rms < limit.rms


def typical(got: Any, want: Any) -> tuple[Any, Any]:
    """The token whose error is the median: one whose experts changed places says nothing of precision."""
    got, want = float64(got).reshape(-1, VOCABULARY), float64(want).reshape(-1, VOCABULARY)
    order = np.argsort([error(g, w).rms for g, w in zip(got, want, strict=True)])
    middle = order[len(order) // 2]
    return got[middle], want[middle]


METAL = ("deepseek_v3", "gemma4_text", "glm4_moe", "gpt_oss", "granitemoe", "kimi_k3", "llama4", "qwen2_moe")


@needs_emulator
@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize(
    ("tiny", "bits"),
    [
        pytest.param(
            next(t for t in MODELS if t.module == name),
            bits,
            marks=[] if (name, bits) in (("gemma4_text", 4), ("glm4_moe", None)) else [pytest.mark.slow],
            id=f"{name}-{bits}",
        )
        for name in METAL
        for bits in (None, 4, 8)
    ],
)
def test_metal_runs_the_same_model(tiny: Tiny, bits: int | None) -> None:
    model, prompt, after = build(tiny, bits=bits), tokens(1, 5), tokens(1, 1, seed=2)
    cache = make_prompt_cache(model)
    plain = [model(prompt, cache=cache), model(after, cache=cache)]
    mx.eval(plain)
    with emulated() as launches, moefast.accelerated(model, backend="metal") as report:
        assert counts(report) == tiny.report, str(report)
        cache = make_prompt_cache(model)
        for piece, want in zip((prompt, after), plain, strict=True):
            got = model(piece, cache=cache)
            mx.eval(got)
            assert_logits_close(got, want, layers=tiny.layers, hidden=64)
    assert launches


@needs_native
@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize("tiny", [t for t in MODELS if t.why_not is not None], ids=str)
def test_experts_of_models_that_need_a_gpu(tiny: Tiny) -> None:
    model = build(tiny)
    x, indices = mx.random.normal((7, 64)), mx.random.randint(0, 8, (7, 3)).astype(mx.uint32)
    stacks = [m for _, m in model.named_modules() if isinstance(m, (SwitchGLU, SwitchMLP))]
    plain = [stack(x, indices) for stack in stacks]
    mx.eval(plain)
    report = moefast.accelerate(model, backend="native")
    assert counts(report) == tiny.report, str(report)
    for stack, want in zip(stacks, plain, strict=True):
        assert_close(stack(x, indices), want, "switch_glu", reductions=(64, 128, 64, 128))


def test_every_family_is_here() -> None:
    """A release of mlx-lm with another MoE family fails here until there is a model of it."""
    texts = {path.stem: path.read_text() for path in Path(mlx_lm.models.__path__[0]).glob("*.py")}
    found = {m for m, text in texts.items() if re.search(r"= Switch(GLU|MLP)\(|self\.experts = \[", text)}
    wrappers = {
        m
        for m, text in texts.items()
        for names in re.findall(r"^from \.(\w+) import|^from \. import ([\w, ]+)", text, re.M)
        if set("".join(names).split(", ")) & (found | {"qwen3_5"})
        and re.search(r"^class Model\(|^from \.\w+ import Model\b", text, re.M)
    }
    here = {tiny.module for tiny in MODELS}
    assert found | wrappers == here | {"prism_hadamard_qwen35"}  # its packs are of dense models


def test_the_page_of_families_is_up_to_date() -> None:
    text = PAGE.read_text(encoding="utf-8")
    if f"mlx-lm {mlx_lm.__version__};" not in text:
        pytest.skip(f"docs/families.md is not of mlx-lm {mlx_lm.__version__}")
    assert text == page(METAL), "python tests/families_table.py"
