"""The kernels of ``kernels/``, on an Apple GPU through ``mx.fast.metal_kernel``: no build step, a stock MLX.

Where there is no such GPU, ``MOEFAST_METAL=emulate`` runs the same sources in :mod:`moefast.emulator`,
eagerly: to test and to debug them, not to be fast. What MLX's own Metal kernels do well (dense products,
attention, norms), they do here, too: those are the reference's functions.

Two backends are made of them. ``metal`` adds up as MLX's own kernels do, and gives their bits where they say
so. ``metal-fast`` adds up in the order that reads least, within the bound of :mod:`moefast.testing`;
``"auto"`` never chooses it.

==================  ================================================================
:mod:`.block`       the operations, out of these parts:
:mod:`.route`       logits to experts and weights
:mod:`.decode`      experts of a few tokens, to MLX's bits; :mod:`.decode_kernels` are its launches
:mod:`.one_token`   a whole block for one token, out of these
:mod:`.of_layers`   a block on the layers that hold its arrays; :mod:`.products` a dense layer
:mod:`.band`        of a few: an expert's weights are read once for several routes
:mod:`.plan`        routes sorted by expert
:mod:`.prefill`     experts of many tokens, as matrix tiles over the plan
:mod:`.combine`     the weighted sum, and what a block adds to it
:mod:`.dispatch`    which of them for how many tokens
:mod:`.refusals`    what they do not take
:mod:`.contiguous`  weights that MLX would copy
:mod:`.operands`    weights as the kernels take them; :mod:`.activations` likewise
:mod:`.launch`      how a kernel is launched, on a GPU or in the emulator
:mod:`.source`      a file of ``kernels/`` as one text
:mod:`.device`      whether there is anything to run on
:mod:`.selfcheck`   a check against MLX on the GPU that is here; :mod:`.verdicts` keeps it
==================  ================================================================
"""

from __future__ import annotations

from functools import partial
from typing import Any

from ...registry import Backend, BoundKernel, Kernel
from ..reference import REFERENCE
from . import products, verdicts
from .block import bind
from .device import probe
from .launch import emulated
from .matvec import Fidelity
from .refusals import elsewhere, why_not

OPERATIONS = ("route", "switch_glu", "experts", "moe")


def _backend(name: str, fidelity: Fidelity, *, opt_in: bool) -> Backend:
    own = BoundKernel(partial(bind, fidelity=fidelity), partial(why_not, fidelity=fidelity), may_decline=True)
    kernels = {
        **{op: Kernel(kernel.run, elsewhere) for op, kernel in REFERENCE.kernels.items()},
        "quantized_matmul": BoundKernel(products.bind, elsewhere),
        **dict.fromkeys(OPERATIONS, own),
    }
    return Backend(name, kernels, probe, opt_in)


METAL = _backend("metal", "exact", opt_in=False)
METAL_FAST = _backend("metal-fast", "fast", opt_in=True)


def describe() -> dict[str, Any]:
    """The self-check's verdict on this GPU, made and kept if there is none for this MLX; empty where the
    kernels do not run on one."""
    if METAL.unavailable is not None or emulated():
        return {}
    verdict = verdicts.stored()
    if verdict is None:
        from .selfcheck import check_and_store

        verdict = check_and_store().verdict()
    return verdict


__all__ = ["METAL", "METAL_FAST", "describe"]
