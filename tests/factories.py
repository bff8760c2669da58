"""Types of the factory fixtures in conftest.py."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from moefast import ExpertWeights, Projection, SharedExpert

Floats = Callable[..., mx.array]
MakeProjection = Callable[..., Projection]
MakeExperts = Callable[..., ExpertWeights]
MakeShared = Callable[..., SharedExpert]
