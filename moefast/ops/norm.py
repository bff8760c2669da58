"""``rms_norm`` and ``layer_norm``, so that a backend may run them.

They are no MoE operations; but MLX's CPU puts each together out of eight small ones, and where experts are
fast, those take a tenth of a decoded token's time.
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


@lru_cache(maxsize=4096)
def _problem(op: str, shape: Shape, dtype: mx.Dtype, weight: Form, bias: Form, device: str) -> Problem:
    """details: none."""
    if not shape or shape[-1] == 0 or dtype not in FLOATS:
        refuse(op, "x must be a float array [..., dims]", (shape, dtype))
    check_vector(op, "weight", weight, shape[-1])
    check_vector(op, "bias", bias, shape[-1])
    return Problem(op, device, dtype, phase_of(shape), ())
