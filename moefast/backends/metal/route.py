"""``route`` in one launch: what ``kernels/route.metal`` is told of a router, and what it does not take."""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import mlx.core as mx

from ...registry import Problem
from ...routing import Routing
from ...specs import RouterSpec
from .launch import Function, Prepared, Template

MOST_EXPERTS = 1024
MOST_CHOSEN = 32
# From so many tokens on, threadgroups have several simdgroups, as far as their memory holds them all. Fewer
# tokens are spread over the GPU's cores. Not measured on a GPU.
MANY_TOKENS = 128
SIMDGROUPS = 4
THREADGROUP_BYTES = 32768

_SCORES = {"softmax": 0, "sigmoid": 1, "sqrtsoftplus": 2}  # Score of kernels/score.h
_NUMBERS = ("softcap", "temperature", "renormalize_eps", "scale")


def why_not(problem: Problem) -> str | None:
    """Why the kernel cannot run a problem of ``route``, or None."""
    spec: Any = problem.details[0]
    if spec.num_experts > MOST_EXPERTS:
        return f"num_experts={spec.num_experts} > {MOST_EXPERTS}"
    if spec.top_k > MOST_CHOSEN:
        return f"top_k={spec.top_k} > {MOST_CHOSEN}"
    for name in _NUMBERS:
        try:
            struct.pack("<f", getattr(spec, name))
        except OverflowError:
            return f"{name}={getattr(spec, name)} is too large for float32"
    return None


def route(
    logits: mx.array,
    spec: RouterSpec,
    selection_bias: mx.array | None,
    expert_scale: mx.array | None,
) -> Routing:
    """The reference's routing, in the order that ``mx.argpartition`` has on a GPU. Arguments are those of
    :func:`moefast.backends.reference.route.route`."""
    return _router(
        spec,
        logits.dtype,
        None if selection_bias is None else selection_bias.dtype,
        None if expert_scale is None else expert_scale.dtype,
        prod(logits.shape[:-1]) >= MANY_TOKENS,
    ).run(logits, spec, selection_bias, expert_scale)


def bind(problem: Problem) -> Callable[..., Routing]:
    """:func:`route` for one problem: nothing is looked up at a call."""
    return router_of(problem).run


def router_of(problem: Problem) -> Router:
    """What runs a problem of ``route``."""
    details: tuple[Any, ...] = problem.details
    spec, bias, scale = details
    return _router(spec, problem.dtype, bias, scale, problem.phase == "prefill")


class Router(NamedTuple):
    """A router of certain dtypes: its function and template arguments, how many simdgroups a threadgroup has,
    and the dtype of the weights."""

    function: Function
    template: Template
    simdgroups: int
    weights: mx.Dtype

    def run(
        self,
        logits: mx.array,
        spec: RouterSpec,
        selection_bias: mx.array | None,
        expert_scale: mx.array | None,
    ) -> Routing:
        shape = (*logits.shape[:-1], spec.top_k)
        tokens = prod(shape[:-1])
        if not tokens:
            return Routing(mx.zeros(shape, mx.uint32), mx.zeros(shape, self.weights))
        rows = logits
        if self.simdgroups > 1:  # the kernel reads how many there are
            rows = logits.reshape(tokens, spec.num_experts)
        arrays = [array for array in (rows, selection_bias, expert_scale) if array is not None]
        outputs = [(shape, mx.uint32), (shape, self.weights)]
        return Routing(*self.function(arrays, outputs=outputs, **self._geometry(tokens)))

    def prepare(self, tokens: int) -> Prepared:
        """A launch for so many tokens, again and again: logits, selection bias and expert scale, as far as
        they are there, to indices and weights."""
        return self.function.prepare(dtypes=[mx.uint32, self.weights], **self._geometry(tokens))

    def _geometry(self, tokens: int) -> dict[str, Any]:
        threads = 32 * self.simdgroups
        return {
            "template": self.template,
            "grid": (-(-tokens // self.simdgroups) * threads, 1, 1),
            "threadgroup": (threads, 1, 1),
        }


class _Steps(NamedTuple):
    """The dtype of each step, in the order of Types in ``kernels/route.metal``."""

    source: mx.Dtype
    addend: mx.Dtype
    key: mx.Dtype
    score: mx.Dtype
    sum: mx.Dtype
    product: mx.Dtype
    out: mx.Dtype


def _steps(logits: mx.Dtype, spec: RouterSpec, bias: mx.Dtype | None, scale: mx.Dtype | None) -> _Steps:
    """What MLX's promotion makes of the reference's formulas."""
    score = logits if spec.score_dtype is None else getattr(mx, spec.score_dtype)
    source = logits if spec.score_over == "selected" else score
    addend = key = source
    if bias is not None and spec.bias_dtype != "scores":
        addend = source if spec.bias_dtype is None else getattr(mx, spec.bias_dtype)
        key = _promoted(addend, bias)
    total = key if spec.weights_from == "masked" else score
    product = total if scale is None else _promoted(total, scale)
    out = product
    if spec.weight_dtype is not None:
        out = logits if spec.weight_dtype == "logits" else getattr(mx, spec.weight_dtype)
    return _Steps(source, addend, key, score, total, product, out)


def _promoted(a: mx.Dtype, b: mx.Dtype) -> mx.Dtype:
    return a if a == b else mx.float32


@lru_cache(maxsize=1024)
def _router(
    spec: RouterSpec, logits: mx.Dtype, bias: mx.Dtype | None, scale: mx.Dtype | None, many: bool
) -> Router:
    steps = _steps(logits, spec, bias, scale)
    words = _scratch_words(spec, bias is not None)
    simdgroups = 1
    while many and simdgroups < SIMDGROUPS and 2 * simdgroups * words * 4 <= THREADGROUP_BYTES:
        simdgroups *= 2
    vectors = [name for name, there in (("selection_bias", bias), ("expert_scale", scale)) if there]
    function = Function(
        name="route",
        file="route.metal",
        inputs=("logits", *vectors),
        outputs=("indices", "weights"),
        body=_body(spec, bias is not None, scale is not None, simdgroups, words),
    )
    names = ("SOURCE", "ADDEND", "KEY", "SCORE", "SUM", "PRODUCT", "OUT")
    template = [(f"{name}_T", dtype) for name, dtype in zip(names, steps, strict=True)]
    return Router(function, [*template, *_template(spec, bias is not None)], simdgroups, steps.out)


def _scratch_words(spec: RouterSpec, biased: bool) -> int:
    """scratch_words of ``kernels/route.metal``."""
    groups = spec.num_experts + spec.num_groups if spec.drops_groups else 0
    keyed = spec.weights_from == "masked" or not (biased or spec.drops_groups)
    return groups + (0 if keyed else spec.num_experts) + 1


def _template(spec: RouterSpec, biased: bool) -> list[tuple[str, bool | int]]:
    return [
        ("EXPERTS", spec.num_experts),
        ("K", spec.top_k),
        ("HIGHEST", spec.ties == "highest"),
        ("BIASED", biased),
        ("SOFTCAP", spec.softcap > 0),
        ("TEMPERATURE", spec.temperature != 1.0),
        ("SCORE", _SCORES[spec.score]),
        ("SELECTED", spec.score_over == "selected"),
        ("PRECISE", spec.precise),
        ("GROUPS", spec.num_groups),
        ("KEPT", spec.top_groups),
        ("TWO", spec.group_score == "top2_sum"),
        ("ZERO", spec.dropped_fill == "zero"),
        ("MASKED", spec.weights_from == "masked"),
        ("RENORMALIZE", spec.renormalize),
        ("EPSILON", spec.renormalize_eps != 0),
        ("MAXIMUM", spec.eps_form == "max"),
        ("SCALE", spec.scale != 1.0 and spec.scale_place == "weights"),
    ]


def _body(spec: RouterSpec, biased: bool, scaled: bool, simdgroups: int, words: int) -> str:
    token = "threadgroup_position_in_grid.x"
    rest = ""
    if simdgroups > 1:
        token = f"{token} * {simdgroups} + simdgroup_index_in_threadgroup"
        rest = "if (token >= size_t(logits_shape[0])) return;"
    own = f"simdgroup_index_in_threadgroup * {words}" if simdgroups > 1 else "0"
    numbers = ", ".join(_literal(getattr(spec, name)) for name in _NUMBERS)
    bias = "selection_bias" if biased else "Absent{}"
    scale = "expert_scale" if scaled else "Absent{}"
    return f"""
using namespace moefast::router;
using Spec = Router<EXPERTS, K, HIGHEST, BIASED,
    Scoring<SOFTCAP, TEMPERATURE, SCORE, SELECTED, PRECISE>,
    Groups<GROUPS, KEPT, TWO, ZERO>,
    Weighing<MASKED, RENORMALIZE, EPSILON, MAXIMUM, SCALE>>;
using Steps = Types<SOURCE_T, ADDEND_T, KEY_T, SCORE_T, SUM_T, PRODUCT_T, OUT_T>;
threadgroup uint scratch[{simdgroups * words}];
size_t token = {token};
{rest}
route<Spec, Steps>(logits + token * EXPERTS, {bias}, {scale}, indices + token * K, weights + token * K,
    scratch + {own}, Numbers{{{numbers}}}, thread_index_in_simdgroup);
"""


def _literal(value: float) -> str:
    """The nearest float32: nine digits say which."""
    (rounded,) = struct.unpack("<f", struct.pack("<f", value))
    text = f"{rounded:.9g}"
    return f"{text}f" if "." in text or "e" in text else f"{text}.0f"
