"""Reference routing: mlx-lm's formulas, operation by operation, for every router family."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ...routing import Routing
from ...specs import RouterSpec


def route(
    logits: mx.array,
    spec: RouterSpec,
    selection_bias: mx.array | None,
    expert_scale: mx.array | None,
) -> Routing:
    """Choose ``top_k`` of ``num_experts`` experts per token and weigh them.

    1. **Score.** Logits (after softcap or temperature, where a model has them) become scores by softmax
       or sigmoid. Sigmoid scores judge each expert by itself; softmax scores compete.
    2. **Key.** ``key = score + selection_bias``. The bias is not learned by gradient: during training it
       is nudged up for underused experts and down for overused ones, which balances load without an
       auxiliary loss (DeepSeek-V3 report, section 2.1.2; Wang et al. 2024, arXiv:2408.15664). It *selects*
       but does not *weigh*: weights come from the unbiased scores, or the balancing would distort the
       model's output.
    3. **Groups.** See :func:`keep_top_groups`.
    4. **Top k** by key. Ties are settled by index, in each family's own idiom (``spec.ties``).
    5. **Weights.** The chosen experts' scores, divided by their sum where the model renormalises (so
       that they add up to 1 whatever the scores were), times ``scale``: sigmoid-scored families use a
       factor such as 2.5 to keep the routed output in proportion to the residual stream.

    Families that score only the selected experts (``score_over="selected"``) use the logits as key and
    take the softmax of the chosen logits, which is the renormalised softmax over all.

    Args:
        logits: ``[..., num_experts]``, any float dtype.
        spec: the family's choices.
        selection_bias: ``[num_experts]`` or None.
        expert_scale: ``[num_experts]`` factors on the weights or None (Gemma 4).

    Returns:
        Indices ``[..., top_k]`` uint32 and weights ``[..., top_k]``, in the order that
        ``mx.argpartition`` gives on this device: mlx-lm's own order, bit for bit.
    """
    source, key = _source_and_key(logits, spec, selection_bias)
    indices = _top_k(key, spec)
    return Routing(indices, _weigh(source, indices, logits.dtype, spec, expert_scale))


def weigh(
    logits: mx.array,
    spec: RouterSpec,
    selection_bias: mx.array | None,
    expert_scale: mx.array | None,
    indices: mx.array,
) -> mx.array:
    """The weights of experts that have been chosen already, ``[..., top_k]`` in the order of ``indices``:
    what a backend with an order of its own differentiates."""
    source, _ = _source_and_key(logits, spec, selection_bias)
    return _weigh(source, mx.stop_gradient(indices), logits.dtype, spec, expert_scale)


def _source_and_key(
    logits: mx.array, spec: RouterSpec, selection_bias: mx.array | None
) -> tuple[mx.array, mx.array]:
    """What weights are taken from, and what experts are chosen by."""
    if spec.score_over == "selected":
        logits = _transform(logits, spec)
        return logits, _biased(logits, selection_bias, spec)
    scores = _score(_transform(_cast(logits, spec.score_dtype), spec), spec)
    key = _biased(scores, selection_bias, spec)
    if spec.drops_groups:
        key = keep_top_groups(key, spec)
    return (key if spec.weights_from == "masked" else scores), key


def _weigh(
    source: mx.array, indices: mx.array, logits: mx.Dtype, spec: RouterSpec, expert_scale: mx.array | None
) -> mx.array:
    weights = mx.take_along_axis(source, indices, axis=-1)
    if spec.score_over == "selected":
        weights = _score(_cast(weights, spec.score_dtype), spec)
    if spec.renormalize:
        weights = weights / _denominator(weights, spec)
    if expert_scale is not None:
        weights = weights * expert_scale[indices]
    if spec.scale != 1.0 and spec.scale_place == "weights":
        weights = weights * spec.scale
    if spec.weight_dtype is not None:
        weights = weights.astype(logits if spec.weight_dtype == "logits" else getattr(mx, spec.weight_dtype))
    return weights


def keep_top_groups(key: mx.array, spec: RouterSpec) -> mx.array:
    """Grouped (group-limited, "node-limited") selection: keep the experts of the best groups only.

    *Why groups exist.* Experts are spread over devices. If a token's ``top_k`` experts could sit on any
    device, every token would be sent nearly everywhere. DeepSeek-V2 therefore placed each group of
    experts on one device and let a token use experts of only ``top_groups`` groups; the checkpoint was
    trained that way, so inference must select that way even on a single machine.

    Step by step, for keys ``[..., num_experts]``:

    1. Reshape to ``[..., num_groups, num_experts / num_groups]``: neighbours form a group.
    2. *Group score.* ``top2_sum``: the sum of the group's two best keys (DeepSeek-V3, GLM-4.5, Ling). A
       token will take about ``top_k / top_groups`` experts from a kept group (8 / 4 = 2 in DeepSeek-V3),
       so what matters is how good its best few are, not one outlier. DeepSeek-V2 took the ``max``.
    3. The ``num_groups - top_groups`` groups of lowest score are dropped: ``argpartition`` on the group
       scores, whose order settles ties (lowest index dropped first).
    4. *Fill value.* All keys of dropped groups become 0, or ``-inf``. 0 is harmless while keys are positive
       scores, but a strong negative selection bias can push a kept expert's key below 0, and then an
       expert of a *dropped* group wins over it; ``-inf`` excludes them (as long as the kept
       groups have ``top_k`` experts). The first public code of DeepSeek-V3
       and GLM-4.5 filled with 0, Ling's with ``-inf``, and mlx-lm chose per family. A family keeps the value
       that mlx-lm runs it with (``docs/differences.md`` lists the rest).

    Sources: DeepSeek-V2 (arXiv:2405.04434, section 2.2.2), DeepSeek-V3 (arXiv:2412.19437, section 2.1.2),
    GLM-4.5 (arXiv:2508.06471, section 2.1), Ling (arXiv:2503.05139).
    """
    grouped = mx.unflatten(key, -1, (spec.num_groups, -1))
    if spec.group_score == "top2_sum":
        group_scores = mx.topk(grouped, 2, axis=-1).sum(axis=-1, keepdims=True)
    else:
        group_scores = grouped.max(axis=-1, keepdims=True)
    drop = spec.num_groups - spec.top_groups
    dropped = mx.argpartition(group_scores, kth=drop - 1, axis=-2)[..., :drop, :]
    fill = mx.array(0.0 if spec.dropped_fill == "zero" else -mx.inf, grouped.dtype)
    grouped = mx.put_along_axis(grouped, mx.stop_gradient(dropped), fill, axis=-2)
    return mx.flatten(grouped, -2, -1)


def _cast(x: mx.array, dtype: str | None) -> mx.array:
    return x if dtype is None else x.astype(getattr(mx, dtype))


def _transform(logits: mx.array, spec: RouterSpec) -> mx.array:
    if spec.softcap > 0:
        logits = mx.tanh(logits / spec.softcap) * spec.softcap
    if spec.temperature != 1.0:
        logits = logits / spec.temperature
    return logits


def _score(logits: mx.array, spec: RouterSpec) -> mx.array:
    if spec.score == "sigmoid":
        return mx.sigmoid(logits)
    if spec.score == "sqrtsoftplus":
        return mx.sqrt(nn.softplus(logits))
    return mx.softmax(logits, axis=-1, precise=spec.precise)


def _biased(scores: mx.array, bias: mx.array | None, spec: RouterSpec) -> mx.array:
    if bias is None:
        return scores
    if spec.bias_dtype == "scores":
        return scores + bias.astype(scores.dtype)
    return _cast(scores, spec.bias_dtype) + bias


def _top_k(key: mx.array, spec: RouterSpec) -> mx.array:
    k = spec.top_k
    if spec.ties == "lowest":
        indices = mx.argpartition(-key, kth=k - 1, axis=-1)[..., :k]
    else:
        indices = mx.argpartition(key, kth=-k, axis=-1)[..., -k:]
    return mx.stop_gradient(indices)


def _denominator(weights: mx.array, spec: RouterSpec) -> mx.array:
    total = weights.sum(axis=-1, keepdims=True)
    if spec.renormalize_eps == 0:
        return total
    if spec.eps_form == "max":
        return mx.maximum(total, spec.renormalize_eps)
    return total + spec.renormalize_eps
