"""Walking through a model: which of its layers can be accelerated, and by what. Changes nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn
from mlx.utils import tree_flatten

from ..families import BLOCKS
from ..nn import MoE
from . import apart, dbrx
from .attention import attention_class
from .block import AcceleratedBlock
from .checks import Verdict, look_at_block, look_at_dense, look_at_experts, look_at_router
from .dense import dense_class
from .experts import STACKS, AcceleratedExperts
from .known import PACKAGE, why_changed, why_unlike
from .routing import part
from .swap import original_of

_ROWS = {f"{row.module}.{row.name}": row for row in BLOCKS}


class Swap(NamedTuple):
    """What is to be done with a module: see :func:`.swap.swap`."""

    module: Any
    ahead: type
    attributes: dict[str, Any] = {}  # noqa: RUF012 (never written to)


class Found(NamedTuple):
    """A layer that moefast knows.

    Attributes:
        path: its name in the model.
        module: the layer.
        kind: name of its class, before any acceleration.
        what: see :class:`.report.Entry`.
        verdict: whether it can be accelerated.
        swaps: what that takes; empty where it cannot.
    """

    path: str
    module: Any
    kind: str
    what: str
    verdict: Verdict
    swaps: tuple[Swap, ...] = ()


def look(model: mlx.nn.Module, backend: str, dtype: mx.Dtype) -> Iterator[Found]:
    """The MoE layers of a model, on activations of ``dtype``."""
    seen: set[int] = set()  # modules that stand in two places, and parts of what was spoken of already
    for path, module in in_order(model):
        if id(module) in seen:
            continue
        seen.add(id(module))
        found = _look_at(path, module, backend, dtype)
        if found is None:
            continue
        if found.verdict.tuned:  # its parts are what was measured
            seen.update(id(swap.module) for swap in found.swaps)
        if found.verdict.reason is not None:  # its parts may be accelerated on their own
            found = found._replace(swaps=())
        elif found.what == "own" or dbrx.is_stacked(module):
            seen.update(id(child) for _, child in in_order(module))
        seen.update(id(swap.module) for swap in found.swaps)
        yield found


def look_beside(model: mlx.nn.Module, backend: str, dtype: mx.Dtype) -> Iterator[Found]:
    """The other layers of a model that the native backend can run."""
    for path, module in in_order(model):
        ahead = dense_class(module) or attention_class(module)
        if ahead is not None:
            verdict = look_at_dense(module, backend, dtype)
            swaps = () if verdict.reason is not None else (Swap(module, ahead),)
            yield Found(path, module, type(module).__name__, "dense", verdict, swaps)


def _look_at(path: str, module: Any, backend: str, dtype: mx.Dtype) -> Found | None:
    """None for what is no MoE layer."""
    kind = original_of(module) or type(module)
    name = f"{kind.__module__.removeprefix(PACKAGE + '.')}.{kind.__qualname__}"

    def found(what: str, verdict: Verdict, *swaps: Swap) -> Found:
        return Found(path, module, kind.__name__, what, verdict, swaps)

    if isinstance(module, MoE):
        return found("own", Verdict())
    if name in _ROWS:
        row = _ROWS[name]
        experts = part(module, row.experts)
        return found(
            "block",
            look_at_block(row, module, backend, dtype),
            Swap(experts, AcceleratedExperts),
            Swap(module, AcceleratedBlock, {"_moefast_row": row}),
        )
    if name == dbrx.KIND:
        return found("block", _look_at_dbrx(module, backend, dtype), Swap(module, dbrx.AcceleratedDbrx))
    if name == apart.ROUTER:
        verdict = look_at_router(module, backend, dtype)
        return found("router", verdict, Swap(module, apart.AcceleratedRouter))
    if name == apart.EXPERTS:
        changed = why_changed([f"{apart.EXPERTS}.__call__"])
        stacks = part(module, "switch_glu")
        return found(
            "experts",
            look_at_experts(stacks, backend, dtype) if changed is None else Verdict(changed),
            Swap(stacks, AcceleratedExperts),
            Swap(module, apart.AcceleratedApartExperts),
        )
    if any(isinstance(module, _class(stack)) for stack in STACKS):
        verdict = look_at_experts(module, backend, dtype)
        return found("experts", verdict, Swap(module, AcceleratedExperts))
    return None


def _look_at_dbrx(block: Any, backend: str, dtype: mx.Dtype) -> Verdict:
    if dbrx.is_stacked(block):
        return look_at_block(dbrx.ROW, block, backend, dtype)
    reason = why_changed([*dbrx.ROW.sources, "dbrx.MLP.__call__"])
    if reason is None and any(why_unlike(expert, dbrx.EXPERT) is not None for expert in block.experts):
        reason = "its experts are not mlx-lm's dbrx.MLP"
    if reason is None:
        reason = dbrx.why_not_stack(block)
    if reason is not None:
        return Verdict(reason)
    return look_at_block(dbrx.ROW, dbrx.stacked_form(block), backend, dtype)


def activation_dtype(model: mlx.nn.Module) -> mx.Dtype:
    """That of the embedding's rows, or else of the first floating-point parameter."""
    for _, module in in_order(model):
        if isinstance(module, mlx.nn.QuantizedEmbedding):
            scales = module.scales
            return scales.dtype if mx.issubdtype(scales.dtype, mx.floating) else mx.bfloat16
        if isinstance(module, mlx.nn.Embedding):
            return module.weight.dtype
    floats = (a.dtype for a in arrays_of(model) if mx.issubdtype(a.dtype, mx.floating))
    return next(floats, mx.float32)


def arrays_of(model: mlx.nn.Module) -> list[mx.array]:
    """All parameters."""
    named: Any = tree_flatten(model.parameters())
    return [array for _, array in named]


def in_order(model: mlx.nn.Module) -> list[tuple[str, Any]]:
    """Every module with its path, outer ones first, as a reader of the model would list them."""

    def key(named: tuple[str, Any]) -> list[tuple[int, str]]:
        return [(int(word), "") if word.isdecimal() else (-1, word) for word in named[0].split(".")]

    return sorted(model.named_modules(), key=key)


def _class(kind: str) -> type:
    """A class of ``mlx_lm.models``, if its module has been imported: else no model has it."""
    module, _, name = kind.partition(".")
    found = getattr(sys.modules.get(f"{PACKAGE}.{module}"), name, None)
    return found if isinstance(found, type) else type(None)
