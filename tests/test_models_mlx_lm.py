"""mlx-lm's tools run the five models as they run its own: generation, caches, adapters, saving."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.generate import batch_generate, stream_generate
from mlx_lm.models import cache as kv_caches
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model, quantize_model, save_config, save_model
from model_builders import Weights, ours, pair, parameters, prompt_cache, tokens
from model_cases import FULL, Case, Config, sizes
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from moefast.models import get_classes
from moefast.testing import assert_gradients_close, assert_logits_close

pytestmark = pytest.mark.usefixtures("cpu")

cases = pytest.mark.parametrize("case", FULL, ids=str)


@pytest.fixture(scope="module")
def tokenizer() -> TokenizerWrapper:
    words = {f"w{i}": i for i in range(128)}
    return TokenizerWrapper(
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))
    )


def with_heads_of_32(config: Config) -> Config:
    """The same with fewer and wider heads: 32 is the smallest quantization group of a KV cache."""
    if config["model_type"] == "dbrx":
        return {**config, "n_heads": 2, "attn_config": {**config["attn_config"], "kv_n_heads": 1}}
    return {**config, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"prefill_step_size": 7}, id="chunked_prefill"),
        pytest.param({"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 4}, id="quantized_cache"),
        pytest.param({"max_kv_size": 16}, id="rotating_cache"),
    ],
)
@cases
def test_stream_generate(case: Case, options: dict[str, Any], tokenizer: TokenizerWrapper) -> None:
    mine, other = pair(with_heads_of_32(case.config))

    def run(model: nn.Module) -> list[int]:
        prompt = tokens(20).tolist()
        return [r.token for r in stream_generate(model, tokenizer, prompt, max_tokens=24, **options)]

    assert run(mine) == run(other)


@cases
def test_speculative_decoding_says_what_the_model_says(case: Case, tokenizer: TokenizerWrapper) -> None:
    model, draft = ours(case.config), ours(case.config, bits=4)

    def run(**options: Any) -> list[int]:
        prompt = tokens(20).tolist()
        return [r.token for r in stream_generate(model, tokenizer, prompt, max_tokens=16, **options)]

    assert run(draft_model=draft, num_draft_tokens=3) == run()


@cases
def test_batch_generate(case: Case, tokenizer: TokenizerWrapper) -> None:
    mine, other = pair(case.config)
    prompts = [tokens(n, seed=n).tolist() for n in (3, 11, 6)]  # of different lengths: padded

    def run(model: nn.Module, prompts: list[list[int]]) -> list[list[int]]:
        answer = batch_generate(model, tokenizer, prompts, max_tokens=12, return_token_ids=True)
        found: list[list[int]] = answer.token_ids
        return found

    together = run(mine, prompts)
    assert together == [run(mine, [prompt])[0] for prompt in prompts]
    assert together == run(other, prompts)


@cases
def test_padded_batch(case: Case) -> None:
    model = ours(case.config)
    short, long = tokens(1, 5), tokens(1, 9, seed=2)
    caches = [kv_caches.BatchKVCache([4, 0]) for _ in model.layers]
    padded = mx.concatenate([mx.concatenate([mx.zeros((1, 4), short.dtype), short], axis=1), long])
    logits = model(padded, caches)
    assert_logits_close(logits[:1, 4:], model(short), **sizes(case.config))
    assert_logits_close(logits[1:], model(long), **sizes(case.config))


@cases
def test_a_prompt_cache_is_saved_loaded_and_trimmed(case: Case, tmp_path: Path) -> None:
    model = ours(case.config)
    prefix, rest, other = tokens(1, 9), tokens(1, 5, seed=2), tokens(1, 4, seed=3)
    cache = prompt_cache(model)
    model(prefix, cache)
    kv_caches.save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    loaded = kv_caches.load_prompt_cache(str(tmp_path / "cache.safetensors"))
    for continuation in (rest, other):
        whole = model(mx.concatenate([prefix, continuation], axis=1))[:, prefix.shape[1] :]
        assert_logits_close(model(continuation, loaded), whole, **sizes(case.config))
        kv_caches.trim_prompt_cache(loaded, continuation.shape[1])


def adapt(model: nn.Module, keys: list[str] | None) -> None:
    """Add LoRA layers to everything (or to ``keys``), with the same adapters whatever the model."""
    model.freeze()
    linear_to_lora_layers(
        model,
        len(model.layers),
        {"rank": 4, "scale": 2.0, "dropout": 0.0, **({"keys": keys} if keys else {})},
    )
    rng = np.random.default_rng(0)
    adapters = [
        (path, mx.array(rng.standard_normal(value.shape).astype(np.float32) * 0.1))
        for path, value in sorted(tree_flatten(model.trainable_parameters()))
    ]
    assert {path.rsplit(".", 1)[-1] for path, _ in adapters} == {"lora_a", "lora_b"}
    model.load_weights(adapters, strict=False)


def train_one_step(model: nn.Module) -> Weights:
    """One step of gradient descent on random text; returns the gradients by path."""
    text = tokens(2, 33)

    def loss() -> mx.array:
        return nn.losses.cross_entropy(model(text[:, :-1]), text[:, 1:], reduction="mean")

    model.train()
    _, gradients = nn.value_and_grad(model, loss)()
    mlx.optimizers.SGD(learning_rate=0.1).update(model, gradients)
    model.eval()
    return dict(tree_flatten(gradients))


# mlx-lm's DBRX has a linear layer per expert: its adapters of experts cannot be those of a stack.
_DBRX_KEYS = ["norm_attn_norm.attn.Wqkv", "norm_attn_norm.attn.out_proj", "ffn.router.layer"]


@pytest.mark.parametrize("bits", [None, 4], ids=["unquantized", "4bit"])
@cases
def test_lora_learns_what_mlx_lm_learns(case: Case, bits: int | None) -> None:
    mine, other = pair(case.config, bits=bits)
    keys = _DBRX_KEYS if case.family == "dbrx" else None
    adapt(mine, keys)
    adapt(other, keys)
    assert_gradients_close(train_one_step(mine), train_one_step(other), **sizes(case.config))
    x = tokens(2, 20)
    assert_logits_close(mine(x), other(x), **sizes(case.config))


@cases
def test_lora_of_every_layer_fuses(case: Case) -> None:
    model = ours(case.config)
    x = tokens(2, 20)
    before = model(x)
    adapt(model, None)
    adapted = {path.rsplit(".", 1)[0] for path, _ in tree_flatten(model.trainable_parameters())}
    assert any("switch_mlp" in path for path in adapted)
    train_one_step(model)
    logits = model(x)
    assert not mx.array_equal(logits, before)
    fused = [(path, layer.fuse()) for path, layer in model.named_modules() if hasattr(layer, "fuse")]
    assert {path for path, _ in fused} == adapted
    model.update_modules(tree_unflatten(fused))
    assert_logits_close(model(x), logits, **sizes(case.config))


@pytest.mark.parametrize("bits", [None, 4], ids=["unquantized", "4bit"])
@cases
def test_saved_models_load_again(case: Case, bits: int | None, tmp_path: Path) -> None:
    model, config = ours(case.config), dict(case.config)
    if bits is not None:
        model, config = quantize_model(model, config, group_size=64, bits=bits)
        model.eval()  # the layers that quantization makes begin in training
    save_model(tmp_path, model)
    save_config(config, tmp_path / "config.json")
    loaded, _ = load_model(tmp_path, get_model_classes=get_classes)
    assert same(loaded, model)
    if case.family == "dbrx":  # mlx-lm's has another layout
        return
    theirs, _ = load_model(tmp_path)
    assert type(theirs) is importlib.import_module(f"mlx_lm.models.{case.family}").Model
    x = tokens(2, 20)
    assert_logits_close(loaded(x), theirs(x), **sizes(case.config))


def same(got: nn.Module, want: nn.Module) -> bool:
    """Equal parameters, and equal logits bit for bit."""
    mine, other = parameters(got), parameters(want)
    x = tokens(2, 20)
    return (
        mine.keys() == other.keys()
        and all(mx.array_equal(mine[k], other[k]) for k in mine)
        and bool(mx.array_equal(got(x), want(x)))
    )
