"""``route``: router logits to experts and weights."""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx

from ..backends import registry
from ..registry import Problem, device_name, phase_of
from ..routing import Routing
from ..specs import RouterSpec
from ..weights import Form, Shape, form_of
from ._checks import check_rows, check_type, check_vector, dtype_of


def route(
    logits: mx.array,
    spec: RouterSpec,
    *,
    selection_bias: mx.array | None = None,
    expert_scale: mx.array | None = None,
    backend: str = "auto",
) -> Routing:
    """Choose each token's experts and weigh them.

    The steps are explained where they are implemented: :mod:`moefast.backends.reference.route`.

    Args:
        logits: ``[..., num_experts]`` in float32, float16 or bfloat16; any number of tokens, 0 included.
        spec: the family's choices.
        selection_bias: ``[num_experts]`` float; added to the scores for the choice, not for the weights.
        expert_scale: ``[num_experts]`` float; factor on the weights of each expert (Gemma 4).
        backend: a name of :func:`moefast.backends`, or ``"auto"``.

    Returns:
        ``Routing(indices [..., top_k] uint32, weights [..., top_k])``. The set of experts is the same on
        every backend; their order is the backend's own. NaN logits give in-range, distinct indices.

    Raises:
        ValueError: a shape or dtype breaks a rule, or the named backend cannot run this.
    """
    check_type("route", "logits", logits, mx.array)
    check_type("route", "spec", spec, RouterSpec)
    problem = _problem(
        logits.shape, logits.dtype, spec, form_of(selection_bias), form_of(expert_scale), device_name()
    )
    routing: Routing = registry.choose(problem, backend).run(logits, spec, selection_bias, expert_scale)
    return routing


@lru_cache(maxsize=4096)
def _problem(
    shape: Shape, dtype: mx.Dtype, spec: RouterSpec, bias: Form, expert_scale: Form, device: str
) -> Problem:
    """details: spec, dtype of the selection bias or None, dtype of the expert scale or None."""
    check_rows("route", "logits", shape, dtype, spec.num_experts, "num_experts")
    check_vector("route", "selection_bias", bias, spec.num_experts)
    check_vector("route", "expert_scale", expert_scale, spec.num_experts)
    details = (spec, dtype_of(bias), dtype_of(expert_scale))
    return Problem("route", device, dtype, phase_of(shape), details)
