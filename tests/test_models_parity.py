"""The five models compute what mlx-lm's do: logits, greedy text, gradients; and in half precision what the
same model computes in float32, closer to it than mlx-lm on a CPU."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from model_builders import (
    Weights,
    ours,
    pair,
    parameters,
    prefill_and_decode,
    prompt_cache,
    random_weights,
    recorded_routings,
    routed_logits,
    theirs,
    tokens,
)
from model_cases import CASES, FULL, Case, sizes

from moefast.models.dbrx import unstack_experts
from moefast.testing import assert_gradients_close, assert_logits_close, error, float64, logits_bound

pytestmark = pytest.mark.usefixtures("cpu")

cases = pytest.mark.parametrize("case", CASES, ids=str)
full_cases = pytest.mark.parametrize("case", FULL, ids=str)
formats = pytest.mark.parametrize("bits", [None, 4, 8], ids=["unquantized", "4bit", "8bit"])
half_dtypes = pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)

# 40 tokens with two experts each are enough routes for mlx-lm to sort them by expert; a decoded token is not.
PROMPT, STEPS = 40, 64


def generate(model: nn.Module) -> tuple[list[int], mx.array]:
    """Greedy tokens after a random prompt, and the logits of prompt and tokens ``[1, length, vocab]``."""
    cache = prompt_cache(model)
    y, text, logits = tokens(1, PROMPT), [], []
    for _ in range(STEPS):
        logits.append(model(y, cache))
        y = mx.argmax(logits[-1][:, -1:], axis=-1)
        text.append(int(y.item()))
    return text, mx.concatenate(logits, axis=1)


@pytest.mark.usefixtures("backend")
@formats
@cases
def test_logits_and_greedy_text(case: Case, bits: int | None) -> None:
    mine, other = pair(case.config, bits=bits)
    (text, logits), (want_text, want_logits) = generate(mine), generate(other)
    alike = PROMPT + agreement(text, want_text, want_logits, sizes(case.config))
    assert_logits_close(logits[:, :alike], want_logits[:, :alike], **sizes(case.config))


def agreement(text: list[int], want: list[int], logits: mx.array, size: dict[str, int]) -> int:
    """How many tokens agree: all, or those before the first at which the model had no clear favourite. From
    there on the two texts are different."""
    for i, (token, expected) in enumerate(zip(text, want, strict=True)):
        if token != expected:
            row = np.sort(float64(logits[0, PROMPT - 1 + i]))
            assert row[-1] - row[-2] < logits_bound(**size).max * np.abs(row).max(), f"token {i} differs"
            return i
    return len(text) - 1


@cases
def test_casting_and_quantization_treat_the_same_layers_alike(case: Case) -> None:
    mine, other = pair(case.config, bits=4, dtype=mx.bfloat16)
    got = unstack_experts(parameters(mine)) if case.family == "dbrx" else parameters(mine)
    want = parameters(other)
    assert {k: (v.shape, v.dtype) for k, v in got.items()} == {k: (v.shape, v.dtype) for k, v in want.items()}


@formats
@full_cases
def test_prefill_in_one_piece_in_chunks_and_token_by_token(case: Case, bits: int | None) -> None:
    model = ours(case.config, bits=bits)
    x = tokens(2, PROMPT)
    whole = model(x)
    cache = prompt_cache(model)
    chunked = mx.concatenate([model(x[:, :17], cache), model(x[:, 17:], cache)], axis=1)
    assert_logits_close(chunked, whole, **sizes(case.config))
    stepwise = prefill_and_decode(model, x[:, :3], x[:, 3:])
    assert_logits_close(stepwise, whole, **sizes(case.config))


@pytest.mark.parametrize("family", ["glm4_moe", "bailing_moe"])
def test_negative_keys_lose_to_dropped_groups(family: str) -> None:
    # Dropped groups are filled with 0: below it, a kept expert loses to a dropped one.
    case = next(c for c in FULL if c.family == family)
    weights = random_weights(ours(case.config, {}))
    weights = {
        k: v - 0.8 if k.endswith(("correction_bias", "expert_bias")) else v for k, v in weights.items()
    }
    x = tokens(2, PROMPT)
    model = ours(case.config, weights)
    with recorded_routings() as routings:
        logits = model(x)
    assert_logits_close(logits, theirs(case.config, weights)(x), **sizes(case.config))
    for layer in model.layers[1:]:  # the first is dense
        layer.mlp.spec = replace(layer.mlp.spec, dropped_fill="-inf")
    with recorded_routings() as excluding:
        model(x)
    assert not mx.array_equal(routings[0], excluding[0])


@pytest.mark.usefixtures("backend")
@formats
@half_dtypes
@full_cases
def test_half_precision(case: Case, dtype: mx.Dtype, bits: int | None) -> None:
    prompt, continuation = tokens(16, 6), tokens(16, 3, seed=2)
    weights = random_weights(ours(case.config, {}))
    model, exact = (ours(case.config, weights, bits=bits, dtype=dtype) for _ in range(2))
    exact.load_weights([(path, as_float32(value)) for path, value in parameters(exact).items()])
    got, mine = routed_logits(model, prompt, continuation)
    want, true = routed_logits(exact, prompt, continuation)
    # Near-ties fall differently in half precision. What comes before the first of them, in any layer of a
    # sequence, does not depend on one.
    alike = np.cumprod((mine == true).all(axis=(0, -1)), axis=1).astype(bool)
    assert 2 * alike.sum() > alike.size, "too few positions are left to compare"
    where = mx.array(np.flatnonzero(alike))
    kept, kept_want = (a.reshape(-1, a.shape[-1])[where] for a in (got, want))
    assert_logits_close(kept, kept_want, dtype=dtype, **sizes(case.config))
    if bits is not None:  # unquantized, mlx-lm's gather_mm refuses half precision on a CPU
        other = theirs(case.config, weights, bits=bits, dtype=dtype)
        theirs_got = prefill_and_decode(other, prompt, continuation)
        assert typical_error(got, want) < typical_error(theirs_got, want)


def as_float32(array: mx.array) -> mx.array:
    return array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array


def typical_error(got: mx.array, want: mx.array) -> float:
    """The median over all positions of the RMS error: not swayed by the few that chose another expert."""
    rows = zip(got.reshape(-1, got.shape[-1]), want.reshape(-1, want.shape[-1]), strict=True)
    return float(np.median([error(a, b).rms for a, b in rows]))


@cases
def test_gradients(case: Case) -> None:
    mine, other = pair(case.config)
    got = gradients(mine.train())
    want = gradients(other.train())
    if case.family == "dbrx":
        got = unstack_experts(got)
    assert_gradients_close(got, want, **sizes(case.config))


@full_cases
def test_gradients_are_the_same_outside_of_training(case: Case) -> None:
    # A backend may run then; it recomputes the reference to differentiate.
    model = ours(case.config)
    want = gradients(model.train())
    assert_gradients_close(gradients(model.eval()), want, **sizes(case.config))


def gradients(model: nn.Module) -> Weights:
    """Of the cross-entropy of random text, by parameter path."""
    text = tokens(2, 33)

    def loss() -> mx.array:
        logits: mx.array = model(text[:, :-1])
        return nn.losses.cross_entropy(logits, text[:, 1:], reduction="mean")

    _, found = nn.value_and_grad(model, loss)()
    return dict(tree_flatten(found))
