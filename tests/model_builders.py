"""Builds the models of model_cases.py, ours and mlx-lm's on the same weights, and runs them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten
from mlx_lm.models import cache as kv_caches
from model_cases import Config

from moefast import ops
from moefast.models import decoding, get_classes
from moefast.models.dbrx import unstack_experts
from moefast.nn import moe

Weights = dict[str, mx.array]


def parameters(model: nn.Module) -> Weights:
    """All parameters by path."""
    return dict(tree_flatten(model.parameters()))


def random_weights(model: nn.Module, seed: int = 0) -> Weights:
    """Random float32 values for an unquantized model: matrices that keep the size of their input, norms
    near 1, biases large enough to matter, and embeddings so small that the layers decide the next token."""
    rng = np.random.default_rng(seed)
    weights = {}
    for path, value in sorted(parameters(model).items()):
        normal = rng.standard_normal(value.shape).astype(np.float32)
        if path.endswith("bias"):
            normal *= 0.2
        elif value.ndim == 1:
            normal = 1 + 0.1 * normal
        else:
            normal *= 0.02 if "embed" in path or "wte" in path else value.shape[-1] ** -0.5
        weights[path] = mx.array(normal)
    return weights


def ours(config: Config, weights: Weights | None = None, **format_: Any) -> nn.Module:
    """moefast's model, in inference mode; ``weights`` (by default random ones) go through ``sanitize``."""
    model_class, args_class = get_classes(config)
    return _finish(model_class(args_class.from_dict(config)), weights, **format_)


def theirs(config: Config, weights: Weights, **format_: Any) -> nn.Module:
    """mlx-lm's model on the weights of ours."""
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    weights = unstack_experts(weights) if config["model_type"] == "dbrx" else weights
    return _finish(module.Model(module.ModelArgs.from_dict(config)), weights, **format_)


def pair(config: Config, seed: int = 0, **format_: Any) -> tuple[nn.Module, nn.Module]:
    """Both models on the same random weights."""
    weights = random_weights(ours(config, {}), seed)
    return ours(config, weights, **format_), theirs(config, weights, **format_)


def _finish(
    model: nn.Module,
    weights: Weights | None,
    *,
    bits: int | None = None,
    dtype: mx.Dtype = mx.float32,
) -> nn.Module:
    """Load, cast and quantize as ``mlx_lm.convert`` does; an empty ``weights`` leaves the initial values."""
    weights = random_weights(model) if weights is None else weights
    if weights:
        model.load_weights(list(model.sanitize(dict(weights)).items()), strict=True)
    follows = getattr(model, "cast_predicate", lambda path: True)
    cast = [(k, v.astype(dtype) if follows(k) else v) for k, v in parameters(model).items()]
    model.load_weights(cast, strict=True)
    if bits is not None:
        predicate = getattr(model, "quant_predicate", lambda path, layer: True)
        nn.quantize(
            model,
            group_size=64,
            bits=bits,
            class_predicate=lambda path, layer: hasattr(layer, "to_quantized") and predicate(path, layer),
        )
    model.eval()
    return model


def tokens(*shape: int, seed: int = 1) -> mx.array:
    """Random token ids of the vocabulary all cases share."""
    return mx.array(np.random.default_rng(seed).integers(0, 128, shape))


def prompt_cache(model: nn.Module) -> list[Any]:
    """An empty KV cache for each layer."""
    caches: list[Any] = kv_caches.make_prompt_cache(model)
    return caches


def prefill_and_decode(model: nn.Module, prompt: mx.array, continuation: mx.array) -> mx.array:
    """Logits of a prompt in one piece, then of a continuation token by token: ``[batch, length, vocab]``."""
    cache = prompt_cache(model)
    logits = []
    for piece in (prompt, *mx.split(continuation, continuation.shape[1], axis=1)):
        logits.append(model(piece, cache))
        mx.eval(logits[-1])  # a pipeline's messages must not overtake those of the step before
    return mx.concatenate(logits, axis=1)


@contextmanager
def recorded_routings() -> Iterator[list[mx.array]]:
    """Collects the experts chosen by every MoE block of our models that runs meanwhile, in order:
    ``[batch, length, top_k]``, sorted."""
    found: list[mx.array] = []
    run = moe.recalled

    def spy(
        block: moe.MoE, x: mx.array, logits: mx.array, bias: mx.array | None, *others: Any
    ) -> mx.array | None:
        found.append(mx.sort(ops.route(logits, block.spec, selection_bias=bias).indices, axis=-1))
        return run(block, x, logits, bias, *others)

    every_step = replace(decoding.settings, replay=False)  # replayed ones would not pass by the spy
    with mock.patch.object(moe, "recalled", spy), mock.patch.object(decoding, "settings", every_step):
        yield found


def routed_logits(
    model: nn.Module, prompt: mx.array, continuation: mx.array
) -> tuple[mx.array, npt.NDArray[np.int64]]:
    """:func:`prefill_and_decode` of one of our models, and the experts its blocks chose on the way:
    ``[layer, batch, length, top_k]``, sorted."""
    with recorded_routings() as found:
        logits = prefill_and_decode(model, prompt, continuation)
    layers = len(found) // (1 + continuation.shape[1])
    by_layer = [mx.concatenate(found[layer::layers], axis=1) for layer in range(layers)]
    return logits, np.array(mx.stack(by_layer)).astype(np.int64)
