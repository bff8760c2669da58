"""Generating text, and the report at its end."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from moefast.backends import registry
from moefast.registry import Choice, Problem

pytest.importorskip("mlx_lm")

from mlx_lm.generate import stream_generate

from moefast.cli import main
from moefast.lm import generate, init_model, load, stream
from moefast.lm.generate import report


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return init_model("qwen2_moe", tmp_path_factory.mktemp("generate") / "m", dtype="float32").path


@pytest.fixture(scope="module")
def loaded(path: Path) -> Any:
    return load(path)


@pytest.fixture(autouse=True)
def default_backend() -> Iterator[None]:
    former = registry.set_default(None)
    yield
    registry.set_default(former)


def test_text_is_mlx_lms(loaded: Any) -> None:
    model, tokenizer = loaded
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    expected = [r.token for r in stream_generate(model, tokenizer, chat, max_tokens=12)]
    found = list(stream(model, tokenizer, "hi", max_tokens=12))
    assert [r.token for r in found] == expected
    assert found[-1].generation_tokens == 12
    assert found[-1].prompt_tokens == len(chat)
    assert generate(model, tokenizer, "hi", max_tokens=12) == "".join(r.text for r in found)


def test_chat_template_can_be_left_out(loaded: Any) -> None:
    model, tokenizer = loaded
    (segment,) = stream(model, tokenizer, "hi", max_tokens=1, chat=False)
    assert segment.prompt_tokens == 3  # <bos> h i


def test_seed_decides_what_is_sampled(loaded: Any) -> None:
    first, second, other = (
        generate(*loaded, "hi", max_tokens=16, temp=1.0, top_p=0.9, seed=seed) for seed in (1, 1, 2)
    )
    assert first == second != other


def test_greedy_is_the_default(loaded: Any) -> None:
    assert generate(*loaded, "hi", seed=1) == generate(*loaded, "hi", seed=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ""}, "prompt must not be empty, got ''"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"temp": -0.1}, "temp must be finite and not negative, got -0.1"),
        ({"temp": float("nan")}, "temp must be finite and not negative, got nan"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1, got 1.1"),
        ({"seed": -1}, r"seed must be in 0\.\.2\*\*64-1, got -1"),
    ],
)
def test_refusals_come_at_the_call(options: dict[str, Any], message: str, loaded: Any) -> None:
    with pytest.raises(ValueError, match=rf"\[generate\] {message}\."):
        stream(*loaded, **{"prompt": "hi", **options})


def test_report() -> None:
    last = SimpleNamespace(
        prompt_tokens=7, prompt_tps=123.45, generation_tokens=20, generation_tps=9.87, peak_memory=1.2345
    )
    choices = [
        (Problem(op, "cpu", mx.float32, phase, ()), Choice(backend, print, {}))
        for op, phase, backend in (
            ("quantized_matmul", "decode", "native"),
            ("moe", "prefill", "reference"),
            ("moe", "band", "native"),
            ("moe", "decode", "native"),
        )
    ]
    assert report(last, choices) == (
        "prompt:      7 tokens, 123.5 tokens/s\n"
        "generation:  20 tokens, 9.9 tokens/s\n"
        "peak memory: 1.234 GB\n"
        "moe: reference (prefill), native (decode, band)\n"
        "quantized_matmul: native (decode)"
    )


def test_command(path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Text to stdout, figures to stderr."""
    monkeypatch.setattr(registry, "_choices", {})  # the report tells all that this process has chosen
    command = [
        "generate",
        "--model",
        str(path),
        "--prompt",
        "hi",
        "--max-tokens",
        "5",
        "--backend",
        "reference",
    ]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert out == generate(*load(path), "hi", max_tokens=5) + "\n"
    assert "generation:  5 tokens, " in err
    assert "moe: reference (decode" in err


def test_command_reads_stdin(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["generate", "--model", str(path), "-m", "4", "--temp", "1", "--top-p", "0.5", "--seed", "3"]
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe"))
    assert main([*command, "--prompt", "-", "--ignore-chat-template"]) == 0
    out, err = capsys.readouterr()
    options: dict[str, Any] = {"max_tokens": 4, "temp": 1.0, "top_p": 0.5, "seed": 3}
    assert out == generate(*load(path), "from a pipe", chat=False, **options) + "\n"
    assert "prompt:      12 tokens" in err
