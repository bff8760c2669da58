"""The CPU kernels of ``csrc/cpu``, as MLX operations.

Two bindings of the same kernels: ``moefast._native`` makes them MLX primitives: lazy, differentiable,
traceable. It is tied to the very MLX it was built for. Under another MLX, ``moefast._kernels`` runs them on
NumPy views of evaluated arrays (:mod:`.through_numpy`): correct, slower for small work, not traceable by
``mx.compile``.

===============  ================================================
:mod:`.loading`  which of the two can be used here, and why not
:mod:`.refusals` what the kernels do not take
:mod:`.plans`    from a problem to a callable
===============  ================================================
"""

from __future__ import annotations

from ...registry import Backend, BoundKernel
from .loading import bindings, describe, probe
from .plans import BESIDE_EXPERTS, bind
from .refusals import why_not

PRODUCTS = ("quantized_matmul", "quantized_matmuls")
OPERATIONS = ("route", "switch_glu", "experts", "moe", *PRODUCTS, *BESIDE_EXPERTS)

NATIVE = Backend(
    name="native",
    kernels={op: BoundKernel(bind, why_not) for op in OPERATIONS},
    probe=probe,
)

__all__ = ["NATIVE", "bindings", "describe"]
