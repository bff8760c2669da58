"""moefast: Mixture-of-Experts layers for MLX, with interchangeable backends.

    routing = moefast.route(logits, spec)             # which experts, with what weight
    y = moefast.experts(x, weights, routing)          # their weighted sum
    y = moefast.moe(x, logits, spec, weights)         # both, fused where a backend can

Every operation takes ``backend="auto"``; see :func:`use_backend` and :func:`backends`. The layers built on
them are in :mod:`moefast.nn`, the models in :mod:`moefast.models`.

    moefast.accelerate(model)                         # the MoE layers of a model that mlx-lm loaded
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

try:
    import mlx.core  # noqa: F401
except ImportError as error:
    if "libmlx" not in str(error):
        raise
    raise ImportError(
        "MLX has no backend here (libmlx is missing). On Linux: pip install 'mlx[cpu]', or the extra cpu."
    ) from error

from . import nn
from .acceleration import accelerate, accelerated, restore
from .backends import backends, use_backend
from .ops import experts, moe, quantized_matmul, route, switch_glu
from .pages import huge_pages
from .routing import Routing
from .specs import Activation, QuantSpec, RouterSpec
from .weights import ExpertWeights, Projection, SharedExpert

if TYPE_CHECKING:
    from .lm import load

try:
    __version__ = version("moefast")
except PackageNotFoundError:  # a checkout on sys.path without an install
    __version__ = "0+unknown"

__all__ = [
    "Activation",
    "ExpertWeights",
    "Projection",
    "QuantSpec",
    "RouterSpec",
    "Routing",
    "SharedExpert",
    "__version__",
    "accelerate",
    "accelerated",
    "backends",
    "experts",
    "huge_pages",
    "load",
    "moe",
    "nn",
    "quantized_matmul",
    "restore",
    "route",
    "switch_glu",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    # load needs mlx-lm (the "lm" extra); everything above does not.
    if name == "load":
        from .lm import load

        return load
    raise AttributeError(f"module 'moefast' has no attribute {name!r}")
