"""Whole models on emulated Metal kernels: the reference's text, in float32."""

from __future__ import annotations

import mlx.core as mx
import pytest
from metal import emulated, needs_emulator
from mlx_lm.models.cache import make_prompt_cache
from model_builders import ours

from moefast import use_backend
from moefast.lm.presets import FAMILIES, preset

pytestmark = needs_emulator

PROMPT, LENGTH = 9, 6


def greedy(model: object) -> list[int]:
    """The prompt in one piece, then token by token."""
    cache = make_prompt_cache(model)
    tokens = mx.arange(3, 3 + PROMPT)[None]
    text = []
    for _ in range(LENGTH):
        tokens = mx.argmax(model(tokens, cache=cache)[:, -1:], axis=-1)
        text.append(int(tokens.item()))
    return text


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_references_text(family: str, bits: int | None) -> None:
    model = ours(preset(family, "tiny"), bits=bits)
    with use_backend("reference"):
        want = greedy(model)
    with emulated(check=False) as launches, use_backend("metal"):
        got = greedy(model)
    assert got == want
    names = {launch.name for launch in launches}
    assert {"route", "gate_up", "down_combine"} <= names  # decode
    assert names & {"band_gate_up", "combine"}  # the prompt
