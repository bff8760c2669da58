"""The arrays of a call as a flat list, the arguments they stand for, and the reference on that list.

The order is that of ``csrc/mlx/plan.h``: the operation's own arrays as far as they are there, then those of
the weights, projection by projection (gate, up, down; then the shared expert's, and its output gate).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx

from ..routing import Routing
from ..weights import ExpertLayout, ExpertWeights, Layout, Projection, SharedExpert
from .reference import REFERENCE
from .reference.route import weigh

Reference = Callable[[list[mx.array]], list[mx.array]]

# What an array is to a derivative.
DIFFERENTIABLE, CONSTANT = "differentiable", "constant"


def present(*arrays: mx.array | None) -> list[mx.array]:
    """Those that are not None."""
    return [array for array in arrays if array is not None]


def rounded(mix: mx.array, combine_dtype: mx.Dtype | None) -> mx.array:
    """Routing weights in the dtype they multiply with; to float32 they need no cast."""
    return mix if combine_dtype is None or combine_dtype == mx.float32 else mix.astype(combine_dtype)


def multiplied(mix: str, combine_dtype: str | None) -> str:
    """The dtype of :func:`rounded` weights."""
    return mix if combine_dtype in (None, "float32") else combine_dtype


def arrays_of(weights: ExpertWeights | SharedExpert | Projection) -> list[mx.array]:
    """The arrays of weights."""
    if isinstance(weights, Projection):
        return present(*weights.arrays)
    parts = [weights.gate, weights.up, weights.down]
    if isinstance(weights, SharedExpert):
        parts.append(weights.output_gate)
    return [array for part in parts if part is not None for array in arrays_of(part)]


def roles(op: str, details: tuple[Any, ...]) -> list[str]:
    """Of each array of a call. Indices are constant, and so are the parts of a quantized weight: MLX has no
    derivative by a packed weight either."""
    if op in ("quantized_matmul", "quantized_matmuls"):
        return [DIFFERENTIABLE, *(role for layout in details for role in _roles(layout))]
    if op == "route":
        return [DIFFERENTIABLE] * (1 + len(present(*details[1:])))
    if op == "moe":
        _, layout, shared, _, bias, scale, _ = details
        own = [DIFFERENTIABLE] * (2 + len(present(bias, scale)))
        others = [] if shared is None else [*_roles_of_experts(shared.layout), *_roles(shared.output_gate)]
        return [*own, *_roles_of_experts(layout), *others]
    own = [DIFFERENTIABLE, CONSTANT] + [DIFFERENTIABLE] * (op == "experts")
    return [*own, *_roles_of_experts(details[0])]


def _roles(layout: Layout | None) -> list[str]:
    if layout is None:
        return []
    parts = 1 if layout.quant is None else 3 if layout.quant.mode == "affine" else 2
    weight = [DIFFERENTIABLE if layout.quant is None else CONSTANT] * parts
    return [*weight, *[DIFFERENTIABLE] * (layout.bias is not None), *[CONSTANT] * layout.global_scale]


def _roles_of_experts(layout: ExpertLayout) -> list[str]:
    return [role for part in (layout.gate, layout.up, layout.down) for role in _roles(part)]


def reference_of(op: str, details: tuple[Any, ...]) -> Reference:
    """The reference implementation of a problem on the flat list of its arrays.

    Of ``route``, whose order is each backend's own, it is the weights of given indices: ``[*arrays, indices]
    -> [weights]``."""
    if op == "route":

        def weights(arrays: list[mx.array]) -> list[mx.array]:
            rest = iter(arrays)
            logits, spec, bias, scale = arguments_of(op, details, rest)
            return [weigh(logits, spec, bias, scale, next(rest))]

        return weights
    run = REFERENCE.kernels[op].run

    def again(arrays: list[mx.array]) -> list[mx.array]:
        made = run(*arguments_of(op, details, iter(arrays)))
        return made if isinstance(made, list) else [made]

    return again


def arguments_of(op: str, details: tuple[Any, ...], rest: Iterator[mx.array]) -> tuple[Any, ...]:
    """The arguments of the reference's function that ``rest`` is the flat list of."""
    first = next(rest)
    if op in ("quantized_matmul", "quantized_matmuls"):
        return first, *(Projection.again(layout, rest) for layout in details)
    if op == "route":
        spec, bias, scale = details
        return first, spec, _optional(bias, rest), _optional(scale, rest)
    if op == "moe":
        spec, layout, shared, _, bias, scale, combine_dtype = details
        logits, bias, scale = next(rest), _optional(bias, rest), _optional(scale, rest)
        weights = ExpertWeights.again(layout, rest)
        others = None if shared is None else SharedExpert.again(shared, rest)
        return first, logits, spec, weights, bias, scale, others, _dtype(combine_dtype)
    indices = next(rest)
    if op == "switch_glu":
        return first, ExpertWeights.again(details[0], rest), indices
    mix = next(rest)
    return first, ExpertWeights.again(details[0], rest), Routing(indices, mix), _dtype(details[3])


def _optional(dtype: str | None, rest: Iterator[mx.array]) -> mx.array | None:
    return None if dtype is None else next(rest)


def _dtype(name: str | None) -> mx.Dtype | None:
    return None if name is None else getattr(mx, name)
