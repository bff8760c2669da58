"""Backends and the choice among them.

A :class:`Backend` is a name, a probe, and a table of kernels. A :class:`Kernel` is a callable and a
``why_not`` that says, of a :class:`Problem`, why it cannot run it. :meth:`Registry.choose` walks an explicit,
ordered tuple of backends; nothing is scanned, nothing registers itself on import.
"""

from __future__ import annotations

import logging
import math
import threading
import weakref
from collections.abc import Callable, Hashable, Mapping
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import mlx.core as mx

from .env import settings
from .errors import refuse

log = logging.getLogger("moefast")
if settings.log and not log.handlers:
    log.addHandler(logging.StreamHandler())
    log.setLevel(logging.INFO)
    log.propagate = False  # or an application that configures logging would print everything twice


class Problem(NamedTuple):
    """Everything a backend may base its choice on: static facts, no array values.

    Attributes:
        op: name of the operation: ``route``, ``switch_glu``, ``experts``, ``moe``, ``quantized_matmul``;
            beside the experts ``attention``, ``cached_attention``, ``rms_norm``, ``layer_norm``,
            ``add_rms_norm``, ``add_layer_norm``, ``rope``, ``embed``, ``logsumexp``.
        device: ``cpu`` or ``gpu``: where MLX would run it now.
        dtype: of ``x`` (of ``logits`` for ``route``, of the output for ``embed``).
        phase: ``empty`` (no tokens), ``decode`` (1), ``band`` (2-127) or ``prefill`` (128 and more).
        details: the operation's own static facts: specs and layouts, in the order its module documents.
    """

    op: str
    device: str
    dtype: mx.Dtype
    phase: str
    details: tuple[Hashable, ...]


# Tokens of each phase, from and to.
PHASES = {"empty": (0, 0), "decode": (1, 1), "band": (2, 127), "prefill": (128, 2**62)}


def phase_of(shape: tuple[int, ...]) -> str:
    """The shape class of a call on ``[..., features]``."""
    tokens = math.prod(shape[:-1])
    if tokens > 127:
        return "prefill"
    if tokens > 1:
        return "band"
    return "decode" if tokens else "empty"


class Bound(NamedTuple):
    """A kernel made ready for one problem.

    Attributes:
        run: the operation, with the arguments of the reference's function.
        of_layers: the same on the layers that hold the arrays, read at each call, or None where the backend
            has no such way. It answers None when the call is of another kind by now: other shapes, dtypes,
            arrays or types of layers, or not ``low..high`` tokens. ``quantized_matmul`` and ``embed``: ``(x,
            layer, type, low, high)``. ``moe``: ``(x, logits, selection_bias, experts, shared, shared_gate,
            types, low, high)``, ``types`` being those of experts and its projections, of shared and its, and
            of shared_gate.
    """

    run: Callable[..., Any]
    of_layers: Callable[..., Any] | None = None


class Declined(Exception):  # noqa: N818 (it is no error: another backend may take the call)
    """Raised by a kernel that sees from the arrays, not from the problem, that it cannot run this call. Its
    text is the reason."""


def _always(problem: Problem) -> str | None:
    return None


@dataclass(frozen=True)
class Kernel:
    """One implementation of one operation.

    Attributes:
        run: the operation, with the arguments of the reference's function.
        why_not: gives a reason to refuse a problem, or None.
        may_decline: ``run`` may raise :class:`Declined`.
    """

    run: Callable[..., Any]
    why_not: Callable[[Problem], str | None] = _always
    may_decline: bool = False

    def bind(self, problem: Problem) -> Bound:
        """What runs ``problem``."""
        return Bound(self.run)


@dataclass(frozen=True)
class BoundKernel(Kernel):
    """A kernel whose ``run`` takes a problem and returns what runs it, as :class:`Bound`: there is something
    to work out once for all calls of a kind."""

    def bind(self, problem: Problem) -> Bound:
        """What runs ``problem``."""
        bound: Bound = self.run(problem)
        return bound


@dataclass(frozen=True)
class Backend:
    """A named table of kernels.

    Attributes:
        probe: says why the backend cannot run here, or None; asked once.
        opt_in: ``"auto"`` never chooses it.
    """

    name: str
    kernels: Mapping[str, Kernel]
    probe: Callable[[], str | None] = field(default=lambda: None)
    opt_in: bool = False

    @cached_property
    def unavailable(self) -> str | None:
        """The probe's reason, remembered."""
        return self.probe()

    def why_not(self, problem: Problem) -> str | None:
        """Why this backend cannot run ``problem``, or None."""
        if self.unavailable is not None:
            return self.unavailable
        kernel = self.kernels.get(problem.op)
        if kernel is None:
            return f"no {problem.op} kernel"
        return kernel.why_not(problem)


class Choice(NamedTuple):
    """What will run a problem, and why the backends before it will not (name -> reason)."""

    backend: str
    run: Callable[..., Any]
    refused: Mapping[str, str]
    of_layers: Callable[..., Any] | None = None  # see Bound


class Registry:
    """The ordered backends of a process, the default among them and the choices made so far."""

    def __init__(self, backends: tuple[Backend, ...]):
        self.backends = backends  # fastest first: the order in which "auto" asks
        # Of the process, each with its handle; the last one holds. One whose handle is gone can no longer
        # be withdrawn, so nothing before it matters.
        self._defaults: list[tuple[Callable[[], object], str]] = []
        self._override: ContextVar[str | None] = ContextVar("moefast_backend", default=None)
        self._choices: dict[tuple[Problem, str], Choice] = {}
        self._lock = threading.Lock()
        self.age = 0  # how often choices were forgotten

    def names(self) -> tuple[str, ...]:
        """Names that may be asked for."""
        return ("auto", *(b.name for b in self.backends))

    def check(self, name: str) -> str:
        """``name`` if it may be asked for; raises ValueError otherwise."""
        if name not in self.names():
            refuse("backend", f"backend must be one of {self.names()}", repr(name))
        return name

    @property
    def default(self) -> str:
        """What ``backend="auto"`` means here and now: the context's override, the process's default, or
        MOEFAST_BACKEND."""
        defaults = self._defaults
        return self._override.get() or (defaults[-1][1] if defaults else self._of_environment)

    @cached_property
    def _of_environment(self) -> str:
        if settings.backend not in self.names():
            refuse("env", f"MOEFAST_BACKEND must be one of {self.names()}", repr(settings.backend))
        return settings.backend

    def choose(self, problem: Problem, backend: str = "auto") -> Choice:
        """The kernel for a problem. A named backend runs or raises ValueError with its reason; only
        ``"auto"`` looks further."""
        if backend == "auto":
            backend = self.default
        choice = self._choices.get((problem, backend))
        return choice if choice is not None else self._decide(problem, backend)

    def ask(self, problem: Problem, backend: str) -> tuple[Backend | None, dict[str, str]]:
        """The first backend that takes a problem, out of all (``"auto"``) or the one named, and why those
        before it refused. Remembers nothing: asking is not a call."""
        refused: dict[str, str] = {}
        for candidate in self.backends:
            if candidate.opt_in if backend == "auto" else backend != candidate.name:
                continue
            reason = candidate.why_not(problem)
            if reason is None:
                return candidate, refused
            refused[candidate.name] = reason
        return None, refused

    def _decide(self, problem: Problem, backend: str) -> Choice:
        taker, refused = self.ask(problem, self.check(backend))
        if taker is None:
            refuse(problem.op, f"backend {backend!r} must be able to run {problem}", refused)
        kernel = taker.kernels[problem.op]
        bound = kernel.bind(problem)
        run = self._or_another(problem, backend, taker.name, bound.run) if kernel.may_decline else bound.run
        choice = Choice(taker.name, run, refused, bound.of_layers)
        self._choices[problem, backend] = choice
        about = f"{problem.op} ({problem.phase}, {problem.dtype}, {problem.device})"
        log.info("%s: %s%s", about, taker.name, f", not {refused}" if refused else "")
        log.debug("%s", problem)
        return choice

    def _or_another(
        self, problem: Problem, backend: str, name: str, run: Callable[..., Any]
    ) -> Callable[..., Any]:
        """``run``, or where that declines a call: what runs it instead."""

        def run_or_another(*arguments: Any) -> Any:
            try:
                return run(*arguments)
            except Declined as declined:
                reason = str(declined)
            for other in self.backends:
                if backend != "auto" or other.opt_in or other.name == name:
                    continue
                if other.why_not(problem) is None:
                    log.info(
                        "%s (%s): %s, %s declined: %s", problem.op, problem.phase, other.name, name, reason
                    )
                    return other.kernels[problem.op].bind(problem).run(*arguments)
            refuse(problem.op, f"backend {backend!r} must be able to run {problem}", {name: reason})

        return run_or_another

    def forget(self) -> None:
        """Make every choice anew: for who changes what backends choose by."""
        self._choices.clear()
        self.age += 1

    def choices(self) -> list[tuple[Problem, Choice]]:
        """Every choice made so far: what ``moefast generate`` and ``MOEFAST_LOG`` report."""
        return [(problem, choice) for (problem, _), choice in list(self._choices.items())]

    def set_default(self, name: str | None) -> str | None:
        """Set the process's default, None for the environment's; returns the former one."""
        with self._lock:
            former = self._defaults[-1][1] if self._defaults else None
            self._defaults = [] if name is None else [(lambda: None, name)]
        return former

    def add_default(self, name: str, handle: object) -> None:
        """Set the process's default, until ``handle`` withdraws it or for good once ``handle`` is gone."""
        with self._lock:
            gone = [i for i, (alive, _) in enumerate(self._defaults) if alive() is None]
            self._defaults = [*self._defaults[gone[-1] if gone else 0 :], (weakref.ref(handle), name)]

    def withdraw_default(self, handle: object) -> None:
        """Undo ``handle``'s :meth:`add_default`, whatever other threads have set since."""
        with self._lock:
            self._defaults = [default for default in self._defaults if default[0]() is not handle]

    def push(self, name: str) -> Token[str | None]:
        """Override the default in this context (thread or task)."""
        return self._override.set(name)

    def pop(self, token: Token[str | None]) -> None:
        """Undo :meth:`push`."""
        self._override.reset(token)


_CPU = mx.Device(mx.cpu, 0)


def device_name() -> str:
    """``cpu`` or ``gpu``: where MLX would run an operation issued now."""
    return "cpu" if mx.default_device() == _CPU else "gpu"
