"""``accelerate``, ``restore`` and ``accelerated``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn

from ..backends import backends, registry
from ..env import settings
from ..errors import refuse
from ..registry import device_name
from . import dbrx, sampling
from .look import Found, activation_dtype, arrays_of, in_order, look, look_beside
from .report import Entry, Report
from .swap import swap, unswap


def accelerate(model: mlx.nn.Module, *, backend: str = "auto", dense: bool | None = None) -> Report:
    """Let moefast's backends run the MoE layers of a model that mlx-lm loaded.

    Classes of modules change, and nothing else: no parameter is copied, renamed or moved, so saving,
    quantizing, LoRA, sharding, prompt caches and ``deepcopy`` go on working, before and after. What is not
    exactly what mlx-lm's release has is left alone, and the report says why. In training the original
    computation runs. Calling it again looks at the model anew. Other threads may run the model meanwhile, but
    not while a model that is accelerated already is accelerated again or restored.

    DBRX is the exception: mlx-lm keeps its experts in a Python list. They are stacked, projection by
    projection, without needing memory for both, and change their names meanwhile.

    Args:
        model: of any family, already quantized, adapted or sharded, or to be.
        backend: a name of :func:`moefast.backends`, or ``"auto"``: the fastest that takes a layer, and the
            original where none does or ``moefast tune`` found that to be faster.
        dense: also linear layers, heads, norms, rotary positions and attention, and the log-probabilities of
            mlx-lm's generation (:mod:`.sampling`); by default where the native backend runs them.

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
    before = mx.get_active_memory()
    parameters = sum(array.nbytes for array in arrays_of(model))
    dtype = activation_dtype(model)
    _to_originals(model)
    found = list(look(model, backend, dtype))
    try:
        apply(found, backend)
        if dense is None:
            wanted = registry.default if backend == "auto" else backend
            native = backends()["native"] is None and device_name() == "cpu" and wanted in ("auto", "native")
            dense = native and any(one.swaps for one in found)
        if dense:
            beside = [one for one in look_beside(model, backend, dtype) if one.swaps]
            apply(beside, backend)
            found += beside
            sampling.attach(model)
    except BaseException:  # no memory to stack DBRX's experts, or an interrupt meanwhile
        restore(model)
        raise
    return Report(
        entries=tuple(_entry(one) for one in found),
        parameter_bytes=parameters,
        added_bytes=mx.get_active_memory() - before,
    )


def restore(model: mlx.nn.Module) -> int:
    """Undo :func:`accelerate`: the model computes the very same bits as before.

    Returns:
        How many modules were changed back.

    Raises:
        ValueError: experts of DBRX have been adapted while they were stacked. Nothing is undone.
    """
    for path, module in in_order(model):
        reason = dbrx.why_not_unstack(module) if dbrx.is_stacked(module) else None
        if reason is not None:
            refuse("restore", f"the stacks of {path} must be plain layers again", reason)
    sampling.detach(model)
    changed = 0
    for _, module in in_order(model):
        stacked = dbrx.is_stacked(module)
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


def apply(found: list[Found], backend: str) -> None:
    """Do what :func:`.look.look` found possible."""
    for one in found:
        if dbrx.is_stacked(one.module) and not one.swaps:  # stacked by an earlier call
            restore(one.module)
        for module, ahead, attributes in one.swaps:
            if ahead is dbrx.AcceleratedDbrx and not dbrx.is_stacked(module):
                dbrx.stack(module)
            unswap(module)
            swap(module, ahead, backend, one.verdict.originals, **attributes)


def _to_originals(model: mlx.nn.Module) -> None:
    """Undo all but DBRX's stacking, which is kept: it is the same either way."""
    for _, module in in_order(model):
        if not dbrx.is_stacked(module):
            unswap(module)


def _entry(found: Found) -> Entry:
    verdict = found.verdict
    if verdict.reason is not None:
        return Entry(path=found.path, kind=found.kind, what="original", reason=verdict.reason)
    return Entry(
        path=found.path,
        kind=found.kind,
        what=found.what,
        backends=verdict.backends,
        reason=verdict.remark,
    )
