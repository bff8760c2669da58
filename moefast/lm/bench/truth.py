"""The reference in float32, which every subject is held to, and what it takes to compare with it.

**Routing is a step function.** Two correct models differ in their router logits by a rounding, and now and
then that sends a token to another expert; its output is then another one, and so are those of all tokens that
attend to it. No bound on errors can allow for this. So the reference is run once more with its router logits
rounded to bfloat16, and a subject in bfloat16 is verified with *these* logits in place of its own: both then
route alike, every token can be compared, and the subject's own logits are compared as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache, make_prompt_cache

from ...acceleration.block import AcceleratedBlock
from ...backends import use_backend
from ...nn import MoE, Router
from .models import backbone_of, head


class Prompt(NamedTuple):
    """Token ids, drawn at random from the whole vocabulary. One repeated token would send every row to
    the same few experts, and a text to those of its language; random ids spread as real batches do.

    Attributes:
        prefill: ``[length]``.
        decode: ``[steps]``: what is fed after the prompt, whatever the model would have said, so that all
            subjects do the same work.
    """

    prefill: mx.array
    decode: mx.array

    @classmethod
    def draw(cls, vocabulary: int, prefill: int, decode: int, seed: int) -> Prompt:
        """Seeded ids below ``vocabulary``."""
        rng = np.random.default_rng(seed)
        return cls(
            mx.array(rng.integers(0, vocabulary, prefill), dtype=mx.int32),
            mx.array(rng.integers(0, vocabulary, decode), dtype=mx.int32),
        )


def build_prefill(model: Any, tokens: mx.array, cache: Any) -> list[mx.array]:
    """Every layer on every token, the head on the last one; not evaluated.

    mlx-lm evaluates the caches only; MLX being lazy, the last layer's experts would then never run, which
    is one layer in two where a model was cut to two.

    Args:
        tokens: ``[n]``.

    Returns:
        Hidden states ``[1, n, hidden]`` and the last token's logits ``[1, 1, vocabulary]``.
    """
    hidden: mx.array = backbone_of(model)(tokens[None], cache)
    return [hidden, head(model, hidden[:, -1:])]


def run_prefill(model: Any, tokens: mx.array, cache: Any) -> mx.array:
    """:func:`build_prefill`, evaluated. Returns hidden ``[n, hidden]``."""
    results = build_prefill(model, tokens, cache)
    mx.eval(results)
    return results[0][0]


def build_step(model: Any, token: mx.array, cache: Any) -> list[mx.array]:
    """One decoded token, as mlx-lm's ``generate_step`` does it, greedily; not evaluated.

    Returns:
        The token ``[1]``, and the logits ``[1, vocabulary]`` it was chosen from.
    """
    logits: mx.array = model(token[None, None], cache=cache)[:, -1, :]
    logprobs = logits - mx.logsumexp(logits, keepdims=True)
    return [mx.argmax(logprobs, axis=-1), logits]


def run_step(model: Any, token: mx.array, cache: Any) -> mx.array:
    """:func:`build_step`, evaluated. Returns logits ``[vocabulary]``."""
    chosen, logits = build_step(model, token, cache)
    mx.eval(chosen)
    return logits[0]


@contextmanager
def hooked_routers(model: Any, hook: Callable[[int, mx.array], mx.array]) -> Iterator[None]:
    """Pass the router logits of a moefast model, or of an accelerated one of mlx-lm, through ``hook(i,
    logits)``, i counting the MoE blocks.

    mlx-lm's own models have no such block: there nothing is called.
    """
    routers = [m[m.names.router] for m in model.modules() if isinstance(m, MoE)]
    routers += [m for m in model.modules() if isinstance(m, AcceleratedBlock)]
    kinds = [type(router) for router in routers]
    calls = iter(range(len(routers)))

    def next_call(logits: mx.array) -> mx.array:
        return hook(next(calls), logits)

    for router, kind in zip(routers, kinds, strict=True):
        router.__class__ = _hooked(kind, next_call)
    try:
        yield
    finally:
        for router, kind in zip(routers, kinds, strict=True):
            router.__class__ = kind


def _hooked(kind: type[Any], hook: Callable[[mx.array], mx.array]) -> type[Any]:
    """A router's class with a hook. MLX modules ignore methods set on the instance, so it is exchanged."""
    if issubclass(kind, Router):

        def logits(self: Any, x: mx.array) -> mx.array:
            return hook(kind.logits(self, x))

        return type(kind.__name__, (kind,), {"logits": logits})

    if issubclass(kind, AcceleratedBlock):

        def moefast_logits(self: Any, x: mx.array) -> mx.array:
            return hook(kind.moefast_logits(self, x))

        return type(kind.__name__, (kind,), {"moefast_logits": moefast_logits})

    def call(self: Any, x: mx.array) -> mx.array:
        return hook(kind.__call__(self, x))

    # A linear layer in the router's place; layers are told apart by the names of class and module.
    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})


class Outcome(NamedTuple):
    """What a run gave.

    Attributes:
        output: hidden states ``[tokens, hidden]`` of a prefill, or logits ``[1, vocabulary]`` of a step.
        router_logits: of each MoE block, ``[1, tokens, num_experts]``, before any rounding.
    """

    output: mx.array
    router_logits: list[mx.array]


class Truth:
    """What the reference makes of a prompt, in float32.

    Args:
        model: moefast's, with float32 weights.
        prompt: what all subjects are given.
        rounded: round router logits to bfloat16, for subjects that compute in it.
    """

    def __init__(self, model: Any, prompt: Prompt, *, rounded: bool):
        self.model = model
        self.prompt = prompt
        self.rounded = rounded
        self.context = 0
        self.prefilled = self.stepped = Outcome(mx.zeros((0, 0)), [])
        self._cache: Any = None

    def run(self, context: int) -> None:
        """Run the first ``context`` tokens of the prompt (``prefilled``), then one decode token
        (``stepped``)."""
        self.context = context
        self._cache = make_prompt_cache(self.model)
        tokens, first = self.prompt.prefill[:context], self.prompt.decode[0]
        self.prefilled = self._record(lambda: run_prefill(self.model, tokens, self._cache))
        self.stepped = self._record(lambda: run_step(self.model, first, self._cache)[None])

    def _record(self, run: Callable[[], mx.array]) -> Outcome:
        noted: list[mx.array] = []

        def hook(i: int, logits: mx.array) -> mx.array:
            noted.append(logits)
            return logits.astype(mx.bfloat16) if self.rounded else logits

        with use_backend("reference"), hooked_routers(self.model, hook):
            outcome = Outcome(run(), noted)
        mx.eval(outcome)
        return outcome

    def cache_for(self, model: Any, dtype: mx.Dtype, steps: int) -> Any:
        """A cache that holds the context, in ``dtype``, with room for ``steps`` more tokens.

        Every subject decodes from the reference's keys and values, so that a slow one need not pay for a
        long prefill first.
        """
        cache = make_prompt_cache(model)
        room = -(-(self.context + steps) // KVCache.step) * KVCache.step
        padding = [(0, 0), (0, 0), (0, room - self.context), (0, 0)]
        for mine, layer in zip(self._cache, cache, strict=True):
            layer.keys = mx.pad(mine.keys[..., : self.context, :].astype(dtype), padding)
            layer.values = mx.pad(mine.values[..., : self.context, :].astype(dtype), padding)
            layer.offset = self.context
        mx.eval([(layer.keys, layer.values) for layer in cache])
        return cache


def run_like(truth: Outcome, model: Any, run: Callable[[], mx.array]) -> Outcome:
    """Run a subject with the router logits of ``truth``, rounded to the subject's dtype, in place of its
    own; of tokens that the truth did not run, with its own."""
    noted: list[mx.array] = []

    def hook(i: int, logits: mx.array) -> mx.array:
        noted.append(logits)
        given = truth.router_logits[i][:, : logits.shape[1]].astype(logits.dtype)
        return mx.concatenate([given, logits[:, given.shape[1] :]], axis=1)

    with hooked_routers(model, hook):
        return Outcome(run(), noted)
