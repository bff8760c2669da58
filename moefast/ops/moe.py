"""``moe``: router, experts, combine and shared expert in one call, so that a backend may fuse them."""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx

from ..backends import registry
from ..errors import refuse
from ..registry import Choice, Problem, device_name, phase_of
from ..specs import RouterSpec
from ..weights import (
    ExpertLayout,
    ExpertWeights,
    Form,
    Shape,
    SharedExpert,
    SharedLayout,
    dtype_name,
    form_of,
)
from ._checks import check_combine_dtype, check_rows, check_type, check_vector, dtype_of


def moe(
    x: mx.array,
    logits: mx.array,
    spec: RouterSpec,
    weights: ExpertWeights,
    *,
    selection_bias: mx.array | None = None,
    expert_scale: mx.array | None = None,
    shared: SharedExpert | None = None,
    combine_dtype: mx.Dtype | None = None,
    backend: str = "auto",
) -> mx.array:
    """A whole MoE block after its router's matrix product.

    Args:
        x: ``[..., hidden]`` in float32, float16 or bfloat16.
        logits: ``[..., num_experts]``, over the leading dimensions of ``x``.
        spec: the family's routing.
        weights: stacks of ``spec.num_experts - spec.identity_experts`` experts.
        selection_bias, expert_scale: see :func:`moefast.route`.
        shared: the expert of every token, added to the routed output.
        combine_dtype: see :func:`moefast.experts`.
        backend: a name of :func:`moefast.backends`, or ``"auto"``.

    Returns:
        ``[..., hidden]``.

    Raises:
        ValueError: a shape or dtype breaks a rule, or the named backend cannot run this.
    """
    choice = choose(
        x,
        logits,
        spec,
        weights,
        selection_bias=selection_bias,
        expert_scale=expert_scale,
        shared=shared,
        combine_dtype=combine_dtype,
        backend=backend,
    )
    y: mx.array = choice.run(x, logits, spec, weights, selection_bias, expert_scale, shared, combine_dtype)
    return y


def choose(
    x: mx.array,
    logits: mx.array,
    spec: RouterSpec,
    weights: ExpertWeights,
    *,
    selection_bias: mx.array | None = None,
    expert_scale: mx.array | None = None,
    shared: SharedExpert | None = None,
    combine_dtype: mx.Dtype | None = None,
    backend: str = "auto",
) -> Choice:
    """What :func:`moe` runs; checks its arguments."""
    check_type("moe", "x", x, mx.array)
    check_type("moe", "logits", logits, mx.array)
    check_type("moe", "spec", spec, RouterSpec)
    check_type("moe", "weights", weights, ExpertWeights)
    if shared is not None:
        check_type("moe", "shared", shared, SharedExpert)
    problem = _problem(
        x.shape,
        x.dtype,
        logits.shape,
        logits.dtype,
        spec,
        weights.layout,
        shared.layout if shared is not None else None,
        form_of(selection_bias),
        form_of(expert_scale),
        combine_dtype,
        device_name(),
    )
    return registry.choose(problem, backend)


@lru_cache(maxsize=4096)
def _problem(
    shape: Shape,
    dtype: mx.Dtype,
    logits_shape: Shape,
    logits_dtype: mx.Dtype,
    spec: RouterSpec,
    layout: ExpertLayout,
    shared: SharedLayout | None,
    bias: Form,
    expert_scale: Form,
    combine_dtype: mx.Dtype | None,
    device: str,
) -> Problem:
    """details: spec, layout, shared layout or None, dtypes of logits, selection bias, expert scale and
    combine."""
    check_rows("moe", "x", shape, dtype, layout.hidden, "hidden")
    check_rows("moe", "logits", logits_shape, logits_dtype, spec.num_experts, "num_experts")
    if logits_shape[:-1] != shape[:-1]:
        refuse(
            "moe", f"logits must be {(*shape[:-1], spec.num_experts)} for x of shape {shape}", logits_shape
        )
    if layout.num_experts != spec.num_experts - spec.identity_experts:
        refuse(
            "moe",
            f"weights must hold {spec.num_experts - spec.identity_experts} experts for {spec}",
            layout.num_experts,
        )
    if shared is not None and shared.layout.hidden != layout.hidden:
        refuse("moe", f"the shared expert must have hidden={layout.hidden}", shared.layout.hidden)
    check_vector("moe", "selection_bias", bias, spec.num_experts)
    check_vector("moe", "expert_scale", expert_scale, spec.num_experts)
    check_combine_dtype("moe", combine_dtype)
    details = (
        spec,
        layout,
        shared,
        dtype_name(logits_dtype),
        dtype_of(bias),
        dtype_of(expert_scale),
        combine_dtype and dtype_name(combine_dtype),
    )
    return Problem("moe", device, dtype, phase_of(shape), details)
