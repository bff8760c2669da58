"""What an operation is told besides arrays: frozen, hashable, validated at construction.

``eval(repr(spec)) == spec`` holds for every spec (dtypes are strings and infinities are words), so a
failing test can print its spec and a developer can paste it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

from .errors import refuse

FloatDtype = Literal["float32", "float16", "bfloat16"]
FLOAT_DTYPES: tuple[str, ...] = ("float32", "float16", "bfloat16")

_AFFINE_BITS = (2, 3, 4, 5, 6, 8)
_AFFINE_GROUPS = (32, 64, 128)
# The floating-point modes of MLX fix both numbers (Open Compute Project MX v1.0; NVIDIA NVFP4).
_FP_MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
# (bits, group_size) that MLX takes where it is given neither.
MODE_DEFAULTS = {"affine": (4, 64), **_FP_MODES}


def _one_of(spec: str, field: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        refuse(spec, f"{field} must be one of {allowed}", repr(value))


def _finite(spec: str, field: str, value: object, *, positive: bool = False) -> None:
    # The very types: NumPy's floats derive from float, and their repr cannot be evaluated back.
    known = type(value) is int or (type(value) is float and math.isfinite(value))
    if not known or (positive and value <= 0):  # type: ignore[operator]
        refuse(spec, f"{field} must be finite{' and above 0' if positive else ''}", repr(value))


def _flag(spec: str, field: str, value: object) -> None:
    if not isinstance(value, bool):
        refuse(spec, f"{field} must be True or False", repr(value))


def _whole(spec: str, field: str, value: object, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        refuse(spec, f"{field} must be a whole number of at least {low}", repr(value))


class _Spec:
    """Prints only what differs from the defaults; the result can be evaluated back."""

    def __repr__(self) -> str:
        shown = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)  # type: ignore[arg-type]
            if getattr(self, f.name) != f.default
        ]
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclass(frozen=True, kw_only=True, repr=False)
class QuantSpec(_Spec):
    """How a quantized weight is packed: MLX's ``mx.quantize`` layouts.

    ``affine``: ``w = scale * q + bias`` with one scale and bias per ``group_size`` values.
    ``mxfp4``, ``mxfp8``: OCP Microscaling, groups of 32 with a power-of-two scale.
    ``nvfp4``: groups of 16 with an e4m3 scale and an optional float32 scale per tensor.
    """

    bits: int = 4
    group_size: int = 64
    mode: str = "affine"

    def __post_init__(self) -> None:
        _one_of("QuantSpec", "mode", self.mode, ("affine", *_FP_MODES))
        for field in ("bits", "group_size"):
            _whole("QuantSpec", field, getattr(self, field), 1)
        if self.mode == "affine":
            _one_of("QuantSpec", "bits", self.bits, _AFFINE_BITS)
            _one_of("QuantSpec", "group_size", self.group_size, _AFFINE_GROUPS)
        elif (self.bits, self.group_size) != _FP_MODES[self.mode]:
            bits, group_size = _FP_MODES[self.mode]
            refuse(
                "QuantSpec",
                f"mode {self.mode!r} needs bits={bits} and group_size={group_size}",
                f"bits={self.bits} and group_size={self.group_size}",
            )

    def mlx_arguments(self) -> dict[str, Any]:
        """The keyword arguments MLX's quantized operations take."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}


# name -> (has a gate projection, the parameters it reads)
_ACTIVATIONS: dict[str, tuple[bool, tuple[str, ...]]] = {
    "swiglu": (True, ()),
    "swiglu_oai": (True, ("alpha", "limit")),
    "swiglu_clipped": (True, ("limit",)),
    "swiglu_clamped": (True, ("limit",)),
    "geglu_tanh": (True, ()),
    "situ": (True, ("beta", "linear_beta")),
    "gelu_tanh": (False, ()),
    "relu2": (False, ()),
}


@dataclass(frozen=True, kw_only=True, repr=False)
class Activation(_Spec):
    """What happens between the up (and gate) projection and the down projection.

    ====================  =====================================================================
    name                  value (``g`` gate, ``u`` up), and who uses it
    ====================  =====================================================================
    ``swiglu``            ``silu(g) * u`` (Shazeer 2020): most families
    ``swiglu_oai``        ``(u + 1) * g * sigmoid(alpha * g)``, ``g`` capped at ``limit`` and ``u``
                          clipped to ``+-limit`` first: gpt-oss, MiniMax-M3
    ``swiglu_clipped``    ``min(silu(g), limit) * clip(u, +-limit)``: Step-3.5
    ``swiglu_clamped``    float32 ``silu(min(g, limit)) * clip(u, +-limit)``: DeepSeek-V4.1
    ``geglu_tanh``        ``gelu_tanh(g) * u``: Gemma 4
    ``situ``              float32 ``beta tanh(g / beta) sigmoid(g) * u``, ``u`` through
                          ``linear_beta tanh(u / linear_beta)`` where that is set: Kimi K3
    ``gelu_tanh``         ``gelu_tanh(u)``, no gate: Phixtral
    ``relu2``             ``max(u, 0) ** 2``, no gate: Nemotron-H
    ====================  =====================================================================
    """

    name: str = "swiglu"
    alpha: float = 1.702
    limit: float = 7.0
    beta: float = 1.0
    linear_beta: float | None = None

    def __post_init__(self) -> None:
        _one_of("Activation", "name", self.name, tuple(_ACTIVATIONS))
        for field in ("alpha", "limit", "beta"):
            _finite("Activation", field, getattr(self, field), positive=True)
        if self.linear_beta is not None:
            _finite("Activation", "linear_beta", self.linear_beta, positive=True)

    @property
    def gated(self) -> bool:
        """Whether the experts have a gate projection."""
        return _ACTIVATIONS[self.name][0]

    def parameters(self) -> dict[str, float | None]:
        """The numbers this activation reads, by name."""
        return {name: getattr(self, name) for name in _ACTIVATIONS[self.name][1]}


@dataclass(frozen=True, kw_only=True, repr=False)
class RouterSpec(_Spec):
    """How router logits become the experts of a token and their weights.

    The fields stand in the order in which they act; :func:`moefast.route` explains the steps.

    Attributes:
        num_experts: logits per token.
        top_k: experts chosen per token, ``1..num_experts``.
        softcap: if not 0, ``softcap * tanh(logits / softcap)`` first (Laguna).
        temperature: logits are divided by it (DeepSeek-V4.1).
        score: ``softmax``, ``sigmoid`` or ``sqrtsoftplus`` (``sqrt(log(1 + exp(x)))``).
        score_over: ``all`` experts are scored, then chosen; or the top logits are chosen and only the
            ``selected`` ones are scored (Mixtral, Granite, gpt-oss).
        score_dtype: dtype the logits are cast to for scoring; ``None`` keeps theirs.
        precise: softmax accumulates in float32 whatever the dtype. In bfloat16 it matters: the plain
            softmax gives another value for about two thirds of the entries.
        bias_dtype: dtype the scores are cast to before the selection bias is added; ``"scores"`` casts
            the bias to the scores' dtype instead (Kimi Linear); ``None`` lets MLX promote.
        num_groups: experts are split into this many equal groups; 1 means no groups.
        top_groups: groups whose experts stay in the race.
        group_score: a group's score: ``top2_sum`` of its two best keys, or its ``max``.
        dropped_fill: what the keys of dropped groups become: ``"zero"``, what most families trained
            with, or ``"-inf"``. They differ when a kept key is negative: 0 then wins over it.
        ties: of equal keys at the cut the ``lowest`` or the ``highest`` index wins. It names mlx-lm's two
            idioms, ``argpartition(-key)[:k]`` and ``argpartition(key)[-k:]``.
        weights_from: weights are gathered from the unbiased ``scores``, or from the ``masked`` keys, in
            which dropped groups hold the fill, which must then be zero (DeepSeek-V2).
        renormalize: divide a token's weights by their sum.
        renormalize_eps: guards that division; see ``eps_form``.
        eps_form: ``add``: ``sum + eps``; ``max``: ``max(sum, eps)`` (ERNIE 4.5).
        scale: factor on the weights (``routed_scaling_factor``).
        scale_place: on the ``weights``, or on the combined ``output`` of the experts (Laguna; applied by
            :func:`moefast.moe`).
        weight_dtype: dtype of the returned weights: ``None`` as computed, ``"logits"`` that of the
            logits, or a dtype.
        identity_experts: the last so many of ``num_experts`` have no weights and return their input
            (LongCat-Flash; applied by :func:`moefast.moe`).
    """

    num_experts: int
    top_k: int
    softcap: float = 0.0
    temperature: float = 1.0
    score: str = "softmax"
    score_over: str = "all"
    score_dtype: str | None = None
    precise: bool = True
    bias_dtype: str | None = None
    num_groups: int = 1
    top_groups: int = 1
    group_score: str = "top2_sum"
    dropped_fill: str = "zero"
    ties: str = "lowest"
    weights_from: str = "scores"
    renormalize: bool = False
    renormalize_eps: float = 0.0
    eps_form: str = "add"
    scale: float = 1.0
    scale_place: str = "weights"
    weight_dtype: str | None = None
    identity_experts: int = 0

    def __post_init__(self) -> None:
        name = "RouterSpec"
        _whole(name, "num_experts", self.num_experts, 1)
        _whole(name, "top_k", self.top_k, 1)
        if self.top_k > self.num_experts:
            refuse(name, f"top_k must be in 1..{self.num_experts}", self.top_k)
        _one_of(name, "score", self.score, ("softmax", "sigmoid", "sqrtsoftplus"))
        _one_of(name, "score_over", self.score_over, ("all", "selected"))
        _one_of(name, "score_dtype", self.score_dtype, (None, *FLOAT_DTYPES))
        _one_of(name, "bias_dtype", self.bias_dtype, (None, "scores", *FLOAT_DTYPES))
        _one_of(name, "group_score", self.group_score, ("top2_sum", "max"))
        _one_of(name, "dropped_fill", self.dropped_fill, ("zero", "-inf"))
        _one_of(name, "ties", self.ties, ("lowest", "highest"))
        _one_of(name, "weights_from", self.weights_from, ("scores", "masked"))
        _one_of(name, "eps_form", self.eps_form, ("add", "max"))
        _one_of(name, "scale_place", self.scale_place, ("weights", "output"))
        _one_of(name, "weight_dtype", self.weight_dtype, (None, "logits", *FLOAT_DTYPES))
        for field in ("precise", "renormalize"):
            _flag(name, field, getattr(self, field))
        _finite(name, "temperature", self.temperature, positive=True)
        _finite(name, "scale", self.scale)
        for field in ("softcap", "renormalize_eps"):
            value = getattr(self, field)
            _finite(name, field, value)
            if value < 0:
                refuse(name, f"{field} must not be negative", value)
        self._check_groups()
        _whole(name, "identity_experts", self.identity_experts, 0)
        if self.identity_experts >= self.num_experts:
            refuse(
                name, f"identity_experts must be below num_experts={self.num_experts}", self.identity_experts
            )

    def _check_groups(self) -> None:
        name = "RouterSpec"
        if self.weights_from == "masked":
            if self.dropped_fill != "zero":
                refuse(name, "weights_from='masked' needs dropped_fill='zero'", repr(self.dropped_fill))
            if self.score_over != "all":
                refuse(name, "weights_from='masked' needs score_over='all'", repr(self.score_over))
        _whole(name, "num_groups", self.num_groups, 1)
        _whole(name, "top_groups", self.top_groups, 1)
        if self.top_groups > self.num_groups:
            refuse(name, f"top_groups must be in 1..num_groups={self.num_groups}", self.top_groups)
        if self.num_experts % self.num_groups:
            refuse(name, f"num_groups must divide num_experts={self.num_experts}", self.num_groups)
        if self.drops_groups:
            if self.score_over == "selected":
                refuse(name, "groups need score_over='all'", repr(self.score_over))
            if self.group_score == "top2_sum" and self.num_experts // self.num_groups < 2:
                refuse(name, "group_score='top2_sum' needs two experts per group", self.num_experts)

    @property
    def drops_groups(self) -> bool:
        """Whether any group is ever left out."""
        return self.top_groups < self.num_groups
