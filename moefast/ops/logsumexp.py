"""``logsumexp``: what a model's logits are normalised with, so that a backend may run it.

No MoE operation; but MLX's CPU takes 18 to 29 ns a value, on one thread: with a vocabulary of 150 000,
longer than a layer of fast experts, for every token.
"""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx

from ..backends import registry
from ..errors import refuse
from ..registry import Choice, Problem, device_name, phase_of
from ..weights import FLOATS, Shape
from ._checks import check_type


def logsumexp(x: mx.array, *, backend: str = "auto") -> mx.array:
    """``log(sum(exp(x)))`` over the last axis, in float32 at least, rounded once.

    Args:
        x: ``[..., dims]`` in float32, float16 or bfloat16.
        backend: a name of :func:`moefast.backends`, or ``"auto"``.

    Returns:
        ``[..., 1]`` in the dtype of ``x``; where a row has a NaN, NaN, and else infinity where that has one.

    Raises:
        ValueError: a shape or dtype breaks a rule, or the named backend cannot run this.
    """
    y: mx.array = choose(x, backend).run(x)
    return y


def choose(x: mx.array, backend: str = "auto") -> Choice:
    """What :func:`logsumexp` runs; checks its argument."""
    check_type("logsumexp", "x", x, mx.array)
    return registry.choose(_problem(x.shape, x.dtype, device_name()), backend)


@lru_cache(maxsize=4096)
def _problem(shape: Shape, dtype: mx.Dtype, device: str) -> Problem:
    """details: none."""
    if not shape or shape[-1] == 0 or dtype not in FLOATS:
        refuse("logsumexp", "x must be a float array [..., dims]", (shape, dtype))
    return Problem("logsumexp", device, dtype, phase_of(shape), ())
