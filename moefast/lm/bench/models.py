"""The models a family is measured with: moefast's and mlx-lm's, over the same packed weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import mlx.core as mx
import mlx.nn
from mlx.utils import tree_flatten, tree_unflatten

from ...models import get_classes
from ...nn import MoE
from ...pages import huge_pages
from ..random_weights import random_parameters

GROUP_SIZE = 64
_STACKS = (".gate_proj.", ".up_proj.", ".down_proj.")

Weights = dict[str, mx.array]


def build(config: Mapping[str, Any], bits: int, *, stock: bool = False, everywhere: bool = False) -> Any:
    """A quantized model of moefast, or of mlx-lm, in evaluation mode. Its parameters are placeholders that
    have not been evaluated.

    Args:
        config: the content of a config.json.
        bits: of every layer but those the family keeps at other precisions (GraniteMoE, Bailing), in
            groups of 64.
        stock: mlx-lm's class instead of moefast's.
        everywhere: those layers, too.
    """
    if stock:
        module = import_module(f"mlx_lm.models.{config['model_type']}")
        model_class, args_class = module.Model, module.ModelArgs
    else:
        model_class, args_class = get_classes(config)
    model = model_class(args_class.from_dict(config))
    mlx.nn.quantize(model, group_size=GROUP_SIZE, bits=bits, class_predicate=_predicate(model, everywhere))
    model.eval()
    return model


def draw_weights(model: Any, seed: int) -> Weights:
    """Seeded random parameters of a built moefast model, in bfloat16, evaluated, and in the pages of memory
    where :func:`moefast.load` would have put them."""
    random_parameters(model, seed=seed, dtype="bfloat16")
    weights = dict(parameters_of(model))
    mx.eval(weights)
    huge_pages(weights.values())
    return weights


def in_float32(weights: Weights) -> Weights:
    """The same weights for arithmetic in float32: packed words are shared, scales, biases and norms cast."""
    cast = {
        key: value.astype(mx.float32) if mx.issubdtype(value.dtype, mx.floating) else value
        for key, value in weights.items()
    }
    mx.eval(cast)
    return cast


def fill(model: Any, weights: Weights, *, stock: bool = False) -> Any:
    """Give a built model the weights that :func:`draw_weights` named; returns the model.

    mlx-lm's DBRX holds its experts one by one; they become views of the stacks.
    """
    if stock and model.model_type == "dbrx":
        from ...models.dbrx import unstack_experts

        weights = unstack_experts(weights)
    expected = {key for key, _ in parameters_of(model)}
    if expected != weights.keys():
        odd = sorted(expected ^ weights.keys())[:4]
        raise ValueError(f"[bench] both models must have the same parameters, got {odd} in only one.")
    model.update(tree_unflatten(list(weights.items())))
    mx.eval(model.parameters())
    return model


def backbone_of(model: Any) -> Any:
    """The layer stack: token ids ``[batch, length]`` -> hidden states ``[batch, length, hidden]``."""
    return model["transformer"] if "transformer" in model else model["model"]


def head(model: Any, hidden: mx.array) -> mx.array:
    """Hidden states ``[..., hidden]`` -> logits ``[..., vocabulary]``, for either package's model."""
    scaling = getattr(model.args, "logits_scaling", 1.0)
    logits: mx.array
    if "lm_head" in model:
        logits = model["lm_head"](hidden)
    else:
        backbone = backbone_of(model)
        name = "embed_tokens" if "embed_tokens" in backbone else "word_embeddings"
        logits = backbone[name].as_linear(hidden)
    return logits if scaling == 1.0 else logits / scaling


def parameters_of(model: Any) -> list[tuple[str, mx.array]]:
    """All parameters, by path."""
    found: Any = tree_flatten(model.parameters())
    return list(found)


def bytes_per_token(model: Any) -> int:
    """Bytes of weights that decoding one token reads: of each expert stack the part of ``top_k`` experts,
    of the embedding one row (all of it where it is the head too), of everything else all.

    Looks at shapes only; ``model`` is moefast's, filled or not.
    """
    top_k = {
        path: (module.spec.top_k, module.spec.num_experts)
        for path, module in model.named_modules()
        if isinstance(module, MoE)
    }
    tied = "lm_head" not in model
    total = 0
    for path, value in parameters_of(model):
        block = next((found for found in top_k if path.startswith(f"{found}.")), None)
        if block is not None and value.ndim == 3 and any(part in path for part in _STACKS):
            chosen, experts = top_k[block]
            total += value.nbytes * chosen // experts
        elif tied or not any(name in path for name in ("embed_tokens.", "word_embeddings.", ".wte.")):
            total += value.nbytes
    return total


def _predicate(model: Any, everywhere: bool) -> Callable[[str, mlx.nn.Module], bool | dict[str, Any]]:
    """What ``mlx_lm.convert`` would quantize, and how; ``everywhere``: alike."""
    family = None if everywhere else getattr(model, "quant_predicate", None)

    def predicate(path: str, module: mlx.nn.Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % GROUP_SIZE:
            return False
        if family is None:
            return True
        chosen: bool | dict[str, Any] = family(path, module)
        return chosen

    return predicate
