"""Where a model's time goes, part by part.

MLX is lazy: what a line of Python costs is seen only where its arrays are evaluated. So the parts of the real
model are stopped one by one: when a part is called, what came before it is evaluated, and what it returns is
evaluated before anything else happens. Parts lie within one another (an attention holds its projections);
what is counted is each one's own.

Stopping costs time as well (an ``mx.eval`` each), and hides what the whole may do at once. The same forward
passes are therefore also run in one piece: next to the sum of the parts that says what the stops cost.

Where an attention turns, stores and attends in one operation (``moefast.ops.cached_attention``), it is one
part. What its three steps cost one by one, which is not what runs, is measured beside it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import wraps
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn
from mlx.utils import tree_flatten

from ...models.attention import Attention, SeparateAttention
from ...nn import MLP, Embedding, MoE, Router
from .subjects import Forward, ModelSubject

# In the order of a forward pass. ATTENTION is an attention without the parts within it, and so is BLOCK.
EMBEDDING, NORMS, INPUTS, ROPE = "embedding", "norms", "qkv projection", "rope"
CACHE, ATTENTION, OUTPUT = "cache update", "attention", "output projection"
ROUTER, BLOCK, DENSE, HEAD = "router", "MoE block", "dense MLP", "lm_head"
# Residual sums, masks, the choice of a token.
BETWEEN = "between the parts"
PARTS = (EMBEDDING, NORMS, INPUTS, ROPE, CACHE, ATTENTION, OUTPUT, ROUTER, BLOCK, DENSE, HEAD, BETWEEN)


@dataclass
class Cost:
    """What a part took.

    Attributes:
        calls: of the part.
        python: seconds until its call returned: building the graph.
        evaluating: seconds of evaluating what it returned, and of what it left to the parts within it.
    """

    calls: int = 0
    python: float = 0.0
    evaluating: float = 0.0


class Stopwatch:
    """Gives every moment between ``start`` and ``stop`` to the innermost part that runs."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.costs: dict[str, Cost] = {part: Cost() for part in PARTS}
        self._clock = clock
        self._inside: list[str] = []
        self._since = 0.0

    def enter(self, part: str, pending: Any) -> None:
        """``part`` begins; what it is given is evaluated at the cost of whoever calls it."""
        if self._inside:
            self._python()
            self._evaluate(pending)
        self._inside.append(part)
        self.costs[part].calls += 1
        self._since = self._clock()

    def leave(self, result: Any) -> None:
        """The innermost part ends with a result."""
        self._python()
        self._evaluate(result)
        self._inside.pop()

    def _python(self) -> None:
        self.costs[self._inside[-1]].python += self._lap()

    def _evaluate(self, arrays: Any) -> None:
        found: Any = tree_flatten(arrays)
        mx.eval([array for _, array in found if isinstance(array, mx.array)])
        self.costs[self._inside[-1]].evaluating += self._lap()

    def _lap(self) -> float:
        before, self._since = self._since, self._clock()
        return self._since - before


class Part(NamedTuple):
    """A method of a layer whose calls are a part's."""

    path: str
    method: str
    name: str


def parts_of(model: Any) -> list[Part]:
    """The parts of one of moefast's models. mlx-lm's model of the same checkpoint has the same paths."""
    found: list[Part] = []
    blocks = [path for path, module in model.named_modules() if isinstance(module, MoE)]

    def add(path: str, name: str, method: str = "__call__") -> None:
        found.append(Part(path, method, name))

    for path, module in model.named_modules():
        if isinstance(module, Attention):
            add(path, ATTENTION)
            add(f"{path}.rope", ROPE)
            add(f"{path}.{module.OUTPUT}", OUTPUT)
            for name in module.INPUTS:
                add(f"{path}.{name}", INPUTS)
            if isinstance(module, SeparateAttention):  # ours has them in one operation
                add(path, INPUTS, "project")
        elif isinstance(module, MoE):
            add(path, BLOCK)
            add(f"{path}.{module.names.router}", ROUTER)
        elif isinstance(module, MLP) and not any(path.startswith(f"{block}.") for block in blocks):
            add(path, DENSE)
        elif isinstance(module, mlx.nn.RMSNorm | mlx.nn.LayerNorm):
            add(path, NORMS)
        elif path == "lm_head":
            add(path, HEAD)
        elif isinstance(module, mlx.nn.Embedding | mlx.nn.QuantizedEmbedding | Embedding):
            add(path, EMBEDDING)
            add(path, HEAD, "as_linear")  # where it is tied
    return found


@contextmanager
def watched(
    model: Any, cache: Sequence[Any], parts: Sequence[Part], watch: Stopwatch, *, one_by_one: bool = False
) -> Iterator[None]:
    """Let ``watch`` see the parts of a model of either package, and the updates of its cache.

    Args:
        one_by_one: keep moefast's attention from doing its steps in one operation.
    """
    modules = dict(model.named_modules())
    methods: dict[int, tuple[Any, dict[str, str]]] = {}
    for part in parts:
        if part.path in modules:  # mlx-lm may compute one without a layer: then it is the enclosing part's
            module = modules[part.path]
            method = "logits" if isinstance(module, Router) else part.method
            if not hasattr(type(module), method):
                continue
            methods.setdefault(id(module), (module, {}))[1][method] = part.name
    updates = {"update_and_fetch": CACHE}
    kinds_of_cache = {type(layer) for layer in cache}
    own = [(kind, kind.update_and_fetch) for kind in kinds_of_cache]
    if one_by_one:  # a cache of any other kind is left to its own methods
        methods |= {id(layer): (layer, updates) for layer in cache}
    kinds = [(module, type(module)) for module, _ in methods.values()]
    try:
        for module, names in methods.values():
            module.__class__ = _watching(type(module), names, watch)
        if not one_by_one:  # its class stays what it is: attentions look at it
            for kind, method in own:
                kind.update_and_fetch = _watched(method, CACHE, watch)
        yield
    finally:
        for module, kind in kinds:
            module.__class__ = kind
        for kind, method in own:
            kind.update_and_fetch = method


def _watched(method: Callable[..., Any], part: str, watch: Stopwatch) -> Callable[..., Any]:
    @wraps(method)
    def run(self: Any, *args: Any, **options: Any) -> Any:
        watch.enter(part, (list(args), options))
        result = method(self, *args, **options)
        watch.leave(result)
        return result

    return run


def _watching(kind: type[Any], names: Mapping[str, str], watch: Stopwatch) -> type[Any]:
    """A class whose methods are parts. MLX modules ignore methods set on the instance, so it is exchanged;
    layers are told apart by the names of class and module, which stay."""

    members = {name: _watched(getattr(kind, name), part, watch) for name, part in names.items()}
    return type(kind.__name__, (kind,), {**members, "__module__": kind.__module__})


@dataclass
class Profile:
    """Where the time of one subject's forward passes goes: seconds of a pass, medians over all of them.

    Attributes:
        phase, tokens: what ran: ``prefill`` of so many tokens, or ``decode``: so many passes of one.
        passes: of each kind.
        costs: part -> its own.
        whole: of the same pass in one piece.
        building: that Python took of ``whole`` to build the graph.
        steps: of an attention in one operation, what its steps cost one by one; else empty.
    """

    phase: str
    tokens: int
    passes: int
    costs: dict[str, Cost]
    whole: float
    building: float
    steps: dict[str, Cost] = field(default_factory=dict)

    @property
    def python(self) -> float:
        """Seconds of Python in all parts."""
        return sum(cost.python for cost in self.costs.values())

    @property
    def stopped(self) -> float:
        """Seconds of all parts, Python included."""
        return sum(cost.python + cost.evaluating for cost in self.costs.values())

    def as_json(self) -> dict[str, Any]:
        """Ready for JSON; seconds."""
        return {
            "tokens": self.tokens,
            "passes": self.passes,
            "parts": {part: asdict(cost) for part, cost in self.costs.items() if cost.calls},
            "steps": {part: asdict(cost) for part, cost in self.steps.items()},
            "stopped": self.stopped,
            "whole": self.whole,
            "building": self.building,
        }


@dataclass
class Runs:
    """Collects the forward passes of a phase, of both kinds.

    Attributes:
        costs: of each pass with stops.
        one_by_one: of each with an attention's steps one by one.
        whole: seconds of each without, and those of building its graph.
    """

    costs: list[dict[str, Cost]] = field(default_factory=list)
    one_by_one: list[dict[str, Cost]] = field(default_factory=list)
    whole: list[tuple[float, float]] = field(default_factory=list)

    def stopped(
        self, forward: Forward, parts: Sequence[Part], *, one_by_one: bool = False
    ) -> list[list[mx.array]]:
        """Run with a stop at every part; returns what the passes gave."""
        watch = Stopwatch()
        results = []
        with watched(forward.model, forward.cache, parts, watch, one_by_one=one_by_one):
            for one in forward.passes:
                watch.costs = {part: Cost() for part in PARTS}
                watch.enter(BETWEEN, ())
                results.append(one())
                watch.leave(results[-1])
                (self.one_by_one if one_by_one else self.costs).append(watch.costs)
        return results

    def in_one_piece(self, forward: Forward) -> list[list[mx.array]]:
        """Run without stops; returns what the passes gave."""
        results = []
        for one in forward.passes:
            start = time.perf_counter()
            results.append(one())
            built = time.perf_counter()
            mx.eval(results[-1])
            self.whole.append((time.perf_counter() - start, built - start))
        return results

    @property
    def in_one_operation(self) -> bool:
        """Whether attentions ran that neither turned nor stored."""
        last = self.costs[-1]
        return last[ATTENTION].calls > 0 and last[ROPE].calls == last[CACHE].calls == 0

    def profile(self, phase: str, tokens: int) -> Profile:
        """The medians."""
        whole, building = (statistics.median(column) for column in zip(*self.whole, strict=True))
        steps = _medians(self.one_by_one, (ROPE, CACHE, ATTENTION)) if self.one_by_one else {}
        return Profile(phase, tokens, len(self.costs), _medians(self.costs, PARTS), whole, building, steps)


def _medians(passes: Sequence[Mapping[str, Cost]], parts: Sequence[str]) -> dict[str, Cost]:
    return {
        part: Cost(
            passes[-1][part].calls,
            statistics.median(costs[part].python for costs in passes),
            statistics.median(costs[part].evaluating for costs in passes),
        )
        for part in parts
    }


def profile(
    subject: ModelSubject, parts: Sequence[Part], phase: str, tokens: int, *, passes: int, seconds: float
) -> Profile:
    """Profile a subject, with stops and without in turn.

    Args:
        parts: see :func:`parts_of`.
        phase, tokens: as :meth:`ModelSubject.run` takes them.
        passes: forward passes of each kind to strive for.
        seconds: for everything, as far as one pass of each kind allows.

    Raises:
        RuntimeError: the stops changed a result. They must not.
    """
    end = time.perf_counter() + seconds
    runs = Runs()
    while True:
        start = time.perf_counter()
        with subject.opened(phase, tokens) as forward:
            want = runs.in_one_piece(forward)
        with subject.opened(phase, tokens) as forward:
            got = runs.stopped(forward, parts)
        if not all(_equal(mine, theirs) for mine, theirs in zip(got, want, strict=True)):
            raise RuntimeError(f"[profile] a {phase} of {subject.label} must not change by stops, but did.")
        if runs.in_one_operation:
            with subject.opened(phase, tokens) as forward:
                runs.stopped(forward, parts, one_by_one=True)
        now = time.perf_counter()
        if len(runs.costs) >= passes or now + (now - start) > end:
            return runs.profile(phase, tokens)


def _equal(mine: list[mx.array], theirs: list[mx.array]) -> bool:
    return all(mx.array_equal(a, b, equal_nan=True) for a, b in zip(mine, theirs, strict=True))
