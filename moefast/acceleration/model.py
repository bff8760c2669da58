"""``accelerate``, ``restore`` and ``accelerated``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn
from mlx.utils import tree_flatten

from ..backends import backends, registry
from ..env import settings
from ..errors import refuse
from ..families import BLOCKS
from ..nn import MoE
from ..registry import device_name
from . import apart, dbrx
from .attention import attention_class
from .block import AcceleratedBlock
from .checks import Verdict, look_at_block, look_at_experts
from .dense import dense_class
from .experts import STACKS, AcceleratedExperts
from .known import PACKAGE, why_changed, why_unlike
from .report import Entry, Report
from .routing import part
from .swap import original_of, swap, unswap

_ROWS = {f"{row.module}.{row.name}": row for row in BLOCKS}


class _Swap(NamedTuple):
    """What is to be done with a module, once everything has been looked at."""

    module: mlx.nn.Module
    ahead: type
    attributes: dict[str, Any]


def accelerate(model: mlx.nn.Module, *, backend: str = "auto", dense: bool | None = None) -> Report:
    """Let moefast's backends run the MoE layers of a model that mlx-lm loaded.

    Classes of modules change, and nothing else: no parameter is copied, renamed or moved, so saving,
    quantizing, LoRA, sharding, prompt caches and ``deepcopy`` go on working, before and after. What is not
    exactly what mlx-lm's release has is left alone, and the report says why. In training the original
    computation runs. Calling it again looks at the model anew.

    DBRX is the exception: mlx-lm keeps its experts in a Python list. They are stacked, projection by
    projection, without needing memory for both, and change their names meanwhile.

    Args:
        model: of any family, already quantized, adapted or sharded, or to be.
        backend: a name of :func:`moefast.backends`, or ``"auto"``: the fastest that takes a layer, and the
            original where none does.
        dense: also linear layers, heads, norms, rotary positions and attention; by default where the native
            backend runs them.

    Returns:
        What runs where, and what was left alone and why.

    Raises:
        ValueError: no such backend, or it cannot run here. The model is unchanged.
    """
    registry.check(backend)
    reason = None if backend == "auto" else backends()[backend]
    if reason is not None:
        refuse("accelerate", f"backend {backend!r} must be able to run here", reason)
    if not isinstance(model, mlx.nn.Module):
        refuse("accelerate", "model must be an mlx.nn.Module", type(model).__name__)
    if not settings.enabled:
        return Report(note="MOEFAST=0: the model is as it was")
    parameters = sum(array.nbytes for array in _arrays(model))
    before = mx.get_active_memory()
    for _, module in _in_order(model):
        if not isinstance(module, dbrx.AcceleratedDbrx):
            unswap(module)
    entries, swaps = _look(model, backend)
    for of_one in swaps:
        if of_one.ahead is dbrx.AcceleratedDbrx and original_of(of_one.module) is None:
            dbrx.stack(of_one.module)
        unswap(of_one.module)
        swap(of_one.module, of_one.ahead, backend, **of_one.attributes)
    wanted = registry.default if backend == "auto" else backend
    if dense is None:
        native = backends()["native"] is None and device_name() == "cpu"
        dense = native and wanted in ("auto", "native") and any(e.what != "original" for e in entries)
    if dense:
        entries += _swap_dense(model, backend)
    return Report(
        entries=tuple(entries), parameter_bytes=parameters, added_bytes=mx.get_active_memory() - before
    )


def restore(model: mlx.nn.Module) -> int:
    """Undo :func:`accelerate`: the model computes the very same bits as before.

    Returns:
        How many modules were changed back.
    """
    changed = 0
    for _, module in _in_order(model):
        stacked = isinstance(module, dbrx.AcceleratedDbrx)
        changed += unswap(module)
        if stacked:
            dbrx.unstack(module)
    return changed


@contextmanager
def accelerated(
    model: mlx.nn.Module, *, backend: str = "auto", dense: bool | None = None
) -> Iterator[Report]:
    """:func:`accelerate` within a ``with`` block, :func:`restore` at its end."""
    try:
        yield accelerate(model, backend=backend, dense=dense)
    finally:
        restore(model)


def _look(model: mlx.nn.Module, backend: str) -> tuple[list[Entry], list[_Swap]]:
    """What is to be done and what to say of it; changes nothing."""
    dtype = activation_dtype(model)
    entries: list[Entry] = []
    swaps: list[_Swap] = []
    seen: set[int] = set()  # modules that stand in two places, and stacks of blocks already spoken for
    for path, module in _in_order(model):
        if id(module) in seen:
            continue
        seen.add(id(module))
        name = _name(module)
        made: tuple[Verdict, type, dict[str, Any], str] | None = None
        if isinstance(module, MoE):
            entries.append(Entry(path=path, kind="MoE", what="original", reason="it is moefast's own"))
            seen.update(id(child) for _, child in _in_order(module))
            continue
        if name in _ROWS:
            row = _ROWS[name]
            verdict = look_at_block(row, module, backend, dtype)
            made = verdict, AcceleratedBlock, {"_moefast_row": row}, "block"
            experts = part(module, row.experts)
            if verdict.reason is None:
                seen.add(id(experts))
                swaps.append(_Swap(experts, AcceleratedExperts, {}))
        elif name == dbrx.KIND:
            made = _dbrx(module, backend, dtype), dbrx.AcceleratedDbrx, {}, "block"
        elif name == apart.ROUTER:
            made = Verdict(why_changed([f"{apart.ROUTER}.__call__"])), apart.AcceleratedRouter, {}, "router"
        elif name == apart.EXPERTS:
            verdict = look_at_experts(module.switch_glu, backend, dtype)
            changed = why_changed([f"{apart.EXPERTS}.__call__"])
            if changed is not None:
                verdict = Verdict(changed)
            made = verdict, apart.AcceleratedApartExperts, {}, "experts"
            if verdict.reason is None:
                seen.add(id(module.switch_glu))
                swaps.append(_Swap(module.switch_glu, AcceleratedExperts, {}))
        elif any(isinstance(module, _class(kind)) for kind in STACKS):
            made = look_at_experts(module, backend, dtype), AcceleratedExperts, {}, "experts"
        if made is None:
            continue
        verdict, ahead, attributes, what = made
        kind = (original_of(module) or type(module)).__name__
        if verdict.reason is not None:
            entries.append(Entry(path=path, kind=kind, what="original", reason=verdict.reason))
            continue
        entries.append(
            Entry(path=path, kind=kind, what=what, backends=verdict.backends, reason=verdict.remark)
        )
        swaps.append(_Swap(module, ahead, attributes))
    return entries, swaps


def _dbrx(block: Any, backend: str, dtype: mx.Dtype) -> Verdict:
    if original_of(block) is not None:
        return look_at_block(dbrx.ROW, block, backend, dtype)
    reason = why_changed([*dbrx.ROW.sources, "dbrx.MLP.__call__"])
    if reason is None and any(why_unlike(expert, dbrx.EXPERT) is not None for expert in block.experts):
        reason = "its experts are not mlx-lm's dbrx.MLP"
    if reason is None:
        reason = dbrx.why_not_stack(block)
    if reason is not None:
        return Verdict(reason)
    return look_at_block(dbrx.ROW, dbrx.stacked_form(block), backend, dtype)


def _swap_dense(model: mlx.nn.Module, backend: str) -> list[Entry]:
    found = []
    for path, module in _in_order(model):
        ahead = dense_class(module) or attention_class(module)
        if ahead is not None:
            kind = type(module).__name__
            swap(module, ahead, backend)
            phases = dict.fromkeys(("decode", "band", "prefill"), "native")
            found.append(Entry(path=path, kind=kind, what="dense", backends=phases))
    return found


def activation_dtype(model: mlx.nn.Module) -> mx.Dtype:
    """That of the embedding's rows, or else of the first floating-point parameter."""
    for _, module in _in_order(model):
        if isinstance(module, mlx.nn.QuantizedEmbedding):
            scales = module.scales
            return scales.dtype if mx.issubdtype(scales.dtype, mx.floating) else mx.bfloat16
        if isinstance(module, mlx.nn.Embedding):
            return module.weight.dtype
    floats = (a.dtype for a in _arrays(model) if mx.issubdtype(a.dtype, mx.floating))
    return next(floats, mx.float32)


def _arrays(model: mlx.nn.Module) -> list[mx.array]:
    named: Any = tree_flatten(model.parameters())
    return [array for _, array in named]


def _in_order(model: mlx.nn.Module) -> list[tuple[str, Any]]:
    """Every module with its path, outer ones first, as a reader of the model would list them."""

    def key(named: tuple[str, Any]) -> list[tuple[int, str]]:
        return [(int(word), "") if word.isdecimal() else (-1, word) for word in named[0].split(".")]

    return sorted(model.named_modules(), key=key)


def _name(module: Any) -> str:
    """``module.Class`` of mlx-lm's models; accelerated ones by what they were."""
    kind = original_of(module) or type(module)
    return f"{kind.__module__.removeprefix(PACKAGE + '.')}.{kind.__qualname__}"


def _class(kind: str) -> type:
    """A class of ``mlx_lm.models``, if its module has been imported: else no model has it."""
    import sys

    module, _, name = kind.partition(".")
    found = getattr(sys.modules.get(f"{PACKAGE}.{module}"), name, None)
    return found if isinstance(found, type) else type(None)
