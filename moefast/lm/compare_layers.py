"""A layer as mlx-lm computes it against the same layer accelerated, on the same input.

A layer here is what :func:`moefast.accelerate` has taken over: a whole MoE block, or experts or a router on
their own. Each phase (decode, band, prefill) may be run by another kernel, so each is asked: the rows that
the layer saw in the plain model go in one by one, as a band, and repeated up to the length of a prefill.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn
import numpy as np
import numpy.typing as npt

from .. import ops
from ..acceleration import Entry, apart, dbrx
from ..acceleration.block import stack_size
from ..acceleration.known import PACKAGE
from ..acceleration.routing import part, router_logits, router_spec, selection_bias
from ..backends.reference.route import _source_and_key, route
from ..families import BLOCKS, Block
from ..nn.projection import projection_of
from ..registry import PHASES
from ..specs import RouterSpec
from ..testing import Bound, Error, bound, bound_of_two, error, float64, routing_bound
from ..weights import dtype_name
from .recording import recorded

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_ROWS = {f"{row.module}.{row.name}": row for row in (*BLOCKS, dbrx.ROW)}

# Tokens of a call in each phase, given the rows that there are.
_BAND, _PREFILL = PHASES["band"], PHASES["prefill"]


class Routed(NamedTuple):
    """Who was chosen in the plain model, and by how much.

    Attributes:
        indices: ``[rows, top_k]``, sorted; identity experts count as expert 0, as they do in mlx-lm.
        keys: ``[rows, num_experts]`` what they were chosen by, before groups are dropped.
        size: ``[rows]`` what errors of the keys are relative to.
        logits: ``[rows]`` the largest magnitude of the router's logits.
        group_gap: ``[rows]`` between the scores of the last group that stays and the first that does not.
        spec: of the router.
        seen: False where the indices were computed from the block's own logits: the block keeps its own.
    """

    indices: Ints
    keys: npt.NDArray[np.float64]
    size: npt.NDArray[np.float64]
    logits: npt.NDArray[np.float64]
    group_gap: npt.NDArray[np.float64]
    spec: RouterSpec
    seen: bool = True


@dataclass
class Layer:
    """A layer and what it was given in the plain model.

    Attributes:
        entry: of the report.
        module: before or after acceleration.
        rows: its arguments, each ``[rows, ...]``.
        answer: of the plain layer, ``[rows, ...]`` float64.
        routed: None for experts on their own.
        reductions: lengths of its dot products.
        problem: why it cannot be compared.
    """

    entry: Entry
    module: Any
    rows: list[mx.array] = field(default_factory=list)
    answer: Any = None
    routed: Routed | None = None
    reductions: tuple[int, ...] = ()
    problem: str | None = None

    @property
    def row(self) -> Block | None:
        """What is known of its class; None for all but blocks."""
        if self.entry.what != "block":
            return None
        kind = type(self.module)
        return _ROWS[f"{kind.__module__.removeprefix(PACKAGE + '.')}.{kind.__qualname__}"]


@dataclass(frozen=True, kw_only=True)
class Figures:
    """How one layer compares.

    Attributes:
        path, kind, what, backends: see :class:`moefast.acceleration.Entry`.
        errors: phase -> error of the output where the same experts were chosen.
        limit: on these.
        alike, routed: tokens with the same experts, of how many; of all phases.
        ties: tokens with others, where the plain router's keys are too close to tell.
        remark: on the comparison.
        problem: what is wrong, or why nothing could be compared.
        first: where it begins: phase, and the token's number among the tokens of the run.
        passed: None where nothing could be compared.
    """

    path: str
    kind: str
    what: str
    backends: dict[str, str]
    errors: dict[str, Error] = field(default_factory=dict)
    limit: Bound | None = None
    alike: int = 0
    routed: int = 0
    ties: int = 0
    remark: str | None = None
    problem: str | None = None
    first: tuple[str, int] | None = None
    passed: bool | None = None


def keep_input(layer: Layer, calls: list[Any], rounded: mx.Dtype) -> None:
    """Give a layer what it was called with; numbers are rounded to the dtype it will be run in, too."""
    columns = list(zip(*(call.arguments for call in calls), strict=True))
    try:
        layer.rows = [mx.concatenate([_flat(a, rounded) for a in column]) for column in columns]
    except (AttributeError, TypeError, ValueError) as found:
        layer.problem = f"its arguments are not rows: {found}"
        return
    if not layer.rows:
        layer.problem = "it was not called"
    elif len({len(a) for a in layer.rows}) > 1:
        layer.problem = f"its arguments differ in length: {[a.shape for a in layer.rows]}"
    mx.eval(layer.rows)


def _flat(array: mx.array, rounded: mx.Dtype) -> mx.array:
    array = mx.flatten(array, 0, -2)
    return array.astype(rounded).astype(array.dtype) if mx.issubdtype(array.dtype, mx.floating) else array


def run_plain(layer: Layer) -> None:
    """What the layer answers before it is accelerated, on the rows it has been given."""
    if layer.problem is not None:
        return
    row = layer.row
    experts = None if row is None else part(layer.module, row.experts)
    heard = [experts] if isinstance(experts, mlx.nn.Module) else []
    with recorded(heard) as calls:
        answer = layer.module(*(a[None] for a in layer.rows))
    if layer.entry.what == "router":
        indices, weights = answer
        layer.routed = _router_apart(layer, indices)
        answer = mx.take_along_axis(weights, mx.argsort(indices, axis=-1), axis=-1)
    layer.answer = float64(answer[0])
    if row is not None:
        seen = calls[0][0].arguments[1] if heard and len(calls[0]) == 1 else None
        layer.routed = _routed(row, layer, seen)
    layer.reductions = _reductions(layer, experts)


def _routed(row: Block, layer: Layer, seen: mx.array | None) -> Routed:
    block, x = layer.module, layer.rows[0]
    spec = _spec(row, block, x)
    logits = router_logits(row, block, x[None])[0]
    bias = selection_bias(row, block)
    _, key = _source_and_key(logits, replace(spec, num_groups=1, top_groups=1), bias)
    size = mx.abs(key).max(axis=-1)
    if bias is not None:
        size = size + mx.abs(bias).max()
    indices = route(logits, spec, bias, None).indices if seen is None else seen
    return Routed(
        _sets(mx.flatten(indices, 0, -2), spec),
        float64(key),
        float64(size),
        float64(mx.abs(logits).max(axis=-1)),
        _group_gap(float64(key), spec),
        spec,
        seen is not None,
    )


def _group_gap(keys: npt.NDArray[np.float64], spec: RouterSpec) -> npt.NDArray[np.float64]:
    if not spec.drops_groups:
        return np.full(len(keys), np.inf)
    grouped = np.sort(keys.reshape(len(keys), spec.num_groups, -1), axis=-1)
    best = 2 if spec.group_score == "top2_sum" else 1
    scores = np.sort(grouped[..., -best:].sum(axis=-1), axis=-1)
    gap: npt.NDArray[np.float64] = scores[:, -spec.top_groups] - scores[:, -spec.top_groups - 1]
    return gap


def _router_apart(layer: Layer, indices: mx.array) -> Routed:
    router, x = layer.module, layer.rows[0]
    logits = router.proj(mx.fast.rms_norm(x, router.scale * router._root_size, router.eps))
    size = float64(mx.abs(logits).max(axis=-1))
    spec = apart.apart_spec(router)
    no_groups = np.full(len(size), np.inf)
    return Routed(_sets(indices[0], spec), float64(logits), size, size, no_groups, spec)


def _spec(row: Block, block: Any, x: mx.array) -> RouterSpec:
    experts = part(block, row.experts)
    count = len(block.experts) if experts is None else stack_size(experts)
    return router_spec(row, block, count, dtype_name(x.dtype))


def _sets(indices: mx.array, spec: RouterSpec) -> Ints:
    chosen = np.asarray(indices).astype(np.int64)
    chosen = np.where(chosen < spec.num_experts - spec.identity_experts, chosen, 0)
    return np.sort(chosen, axis=-1)


def _reductions(layer: Layer, experts: Any) -> tuple[int, ...]:
    """Hidden size and width of the experts, as far as they can be read."""
    hidden = int(layer.rows[0].shape[-1])
    if layer.entry.what == "router":
        return (hidden,)
    stacks = layer.module if experts is None else experts
    stacks = getattr(stacks, "switch_glu", stacks)
    down = next((stacks[name] for name in ("down_proj", "fc2") if name in stacks), None)
    found = None if down is None else projection_of(getattr(down, "linear", down))
    return (hidden, hidden if found is None else found.layout.in_dims)


def compare(layer: Layer, dtype: mx.Dtype, plain_dtype: mx.Dtype) -> Figures:
    """The layer as it is now, accelerated, against what it answered before.

    Args:
        layer: has its plain answer.
        dtype: of the accelerated model.
        plain_dtype: of the plain one.
    """
    entry = layer.entry
    found = Figures(path=entry.path, kind=entry.kind, what=entry.what, backends=entry.backends)
    if layer.problem is not None:
        return replace(found, problem=f"not compared: {layer.problem}")
    limit = _limit(layer, dtype, plain_dtype)
    errors: dict[str, Error] = {}
    alike = routed = ties = 0
    first: tuple[str, int] | None = None
    problem = None
    for phase, which in _phases(len(layer.rows[0])):
        try:
            answer, indices = _run(layer, phase, which, dtype)
        except Exception as raised:  # whatever a broken kernel raises is a finding
            first = first or (phase, 0)
            problem = problem or f"{phase}: {type(raised).__name__}: {' '.join(str(raised).split())}"
            errors[phase] = Error(float("inf"), float("inf"))
            continue
        same = np.ones(len(which), dtype=bool)
        if indices is not None and layer.routed is not None:
            same = (indices == layer.routed.indices[which]).all(axis=-1)
            tied = ~same & _too_close(layer.routed, indices, which, dtype, layer.reductions[0])
            alike, routed, ties = alike + int(same.sum()), routed + len(same), ties + int(tied.sum())
            wrong = np.flatnonzero(~same & ~tied)
            if len(wrong):
                first = first or (phase, int(which[wrong[0]]))
                problem = problem or f"{phase}: other experts for {len(wrong)} of {len(same)} tokens"
        want = layer.answer[which]
        errors[phase] = error(answer[same], want[same])
        if not limit.admits(errors[phase]):
            bad = (int(which[i]) for i in np.flatnonzero(same) if not limit.admits(error(answer[i], want[i])))
            first = first or (phase, next(bad, 0))
            problem = problem or f"{phase}: {beyond(errors[phase], limit)}"
    remark = None if layer.routed is None or layer.routed.seen else "plain routing from the block's logits"
    return replace(
        found,
        errors=errors,
        limit=limit,
        alike=alike,
        routed=routed,
        ties=ties,
        remark=remark,
        problem=problem,
        first=first,
        passed=problem is None,
    )


def _phases(rows: int) -> Iterator[tuple[str, Ints]]:
    """Which rows a layer is given in each phase."""
    yield "decode", np.arange(rows)
    yield "band", np.arange(min(max(rows, _BAND[0]), _BAND[1])) % rows
    yield "prefill", np.arange(max(rows, _PREFILL[0])) % rows


def _run(layer: Layer, phase: str, which: Ints, dtype: mx.Dtype) -> tuple[Any, Ints | None]:
    """Answer and sorted indices, both ``[rows, ...]``, the latter None where the layer chooses none."""
    rows = [a[mx.array(which)] for a in layer.rows]
    rows = [a.astype(dtype) if mx.issubdtype(a.dtype, mx.floating) else a for a in rows]
    calls = [[a[i : i + 1][None] for a in rows] for i in range(len(which))]
    if phase != "decode":
        calls = [[a[None] for a in rows]]
    answers = [layer.module(*call) for call in calls]
    chosen: list[mx.array] = []
    if layer.entry.what == "router":
        chosen = [indices for indices, _ in answers]
        answers = [weights for _, weights in answers]
    elif layer.row is not None:
        chosen = [_chosen(layer, layer.row, x) for (x,) in calls]
    mx.eval(answers, chosen)
    answer = float64(mx.concatenate(answers, axis=1)[0])
    if not chosen or layer.routed is None:
        return answer, None
    indices = mx.concatenate(chosen, axis=1)[0]
    if layer.entry.what == "router":  # weights in the order of the sorted indices
        answer = np.take_along_axis(answer, np.argsort(np.asarray(indices), axis=-1), axis=-1)
    return answer, _sets(indices, layer.routed.spec)


def _chosen(layer: Layer, row: Block, x: mx.array) -> mx.array:
    block = layer.module
    routing = ops.route(
        router_logits(row, block, x),
        _spec(row, block, x),
        selection_bias=selection_bias(row, block),
        backend=block._moefast_backend,
    )
    return routing.indices


def _limit(layer: Layer, dtype: mx.Dtype, plain_dtype: mx.Dtype) -> Bound:
    """Both err: the sum of what each may."""
    what, routed = layer.entry.what, layer.routed
    logits = 0.0 if routed is None else float(routed.logits.max())
    if what == "router":
        assert routed is not None
        weights = [_of_keys(routed.spec, d, layer.reductions[0]) for d in (dtype, plain_dtype)]
        largest = sum(limit * max(logits, 1.0) for limit in weights)
        return Bound(max=largest, rms=largest)
    op = {"block": "moe", "experts": "experts" if len(layer.rows) > 2 else "switch_glu"}[what]
    top_k = 1 if routed is None else routed.indices.shape[-1]
    if op == "experts":
        top_k = layer.rows[1].shape[-1]
    return bound_of_two(
        *(bound(d, op, reductions=layer.reductions, top_k=top_k, logits=logits) for d in (dtype, plain_dtype))
    )


def _of_keys(spec: RouterSpec, dtype: mx.Dtype, hidden: int) -> float:
    """Relative error of the router's logits and of what is made of them."""
    return routing_bound(spec, dtype).gap + bound(dtype, "quantized_matmul", reductions=(hidden,)).max


def _allowed(routed: Routed, share: float) -> npt.NDArray[np.float64]:
    """By how much the difference of two keys may be wrong, ``[rows]``, where ``share`` is the relative error
    of logits and scores. An error of a logit is absolute: in a score it is relative, times their size."""
    scale = 1.0 if routed.spec.score_over == "selected" else np.maximum(routed.logits, 1.0)
    allowed: npt.NDArray[np.float64] = 2 * share * scale * routed.size
    return allowed


def _too_close(routed: Routed, indices: Ints, which: Ints, dtype: mx.Dtype, hidden: int) -> Bools:
    """Rows whose other experts have keys that are no further from those of the plain router's choice than
    keys may be wrong; or whose groups have (a group's score is the sum of up to two keys)."""
    allowed = _allowed(routed, _of_keys(routed.spec, dtype, hidden))[which]
    tied = routed.group_gap[which] <= 2 * allowed
    for i in np.flatnonzero(~tied):
        mine, theirs = set(indices[i].tolist()), set(routed.indices[which[i]].tolist())
        keys = routed.keys[which[i]]
        gaps = [abs(keys[a] - keys[b]) for a in mine - theirs for b in theirs - mine]
        tied[i] = bool(gaps) and max(gaps) <= allowed[i]
    return tied


def close_calls(layer: Layer, dtype: mx.Dtype, slack: float) -> Bools:
    """Rows at whose cut the plain router's keys are so close that input which differs by ``slack``, relative
    to its size, may change an expert."""
    routed = layer.routed
    if routed is None:
        return np.zeros(0, dtype=bool)
    allowed = _allowed(routed, _of_keys(routed.spec, dtype, layer.reductions[0]) + slack)
    close: Bools = routed.group_gap <= 2 * allowed
    k = routed.spec.top_k
    if k < routed.keys.shape[-1]:
        ordered = np.sort(routed.keys, axis=-1)
        close |= ordered[:, -k] - ordered[:, -k - 1] <= allowed
    return close


def beyond(found: Error, limit: Bound) -> str:
    """What of an error is beyond its limit, in words."""
    which = "max" if not found.max <= limit.max else "rms"
    word = "max error" if which == "max" else "RMS error"
    return f"{word} {getattr(found, which):.2g}, limit {getattr(limit, which):.2g}"
