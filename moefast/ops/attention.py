"""``attention``: scaled dot-product attention, so that a backend may run it.

It is no MoE operation; but where experts are fast, MLX's attention on a CPU takes most of a model's time.
"""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx

from ..backends import registry
from ..errors import refuse
from ..registry import Problem, device_name, phase_of
from ..weights import FLOATS, Shape
from ._checks import check_type


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    scale: float,
    causal: bool,
    backend: str = "auto",
) -> mx.array:
    """``softmax(scale * queries @ keys.T) @ values`` for every head.

    Args:
        queries: ``[batch, heads, length, dims]`` in float32, float16 or bfloat16.
        keys: ``[batch, kv_heads, keys, dims]`` of the same dtype; ``kv_heads`` divides ``heads``, and equally
            many heads in a row share a key head (grouped queries).
        values: ``[batch, kv_heads, keys, value_dims]`` of the same dtype.
        scale: factor on the products.
        causal: query ``i`` sees keys up to ``i + keys - length`` only.
        backend: a name of :func:`moefast.backends`, or ``"auto"``.

    Returns:
        ``[batch, length, heads * value_dims]``: what an output projection takes.

    Raises:
        ValueError: a shape or dtype breaks a rule, or the named backend cannot run this.
    """
    for name, array in (("queries", queries), ("keys", keys), ("values", values)):
        check_type("attention", name, array, mx.array)
    problem = _problem(
        queries.shape,
        keys.shape,
        values.shape,
        (queries.dtype, keys.dtype, values.dtype),
        causal,
        device_name(),
    )
    y: mx.array = registry.choose(problem, backend).run(queries, keys, values, scale, causal)
    return y


# Keys get one more with every token, so calls are many; each is cheap to describe.
@lru_cache(maxsize=4096)
def _problem(
    queries: Shape,
    keys: Shape,
    values: Shape,
    dtypes: tuple[mx.Dtype, mx.Dtype, mx.Dtype],
    causal: bool,
    device: str,
) -> Problem:
    """details: causal."""
    if any(len(shape) != 4 for shape in (queries, keys, values)):
        refuse(
            "attention",
            "queries, keys and values must be [batch, heads, length, dims]",
            (queries, keys, values),
        )
    if dtypes[0] not in FLOATS or len(set(dtypes)) > 1:
        refuse("attention", "queries, keys and values must be floats of one dtype", dtypes)
    batch, heads, length, dims = queries
    if keys[0] != batch or keys[3] != dims or keys[1] == 0 or heads % keys[1] or keys[2] == 0:
        refuse("attention", f"keys must be ({batch}, a divisor of {heads}, 1 or more, {dims})", keys)
    if values[:3] != keys[:3]:
        refuse("attention", f"values must be {(*keys[:3], 'value_dims')}", values)
    if causal and keys[2] < length:
        refuse("attention", f"causal attention needs at least length={length} keys", keys[2])
    return Problem("attention", device, dtypes[0], phase_of((batch, length, 1)), (causal,))
