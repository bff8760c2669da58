"""``rms_norm`` and ``layer_norm``, of arrays and of residual sums, so that a backend may run them.

They are no MoE operations; but MLX's CPU puts each together out of eight small ones, and where experts are
fast, those take a tenth of a decoded token's time. A sum that a norm reads is one more, two with a factor.
"""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx

from ..backends import registry
from ..errors import refuse
from ..registry import Problem, device_name, phase_of
from ..weights import FLOATS, Form, Shape, form_of
from ._checks import check_type, check_vector


def rms_norm(x: mx.array, weight: mx.array | None, eps: float, *, backend: str = "auto") -> mx.array:
    """``x / sqrt(mean(x^2) + eps) * weight`` (Zhang and Sennrich, arXiv:1910.07467).

    Args:
        x: ``[..., dims]`` in float32, float16 or bfloat16.
        weight: ``[dims]`` floats, or None.
        eps: added to the mean square.
        backend: a name of :func:`moefast.backends`, or ``"auto"``.

    Returns:
        Like ``x``, in the promoted dtype of ``x`` and ``weight``.

    Raises:
        ValueError: a shape or dtype breaks a rule, or the named backend cannot run this.
    """
    check_type("rms_norm", "x", x, mx.array)
    problem = _problem("rms_norm", x.shape, x.dtype, form_of(weight), None, device_name())
    y: mx.array = registry.choose(problem, backend).run(x, weight, eps)
    return y


def layer_norm(
    x: mx.array, weight: mx.array | None, bias: mx.array | None, eps: float, *, backend: str = "auto"
) -> mx.array:
    """``(x - mean(x)) / sqrt(variance(x) + eps) * weight + bias`` (Ba et al., arXiv:1607.06450).

    Args:
        x: ``[..., dims]`` in float32, float16 or bfloat16.
        weight, bias: ``[dims]`` floats, or None.
        eps: added to the variance.
        backend: a name of :func:`moefast.backends`, or ``"auto"``.

    Returns:
        Like ``x``, in the promoted dtype of all arrays.

    Raises:
        ValueError: a shape or dtype breaks a rule, or the named backend cannot run this.
    """
    check_type("layer_norm", "x", x, mx.array)
    forms = form_of(weight), form_of(bias)
    problem = _problem("layer_norm", x.shape, x.dtype, *forms, device_name())
    y: mx.array = registry.choose(problem, backend).run(x, weight, bias, eps)
    return y


def add_rms_norm(
    x: mx.array,
    branch: mx.array,
    weight: mx.array | None,
    eps: float,
    *,
    multiplier: float = 1.0,
    backend: str = "auto",
) -> tuple[mx.array, mx.array]:
    """``h = x + multiplier * branch``, and :func:`rms_norm` of it.

    Args:
        x: ``[..., dims]`` in float32, float16 or bfloat16: a residual stream.
        branch: like ``x``, in any of these dtypes: what a layer adds to it.
        weight: ``[dims]`` floats, or None.
        eps: added to the mean square.
        multiplier: rounded to the dtype of ``branch``, as MLX rounds Python's numbers.
        backend: a name of :func:`moefast.backends`, or ``"auto"``.

    Returns:
        ``h`` like ``x``, in the promoted dtype of ``x`` and ``branch``, and its norm, in that of ``h`` and
        ``weight``. Product, sum and norm are each rounded, as by the operations one by one.

    Raises:
        ValueError: a shape or dtype breaks a rule, or the named backend cannot run this.
    """
    check_type("add_rms_norm", "x", x, mx.array)
    check_type("add_rms_norm", "branch", branch, mx.array)
    forms = form_of(weight), None, device_name(), form_of(branch)
    problem = _problem("add_rms_norm", x.shape, x.dtype, *forms)
    both: tuple[mx.array, mx.array] = registry.choose(problem, backend).run(
        x, branch, weight, eps, multiplier
    )
    return both


def add_layer_norm(
    x: mx.array,
    branch: mx.array,
    weight: mx.array | None,
    bias: mx.array | None,
    eps: float,
    *,
    multiplier: float = 1.0,
    backend: str = "auto",
) -> tuple[mx.array, mx.array]:
    """``h = x + multiplier * branch``, and :func:`layer_norm` of it. See :func:`add_rms_norm`."""
    check_type("add_layer_norm", "x", x, mx.array)
    check_type("add_layer_norm", "branch", branch, mx.array)
    forms = form_of(weight), form_of(bias), device_name(), form_of(branch)
    problem = _problem("add_layer_norm", x.shape, x.dtype, *forms)
    run = registry.choose(problem, backend).run
    both: tuple[mx.array, mx.array] = run(x, branch, weight, bias, eps, multiplier)
    return both


@lru_cache(maxsize=4096)
def _problem(
    op: str, shape: Shape, dtype: mx.Dtype, weight: Form, bias: Form, device: str, branch: Form = None
) -> Problem:
    """details: none."""
    if not shape or shape[-1] == 0 or dtype not in FLOATS:
        refuse(op, "x must be a float array [..., dims]", (shape, dtype))
    if branch is not None and (branch[0] != shape or branch[1] not in FLOATS):
        refuse(op, f"branch must be a float array {shape}", branch)
    check_vector(op, "weight", weight, shape[-1])
    check_vector(op, "bias", bias, shape[-1])
    return Problem(op, device, dtype, phase_of(shape), ())
