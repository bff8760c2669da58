"""``cached_attention``: all that an attention layer does between its projections.

For one token that is little arithmetic in many steps (splitting heads, turning queries and keys, two writes
into the cache, two views of it, attention), and on a CPU each step costs more than what it does.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx

from ..backends import registry
from ..errors import refuse
from ..registry import Problem, device_name, phase_of
from ..weights import FLOATS, Form, Shape, form_of
from ._checks import check_type


class Rotation(NamedTuple):
    """The settings of :func:`moefast.ops.rope`: ``dims``, and ``base`` or ``freqs``."""

    dims: int
    traditional: bool = False
    base: float | None = None
    scale: float = 1.0
    freqs: mx.array | None = None


def cached_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache_keys: mx.array,
    cache_values: mx.array,
    *,
    offset: int,
    rotation: Rotation,
    scale: float,
    causal: bool,
    backend: str = "auto",
) -> tuple[mx.array, mx.array, mx.array]:
    """Rotate queries and keys, put keys and values into the cache, attend to all that is in it.

    Args:
        queries: ``[batch, length, heads * dims]`` in float32, float16 or bfloat16.
        keys: ``[batch, length, kv_heads * dims]`` of the same dtype, as all of the following.
        values: ``[batch, length, kv_heads * value_dims]``.
        cache_keys: ``[batch, kv_heads, capacity, dims]``, rotated.
        cache_values: ``[batch, kv_heads, capacity, value_dims]``.
        offset: rows of the cache that are filled; the new ones go behind them, and are at positions
            ``offset``, ``offset + 1``, ...
        rotation: of queries and keys.
        scale: factor on the products.
        causal: query ``i`` sees ``offset + i + 1`` rows of the cache, instead of ``offset + length``.
        backend: a name of :func:`moefast.backends`, or ``"auto"``.

    Returns:
        ``[batch, length, heads * value_dims]``, and ``cache_keys`` and ``cache_values`` with the new rows.

    Raises:
        ValueError: a shape or dtype breaks a rule, the rows do not fit behind ``offset``, or the named
            backend cannot run this.
    """
    arrays = (queries, keys, values, cache_keys, cache_values)
    for array in arrays:
        check_type("cached_attention", "queries, keys, values and caches", array, mx.array)
    problem = _problem(
        tuple(array.shape for array in arrays),
        tuple(array.dtype for array in arrays),
        (rotation.dims, rotation.base is None, form_of(rotation.freqs)),
        causal,
        device_name(),
    )
    if not 0 <= offset <= cache_keys.shape[2] - queries.shape[1]:
        room = cache_keys.shape[2] - queries.shape[1]
        refuse("cached_attention", f"offset must leave room in the cache: 0..{room}", offset)
    run = registry.choose(problem, backend).run
    y, keys, values = run(*arrays, offset, *rotation, scale, causal)
    return y, keys, values


@lru_cache(maxsize=4096)
def _problem(
    shapes: tuple[Shape, ...],
    dtypes: tuple[mx.Dtype, ...],
    rotation: tuple[int, bool, Form],
    causal: bool,
    device: str,
) -> Problem:
    """details: causal."""
    op = "cached_attention"
    if [len(shape) for shape in shapes] != [3, 3, 3, 4, 4]:
        refuse(op, "queries, keys and values must have 3 dimensions, caches 4", shapes)
    if dtypes[0] not in FLOATS or len(set(dtypes)) > 1:
        refuse(op, "queries, keys, values and caches must be floats of one dtype", dtypes)
    queries, keys, values, cache_keys, cache_values = shapes
    batch, length, width = queries
    _, heads, _, dims = cache_keys
    value_dims = cache_values[3]
    if cache_keys[0] != batch or cache_values[:3] != cache_keys[:3] or 0 in (heads, dims, value_dims):
        refuse(op, f"caches must be [{batch}, kv_heads, capacity, dims]", (cache_keys, cache_values))
    if length == 0 or width == 0 or width % (heads * dims):
        refuse(op, f"queries must be [batch, 1 or more, a multiple of {heads * dims}]", queries)
    if keys != (batch, length, heads * dims):
        refuse(op, f"keys must be {(batch, length, heads * dims)}", keys)
    if values != (batch, length, heads * value_dims):
        refuse(op, f"values must be {(batch, length, heads * value_dims)}", values)
    rotated, without_base, freqs = rotation
    if rotated % 2 or not 2 <= rotated <= dims:
        refuse(op, f"rotation.dims must be even and in 2..{dims}", rotated)
    if without_base != (freqs is not None):
        refuse(op, "either base or freqs must be given", rotation)
    if freqs is not None and (freqs[0] != (rotated // 2,) or freqs[1] not in FLOATS):
        refuse(op, f"freqs must be a float array ({rotated // 2},)", freqs)
    return Problem(op, device, dtypes[0], phase_of((batch, length, 1)), (causal,))
