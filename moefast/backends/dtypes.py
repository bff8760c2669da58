"""The dtype of each operation's output: what MLX's promotion gives the reference's formulas.

Dtypes are words (``bfloat16``). Of two different floats MLX makes float32, whichever they are.
"""

from __future__ import annotations

from ..specs import RouterSpec
from ..weights import ExpertLayout, Layout, SharedLayout, dtype_name

# Activations that compute in float32 and round to the dtype of the up projection.
_ROUNDED_TO_UP = ("swiglu_clamped", "situ")


def promoted(*dtypes: str | None) -> str:
    """The common dtype of arrays; None stands for one that is not there."""
    present = {dtype for dtype in dtypes if dtype is not None}
    return present.pop() if len(present) == 1 else "float32"


def product(x: str, layout: Layout) -> str:
    """``x @ w.T + bias``. The scales of the float modes are bytes, and have no say."""
    stored = dtype_name(layout.dtype)
    return promoted(x, None if stored == "uint8" else stored, layout.bias)


def feed_forward(x: str, layout: ExpertLayout) -> str:
    """``down(activation(gate(x), up(x)))``, of one expert or a stack: ``switch_glu``, ``experts``."""
    inner = product(x, layout.up)
    if layout.gate is not None and layout.activation.name not in _ROUNDED_TO_UP:
        inner = promoted(inner, product(x, layout.gate))
    return product(inner, layout.down)


def moe(x: str, layout: ExpertLayout, shared: SharedLayout | None) -> str:
    """The whole block: the routed output keeps the experts' dtype, the shared expert's is added."""
    routed = feed_forward(x, layout)
    if shared is None:
        return routed
    gate = product(x, shared.output_gate) if shared.output_gate is not None else None
    return promoted(routed, feed_forward(x, shared.layout), gate)


def route(logits: str, spec: RouterSpec, selection_bias: str | None, expert_scale: str | None) -> str:
    """The weights of a router."""
    if spec.weight_dtype is not None:
        return logits if spec.weight_dtype == "logits" else spec.weight_dtype
    weights = spec.score_dtype or logits
    if spec.weights_from == "masked" and selection_bias is not None and spec.bias_dtype != "scores":
        weights = promoted(spec.bias_dtype or weights, selection_bias)
    return promoted(weights, expert_scale)
