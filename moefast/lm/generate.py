"""Text from a model, and what it took to make it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn

from ..backends import registry
from ..errors import refuse
from ..registry import Choice, Problem

if TYPE_CHECKING:
    from mlx_lm.generate import GenerationResponse
    from mlx_lm.tokenizer_utils import TokenizerWrapper

_PHASES = ("decode", "band", "prefill", "empty")


def stream(
    model: mlx.nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: str,
    *,
    max_tokens: int = 100,
    temp: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    chat: bool = True,
) -> Iterator[GenerationResponse]:
    """Generate text, a segment at a time, with mlx-lm's ``stream_generate``.

    Args:
        model, tokenizer: as :func:`moefast.load` returns them.
        prompt: text; must not be empty.
        max_tokens: stop after so many tokens, if the model has not stopped before.
        temp: sampling temperature; 0 takes the most probable token.
        top_p: sample from the most probable tokens that together reach this probability.
        seed: of MLX's random generator; None leaves its state as it is.
        chat: put the prompt into the tokenizer's chat template, if it has one.

    Yields:
        mlx-lm's ``GenerationResponse``: ``text`` and ``token``, and so far: ``prompt_tokens``,
        ``prompt_tps``, ``generation_tokens``, ``generation_tps`` (per second), ``peak_memory`` (GB).

    Raises:
        ValueError: an argument breaks a rule. At the call, not at the first segment.
    """
    if not prompt:
        refuse("generate", "prompt must not be empty", repr(prompt))
    if max_tokens < 1:
        refuse("generate", "max_tokens must be at least 1", max_tokens)
    if not 0 <= temp < float("inf"):
        refuse("generate", "temp must be finite and not negative", temp)
    if not 0 < top_p <= 1:
        refuse("generate", "top_p must be above 0 and at most 1", top_p)
    if seed is not None and not 0 <= seed < 2**64:
        refuse("generate", "seed must be in 0..2**64-1", seed)

    from mlx_lm.generate import stream_generate
    from mlx_lm.sample_utils import make_sampler

    if seed is not None:
        mx.random.seed(seed)
    tokens = _encode(tokenizer, prompt, chat)
    sampler = make_sampler(temp, top_p)
    segments: Iterator[GenerationResponse] = stream_generate(
        model, tokenizer, tokens, max_tokens=max_tokens, sampler=sampler
    )
    return segments


def generate(model: mlx.nn.Module, tokenizer: TokenizerWrapper, prompt: str, **options: Any) -> str:
    """The whole text at once; arguments and errors as :func:`stream`."""
    return "".join(segment.text for segment in stream(model, tokenizer, prompt, **options))


def _encode(tokenizer: TokenizerWrapper, prompt: str, chat: bool) -> list[int]:
    if chat and tokenizer.has_chat_template:
        messages = [{"role": "user", "content": prompt}]
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
    return list(tokenizer.encode(prompt))


def report(last: GenerationResponse, choices: Iterable[tuple[Problem, Choice]]) -> str:
    """What ``moefast generate`` prints at the end: speed, peak memory, and who served each operation.

    Args:
        last: of the segments.
        choices: of the registry.
    """
    lines = [
        f"prompt:      {last.prompt_tokens} tokens, {last.prompt_tps:.1f} tokens/s",
        f"generation:  {last.generation_tokens} tokens, {last.generation_tps:.1f} tokens/s",
        f"peak memory: {last.peak_memory:.3f} GB",
    ]
    served: dict[str, dict[str, set[str]]] = {}
    for problem, choice in choices:
        served.setdefault(problem.op, {}).setdefault(choice.backend, set()).add(problem.phase)
    for op, phases_by_backend in sorted(served.items()):
        parts = [
            f"{backend} ({', '.join(sorted(phases, key=_PHASES.index))})"
            for backend, phases in phases_by_backend.items()
        ]
        lines.append(f"{op}: {', '.join(parts)}")
    return "\n".join(lines)


def run(arguments: argparse.Namespace) -> int:
    """``moefast generate``: text to stdout as it comes, the report to stderr."""
    from .load import load

    _hush_transformers()
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    prompt.encode()  # bytes that are no UTF-8 come as lone surrogates: a ValueError
    model, tokenizer = load(arguments.model, backend=arguments.backend)
    last = None
    for last in stream(
        model,
        tokenizer,
        prompt,
        max_tokens=arguments.max_tokens,
        temp=arguments.temp,
        top_p=arguments.top_p,
        seed=arguments.seed,
        chat=not arguments.ignore_chat_template,
    ):
        print(last.text, end="", flush=True)
    print(flush=True)
    if last is not None:
        print(report(last, registry.choices()), file=sys.stderr)
    return 0


def _hush_transformers() -> None:
    """Loading a tokenizer makes transformers look at config.json and warn of families and settings that it
    does not know; it is not asked to run them."""
    import warnings

    import mlx_lm  # noqa: F401 (first: it turns off the advice to install PyTorch)
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
