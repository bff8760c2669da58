"""The result of routing."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx


class Routing(NamedTuple):
    """The experts each token goes to. A tuple of arrays, so it passes through mx.compile and mx.grad.

    Attributes:
        indices: ``[..., top_k]`` uint32; they carry no gradient.
        weights: ``[..., top_k]`` float.
    """

    indices: mx.array
    weights: mx.array
