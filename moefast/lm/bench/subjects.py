"""What is measured: one model, in one dtype, on one backend, with its verification."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from ...backends import use_backend
from ...testing import Bound, Error, error, logits_bound
from .models import parameters_of
from .truth import Outcome, Truth, build_prefill, build_step, run_like, run_prefill, run_step


class Verdict(NamedTuple):
    """How an output compares with the reference in float32.

    Attributes:
        error: of the output.
        bound: what the output and every router's logits had to meet, or None where it is only reported.
        passed: the output may be measured.
        tokens: that were compared.
    """

    error: Error
    bound: Bound | None
    passed: bool
    tokens: int


class Forward(NamedTuple):
    """What a run consists of.

    Attributes:
        model: that runs.
        cache: that it reads and extends, a KV cache per layer.
        passes: functions that build one forward pass each, for someone to evaluate.
    """

    model: Any
    cache: Sequence[Any]
    passes: Sequence[Callable[[], list[mx.array]]]


class Subject(Protocol):
    """What :mod:`moefast.lm.bench.measure` needs of a subject.

    Attributes:
        label: how reports call it.
        dtype: of its activations.
        backend: moefast's, or None for mlx-lm's own model: others are compared with it.
        peak_bytes: highest memory of all runs so far, as if it were alone in the process.
    """

    label: str
    dtype: str
    backend: str | None
    peak_bytes: int

    def run(self, phase: str, tokens: int) -> None:
        """Do, and evaluate, a ``prefill`` of so many tokens, or ``decode`` so many."""

    def verify(self, phase: str, tokens: int) -> tuple[Verdict, float]:
        """The same, compared with the reference, and its seconds; decoding is verified by one token."""


class ModelSubject:
    """One model of either package.

    Args:
        label: how reports call it.
        model: filled with weights.
        dtype: of activations: bfloat16 or float32.
        backend: moefast's, or None for mlx-lm's own model.
        truth: what it is verified against, run.
        steps: most tokens that will be decoded in one run.
        judged: fail where an error exceeds the bound, instead of reporting it only.
    """

    def __init__(
        self,
        label: str,
        model: Any,
        dtype: mx.Dtype,
        backend: str | None,
        truth: Truth,
        *,
        steps: int,
        judged: bool,
    ):
        self.label = label
        self.backend = backend
        self.dtype = str(dtype).removeprefix("mlx.core.")
        self.peak_bytes = 0
        self._model = model
        self._truth = truth
        self._cache = truth.cache_for(model, dtype, steps)
        own = [value for _, value in parameters_of(model)]
        own += [array for layer in self._cache for array in (layer.keys, layer.values)]
        self._own_bytes = sum(array.nbytes for array in own)
        hidden = truth.prefilled.output.shape[-1]
        length = truth.prompt.prefill.size + steps
        limit = logits_bound(self.dtype, layers=len(model.layers), hidden=hidden, length=length)
        self._bound = limit if judged else None

    def run(self, phase: str, tokens: int) -> None:
        """See :class:`Subject`. Decoding starts from the context and leaves the cache as it was."""
        with self.opened(phase, tokens) as forward:
            for build in forward.passes:
                mx.eval(build())

    @contextmanager
    def opened(self, phase: str, tokens: int) -> Iterator[Forward]:
        """What a run consists of, on this subject's backend. All passes are to be evaluated, in order."""
        prompt = self._truth.prompt
        with self._using(), self._metered():
            if phase == "prefill":
                cache = make_prompt_cache(self._model)
                whole = partial(build_prefill, self._model, prompt.prefill[:tokens], cache)
                yield Forward(self._model, cache, [whole])
                return
            steps = [partial(build_step, self._model, token, self._cache) for token in prompt.decode[:tokens]]
            yield Forward(self._model, self._cache, steps)
            self._rewind(tokens)

    def verify(self, phase: str, tokens: int) -> tuple[Verdict, float]:
        """See :class:`Subject`. A prefill is compared at the tokens that the reference ran, too: a later
        token does not change an earlier one. Decoding is compared at its first step."""
        truth = self._truth
        prompt = truth.prompt

        def prefill() -> mx.array:
            return run_prefill(self._model, prompt.prefill[:tokens], make_prompt_cache(self._model))

        def step() -> mx.array:
            return run_step(self._model, prompt.decode[0], self._cache)[None]

        start = time.perf_counter()
        with self._using(), self._metered():
            if phase == "prefill":
                want, got = truth.prefilled, run_like(truth.prefilled, self._model, prefill)
            else:
                want, got = truth.stepped, run_like(truth.stepped, self._model, step)
                self._rewind(1)
        seconds = time.perf_counter() - start
        return judge(got, want, self._bound), seconds

    def _rewind(self, steps: int) -> None:
        for layer in self._cache:
            layer.trim(steps)

    def _using(self) -> AbstractContextManager[object]:
        return nullcontext() if self.backend is None else use_backend(self.backend)

    @contextmanager
    def _metered(self) -> Iterator[None]:
        others = mx.get_active_memory() - self._own_bytes
        mx.reset_peak_memory()
        yield
        self.peak_bytes = max(self.peak_bytes, mx.get_peak_memory() - others)


def judge(got: Outcome, want: Outcome, bound: Bound | None) -> Verdict:
    """Compare a subject's outcome with the truth's, at the tokens that both ran.

    Router logits are compared where the subject's could be seen (mlx-lm's cannot).
    """
    tokens = min(got.output.shape[0], want.output.shape[0])
    figures = error(got.output[:tokens], want.output[:tokens])
    passed = True
    if bound is not None:
        logits = [
            error(mine[:, :tokens], theirs[:, :tokens])
            for mine, theirs in zip(got.router_logits, want.router_logits, strict=bool(got.router_logits))
        ]
        # The other tokens, which the reference did not run, have to be numbers at least.
        finite = bool(mx.isfinite(got.output).all())
        passed = finite and all(bound.admits(e) for e in (figures, *logits))
    return Verdict(figures, bound, passed, tokens)
