"""``moefast tune``: what is faster on this machine for each kind of layer of a model, measured.

Layers of one kind take turns, original and accelerated alternate, and each figure is the median of its runs.
A backend is chosen where it is at least as fast; otherwise the layer stays as mlx-lm has it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn

from .. import tuning
from ..acceleration import restore
from ..acceleration.attention import attention_class
from ..acceleration.dbrx import AcceleratedDbrx
from ..acceleration.look import Found, activation_dtype, look, look_beside
from ..acceleration.model import apply
from ..registry import log
from ..weights import ExpertLayout, Layout, dtype_name

# Runs something, and says how many seconds it took.
Stopwatch = Callable[[Callable[[], mx.array]], float]

# One call of each phase; a short prefill, for the sake of originals that take seconds for it.
TOKENS = {"decode": 1, "band": 16, "prefill": 128}

# A layer's figures of a phase are enough after so many rounds, or after two where one side takes this much
# longer. What takes a moment has so many rounds whatever the time left.
ROUNDS = 7
_CLEAR = 1.5
_HOPELESS = 5.0
_MOMENT = 0.05
# Experts of a token, where they are called without a router.
_CHOSEN = 4
# Of a rotation, and the tokens before one that attention decodes.
_HEADS, _CONTEXT = 16, 256


@dataclass
class Kind:
    """Layers that are alike, and what was measured of them.

    Attributes:
        what: for people: class and sizes.
        layers: of the model.
        seconds: phase -> ``original`` or a backend -> the runs' seconds.
        expected: phase -> what the original would have taken, where it was not run.
    """

    key: str
    what: str
    layers: list[Found]
    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    expected: dict[str, float] = field(default_factory=dict)

    def decided(self) -> dict[str, dict[str, Any]]:
        """Phase -> what is faster, and the medians."""
        found = {}
        for phase, sides in self.seconds.items():
            medians = {side: statistics.median(runs) for side, runs in sides.items() if runs}
            backend = next(side for side in sides if side != tuning.ORIGINAL)
            if phase in self.expected:
                found[phase] = {"choice": backend, "seconds": medians, "expected": self.expected[phase]}
                continue
            faster = backend if medians[backend] <= medians[tuning.ORIGINAL] else tuning.ORIGINAL
            found[phase] = {"choice": faster, "seconds": medians}
        return found


def stopwatch(run: Callable[[], mx.array]) -> float:
    """Seconds until what ``run`` returns is evaluated."""
    began = time.perf_counter()
    mx.eval(run())
    return time.perf_counter() - began


def tune(
    model: mlx.nn.Module,
    *,
    seconds: float,
    watch: Stopwatch = stopwatch,
    progress: Callable[[float, str], None] = lambda done, what: None,
) -> list[Kind]:
    """Measure every kind of layer that a backend takes, and leave the model as it was.

    Args:
        model: that mlx-lm loaded, in evaluation mode.
        seconds: for everything, about; each kind and phase has at least one run of each side, unless what is
            known of fewer tokens says that the original takes too long, and several times as long.
        watch: times a run.
        progress: told which part of the time is over, and what is being measured.

    Returns:
        The kinds, with what was measured of them. Nothing is stored.
    """
    restore(model)
    kinds, dtype = kinds_of(model), activation_dtype(model)
    jobs = [(kind, phase) for kind in kinds for phase in kind.layers[0].verdict.backends]
    end = time.perf_counter() + seconds
    for i, (kind, phase) in enumerate(jobs):
        progress(i / len(jobs), f"{kind.what}: {phase}")
        share = max(0.0, end - time.perf_counter()) / (len(jobs) - i)
        _measure(kind, phase, dtype, share, watch)
    progress(1.0, "done")
    return kinds


def kinds_of(model: mlx.nn.Module) -> list[Kind]:
    """The kinds of layers that a backend takes."""
    dtype = activation_dtype(model)
    kinds: dict[str, Kind] = {}
    with tuning.ignored():
        layers = [*look(model, "auto", dtype), *look_beside(model, "auto", dtype)]
    for layer in layers:
        # DBRX's original would have to be unstacked between two runs; it is slower anyway.
        stacked = any(swap.ahead is AcceleratedDbrx for swap in layer.swaps)
        if not layer.swaps or not layer.verdict.problems or stacked:
            continue
        key = tuning.key_of(next(iter(layer.verdict.problems.values())))
        if key not in kinds:
            kinds[key] = Kind(key, _describe(layer), [])
        kinds[key].layers.append(layer)
    return list(kinds.values())


def _describe(layer: Found) -> str:
    """Class, sizes and format."""
    problem = layer.verdict.problems["decode"]
    if problem.op == "beside":
        return f"{layer.kind} {layer.verdict.hidden}"
    layout = next(part for part in problem.details if isinstance(part, ExpertLayout | Layout))
    if isinstance(layout, Layout):
        return f"{layer.kind} {layout.in_dims} x {layout.out_dims}, {_format(layout)}"
    sizes = f"{layout.num_experts} experts {layout.hidden} x {layout.width}"
    return f"{layer.kind} of {sizes}, {_format(layout.up)}"


def _format(layout: Layout) -> str:
    if layout.quant is None:
        return dtype_name(layout.dtype)
    return f"{layout.quant.mode} {layout.quant.bits} bits"


def call_of(layer: Found, dtype: mx.Dtype, tokens: int) -> Callable[[], mx.array]:
    """What runs the layer on random input, drawn now."""
    module: Any = layer.module
    hidden = layer.verdict.hidden
    x = mx.random.normal((1, tokens, hidden)).astype(dtype)
    mx.eval(x)
    if layer.what == "experts":
        layout: Any = layer.verdict.problems["decode"].details[0]
        indices = mx.random.randint(0, layout.num_experts, (1, tokens, _CHOSEN)).astype(mx.uint32)
        weights = mx.full(indices.shape, 1 / _CHOSEN, dtype)
        mx.eval(indices, weights)
        if layer.kind == "Experts":  # of a router apart: it combines
            return lambda: module(x, indices, weights)
        return lambda: module(x, indices)
    if isinstance(module, mlx.nn.RoPE):
        heads = mx.broadcast_to(x[:, None], (1, _HEADS, tokens, hidden))
        return lambda: module(heads)
    if attention_class(module) is not None:
        return _attention_call(layer, x)
    if isinstance(module, mlx.nn.Embedding | mlx.nn.QuantizedEmbedding):
        head: Any = module
        return lambda: head.as_linear(x)
    return lambda: module(x)


def _attention_call(layer: Found, x: mx.array) -> Callable[[], mx.array]:
    """One token after a context, with the cache as it was; more tokens are a prompt."""
    module: Any = layer.module
    if x.shape[1] > 1:
        return lambda: module(x, "causal", None)
    from mlx_lm.models.cache import KVCache

    cache = KVCache()
    context = mx.broadcast_to(x, (1, _CONTEXT, x.shape[2]))
    _accelerate(layer, x.dtype)
    try:
        mx.eval(module(context, "causal", cache), cache.state)
    finally:
        restore(module)

    def one_more() -> mx.array:
        y: mx.array = module(x, None, cache)
        cache.trim(1)
        return y

    return one_more


def _measure(kind: Kind, phase: str, dtype: mx.Dtype, seconds: float, watch: Stopwatch) -> None:
    """Rounds of original and accelerated, until their order is clear or the time is over."""
    backend = kind.layers[0].verdict.backends[phase]
    sides: dict[str, list[float]] = {tuning.ORIGINAL: [], backend: []}
    kind.seconds[phase] = sides
    end = time.perf_counter() + seconds
    for i in range(ROUNDS + 1):
        layer = kind.layers[i % len(kind.layers)]
        try:
            call = call_of(layer, dtype, TOKENS[phase])
            first = timed(layer, call, True, dtype, watch) if i == 0 else 0.0
        except (TypeError, ValueError, AttributeError) as error:
            if attention_class(layer.module) is None:
                raise
            # It is called otherwise, or keeps other caches: nothing is decided.
            log.info("tune: %s is not measured: %s", kind.what, error)
            del kind.seconds[phase]
            return
        if i == 0 and (expected := _hopeless(kind, phase, first, seconds)) is not None:
            sides[backend].append(first)
            kind.expected[phase] = expected
            return
        took = {side: timed(layer, call, side != tuning.ORIGINAL, dtype, watch) for side in sides}
        slow = max(took.values()) > max(_MOMENT, seconds / 4)
        # The first run compiles and warms up. It counts where there is no time for another.
        if i > 0 or slow:
            for side, runs in sides.items():
                runs.append(took[side])
        clear = i >= 2 and _are_apart(sides)
        if all(sides.values()) and (clear or (slow and time.perf_counter() > end)):
            return


def _hopeless(kind: Kind, phase: str, accelerated: float, seconds: float) -> float | None:
    """What the original would take, if that is more than there is time for and many times the accelerated
    side's; by its time for fewer tokens, of which it needs as much for each."""
    before = [other for other, sides in kind.seconds.items() if other != phase and sides[tuning.ORIGINAL]]
    if not before:
        return None
    last = before[-1]
    each = statistics.median(kind.seconds[last][tuning.ORIGINAL]) / TOKENS[last]
    expected = each * TOKENS[phase]
    return expected if expected > max(seconds, _MOMENT, _HOPELESS * accelerated) else None


def timed(
    layer: Found, call: Callable[[], mx.array], accelerated: bool, dtype: mx.Dtype, watch: Stopwatch
) -> float:
    """Seconds of one run of a layer that is its original before and after."""
    if accelerated:
        _accelerate(layer, dtype)
    try:
        if accelerated:
            call()  # from its second call on a layer remembers what the first one chose; nothing is evaluated
        return watch(call)
    finally:
        restore(layer.module)


def _accelerate(layer: Found, dtype: mx.Dtype) -> None:
    """The layer and those within it, whatever was measured before."""
    apply([layer], "auto")
    with tuning.ignored():
        apply(list(look_beside(layer.module, "auto", dtype)), "auto")


def _are_apart(sides: dict[str, list[float]]) -> bool:
    first, second = sides.values()
    return min(first) > _CLEAR * max(second) or min(second) > _CLEAR * max(first)


def as_stored(kinds: list[Kind]) -> dict[str, Any]:
    """What :func:`moefast.tuning.store` keeps."""
    return {
        "when": time.strftime("%Y-%m-%d"),
        "layers": {kind.key: {"what": kind.what, "phases": kind.decided()} for kind in kinds},
    }
