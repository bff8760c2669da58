"""``rope``: rotary positions, so that a backend may run them.

No MoE operation; but MLX's CPU puts it together out of some fifteen small ones, for queries and for keys, and
where experts are fast, those take a sixth of a decoded token's time.
"""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx

from ..backends import registry
from ..errors import refuse
from ..registry import Problem, device_name, phase_of
from ..weights import FLOATS, Form, Shape, form_of
from ._checks import check_type


def rope(
    x: mx.array,
    dims: int,
    *,
    offset: int | mx.array,
    base: float | None = None,
    freqs: mx.array | None = None,
    scale: float = 1.0,
    traditional: bool = False,
    backend: str = "auto",
) -> mx.array:
    """Turn pairs of values by an angle that grows with the position (Su et al., arXiv:2104.09864).

    Pair ``i`` of the row at position ``p`` turns by ``scale * p / freqs[i]``.

    Args:
        x: ``[batch, heads, length, head_dim]`` in float32, float16 or bfloat16.
        dims: the first so many values of each row turn; even.
        offset: position of the first row, or integers ``[batch]``.
        base: stands for ``freqs[i] = base ** (2 i / dims)``.
        freqs: ``[dims / 2]`` floats, instead of ``base``.
        scale: factor on the positions.
        traditional: pairs are neighbours, values ``2 i`` and ``2 i + 1``, instead of ``i`` and
            ``dims / 2 + i``.
        backend: a name of :func:`moefast.backends`, or ``"auto"``.

    Returns:
        The shape and dtype of ``x``.

    Raises:
        ValueError: a shape or dtype breaks a rule, or the named backend cannot run this.
    """
    check_type("rope", "x", x, mx.array)
    offsets = form_of(offset) if isinstance(offset, mx.array) else None
    if (base is None) == (freqs is None):
        refuse("rope", "either base or freqs must be given", (base, freqs))
    problem = _problem(x.shape, x.dtype, dims, offsets, form_of(freqs), device_name())
    y: mx.array = registry.choose(problem, backend).run(x, dims, traditional, base, scale, offset, freqs)
    return y


@lru_cache(maxsize=4096)
def _problem(shape: Shape, dtype: mx.Dtype, dims: int, offsets: Form, freqs: Form, device: str) -> Problem:
    """details: none."""
    if len(shape) != 4 or dtype not in FLOATS:
        refuse("rope", "x must be a float array [batch, heads, length, head_dim]", (shape, dtype))
    if dims % 2 or not 2 <= dims <= shape[3]:
        refuse("rope", f"dims must be even and in 2..{shape[3]}", dims)
    if offsets is not None:
        allowed = ((), (1,), (shape[0],))
        if offsets[0] not in allowed or not mx.issubdtype(offsets[1], mx.integer):
            refuse("rope", f"offset must be an integer or ({shape[0]},) of them", offsets)
    if freqs is not None and (freqs[0] != (dims // 2,) or freqs[1] not in FLOATS):
        refuse("rope", f"freqs must be a float array ({dims // 2},)", freqs)
    return Problem("rope", device, dtype, phase_of((shape[0], shape[2], 1)), ())
