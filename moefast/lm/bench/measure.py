"""Verify, then time: all subjects of a family in turn, A B C A B C, so that a disturbance hits them all."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .plan import Allowance, affordable, grow
from .stats import Rate, Ratio, faster, rate, ratio
from .subjects import Subject, Verdict

PHASES = ("prefill", "decode")

# A verified run as long as this (seconds) is a measurement: warming up is noise in it, and so is noting
# what the experts were given. Shorter ones warm up.
_LONG = 0.3
# A token count this much larger than the baseline's says something new.
_FARTHER = 4
# A prefill of one token is a decode step.
_FEWEST_PREFILL = 2


class Goal(NamedTuple):
    """What is measured where time allows: tokens of a prefill, tokens decoded, runs of each."""

    prefill: int
    decode: int
    repeats: int


@dataclass
class Point:
    """One subject's runs of one phase at one token count."""

    tokens: int
    expected: float  # seconds of a run
    seconds: list[float] = field(default_factory=list)


@dataclass
class Figures:
    """What was found out about one subject. It does not refer to it: its weights can go.

    Attributes:
        label, dtype, backend, peak_bytes: see :class:`moefast.lm.bench.subjects.Subject`.
        points: phase -> token count -> runs.
        verdicts: phase -> of every verification, in order.
        used: seconds its verified and timed runs took.
        skipped: phase -> why it was not measured.
        refused: why the backend does not run this model, where it does not.
    """

    label: str
    dtype: str
    backend: str | None
    peak_bytes: int = 0
    points: dict[str, dict[int, Point]] = field(default_factory=lambda: {phase: {} for phase in PHASES})
    verdicts: dict[str, list[Verdict]] = field(default_factory=dict)
    used: float = 0.0
    skipped: dict[str, str] = field(default_factory=dict)
    refused: str = ""

    @property
    def passed(self) -> bool:
        """No verification failed."""
        return all(verdict.passed for found in self.verdicts.values() for verdict in found)

    def rates(self, phase: str) -> dict[int, Rate]:
        """Token count -> rate, of a subject that passed."""
        if not self.passed:
            return {}
        return {n: rate(n, point.seconds) for n, point in self.points[phase].items() if point.seconds}

    @property
    def measured(self) -> list[str]:
        """The phases that have figures."""
        return [phase for phase in PHASES if self.rates(phase)]

    def most(self, phase: str) -> int:
        """The largest token count of a phase; 0 where it was not measured."""
        return max(self.points[phase], default=0)


def baseline(figures: Sequence[Figures], phase: str) -> Figures | None:
    """The faster of mlx-lm's own models in a phase."""
    stock = {f.label: f for f in figures if f.backend is None}
    name = faster({label: f.rates(phase) for label, f in stock.items()})
    return None if name is None else stock[name]


def ratio_to(base: Figures | None, figures: Figures, phase: str) -> Ratio | None:
    """How many times faster than the baseline, at equal token counts."""
    if base is None:
        return None
    return ratio(figures.rates(phase), base.label, base.rates(phase))


class Bench:
    """One family's measurement.

    Args:
        goal: counts and repeats to strive for.
        seconds: for everything.
        least: seconds that each subject gets at least.
        clock: seconds, monotonic.
        progress: told what is being done.
    """

    def __init__(
        self,
        goal: Goal,
        seconds: float,
        *,
        least: float = 0.0,
        clock: Callable[[], float] = time.perf_counter,
        progress: Callable[[str], None] = lambda _: None,
    ):
        self._goal = goal
        self._subjects: dict[str, Subject] = {}
        self._least = least
        self._clock = clock
        self._progress = progress
        self._seconds = seconds
        self._deadline = clock() + seconds

    def measure(self, subjects: Sequence[Subject]) -> list[Figures]:
        """Verify each subject and find out its token counts; then time all in turn."""
        self._subjects = {subject.label: subject for subject in subjects}
        figures = []
        for i, subject in enumerate(subjects):
            share = (self._deadline - self._clock()) / (len(subjects) - i)
            figures.append(self._explore(subject, Allowance(max(share, self._least))))
        runnable = [f for f in figures if f.passed and not f.refused]
        for phase in PHASES:
            self._meet_baseline(runnable, phase)
        self._take_turns([f for f in runnable if f.passed])
        for subject, f in zip(subjects, figures, strict=True):
            f.peak_bytes = subject.peak_bytes
        return figures

    def _explore(self, subject: Subject, allowance: Allowance) -> Figures:
        """Verify a subject and find the token counts it can afford."""
        figures = Figures(subject.label, subject.dtype, subject.backend)
        start = self._clock()
        try:
            if self._verify(figures, "decode", 1) < math.inf:
                step = figures.points["decode"].pop(1)
                tokens = max(1, affordable(self._goal.decode, step.expected, allowance.per_run("decode")))
                # The verified step is a run of one token; of a longer run it says what to expect.
                kept = step.seconds if tokens == 1 else []
                figures.points["decode"][tokens] = Point(tokens, step.expected * tokens, kept)
                left = allowance.seconds - (self._clock() - start)
                self._explore_prefill(figures, step.expected, allowance.per_run("prefill"), left)
        except ValueError as error:
            figures.refused = str(error)
        return figures

    def _explore_prefill(self, figures: Figures, per_token: float, per_run: float, left: float) -> None:
        fewest = min(_FEWEST_PREFILL, self._goal.prefill)
        if affordable(self._goal.prefill, per_token, per_run) < fewest and fewest * per_token > left:
            figures.skipped["prefill"] = f"{fewest} tokens would take about {fewest * per_token:.0f} s"
            return
        points = figures.points["prefill"]

        def run(tokens: int) -> float:
            points.clear()
            return self._verify(figures, "prefill", tokens)

        grow(run, self._goal.prefill, per_token, per_run, fewest)

    def _verify(self, figures: Figures, phase: str, tokens: int) -> float:
        """Run once and compare. Adds a point and returns its seconds; infinity if the subject failed."""
        self._progress(f"{figures.label}: verifying {phase}, {_count(tokens)}")
        verdict, seconds = self._subjects[figures.label].verify(phase, tokens)
        figures.used += seconds
        figures.verdicts.setdefault(phase, []).append(verdict)
        if not verdict.passed:
            return math.inf
        figures.points[phase][tokens] = Point(tokens, seconds, [seconds] if seconds >= _LONG else [])
        return seconds

    def _meet_baseline(self, figures: Sequence[Figures], phase: str) -> None:
        """Give the faster of mlx-lm's models and everyone else a token count in common."""
        most = max((f.most(phase) for f in figures if f.backend is None), default=0)
        bases = [f for f in figures if f.backend is None and f.most(phase) == most]
        for base in bases if most else ():
            for other in figures:
                own = other.most(phase)
                tokens = min(most, own)
                if not tokens:
                    continue
                self._add_point(base, phase, tokens)
                self._add_point(other, phase, tokens)
                if tokens < own < min(_FARTHER * tokens, getattr(self._goal, phase)):
                    del other.points[phase][own]

    def _add_point(self, f: Figures, phase: str, tokens: int) -> None:
        if tokens in f.points[phase]:
            return
        if phase == "prefill":
            self._verify(f, phase, tokens)
        else:  # single steps have been verified, whatever their number
            known = f.points[phase][f.most(phase)]
            f.points[phase][tokens] = Point(tokens, known.expected * tokens / known.tokens)

    def _take_turns(self, figures: Sequence[Figures]) -> None:
        """Rounds over all subjects, until every point has its runs or the time is over."""
        share = self._seconds / max(1, len(figures))
        ran = True
        while ran:
            ran = False
            for f in figures:
                for phase in PHASES:
                    for point in f.points[phase].values():
                        if self._wants_run(f, point, share):
                            self._run(f, phase, point)
                            ran = True

    def _wants_run(self, f: Figures, point: Point, share: float) -> bool:
        if len(point.seconds) >= self._goal.repeats:
            return False
        # The first run of a point is never left out: its time was planned, and without it all was in vain.
        # Further ones stop where a slow subject would take the time of the others.
        in_time = self._clock() + point.expected <= self._deadline
        return not point.seconds or (in_time and f.used + point.expected <= share)

    def _run(self, f: Figures, phase: str, point: Point) -> None:
        self._progress(f"{f.label}: {phase}, {_count(point.tokens)}, run {len(point.seconds) + 1}")
        start = self._clock()
        self._subjects[f.label].run(phase, point.tokens)
        point.expected = self._clock() - start
        point.seconds.append(point.expected)
        f.used += point.expected


def _count(tokens: int) -> str:
    return "1 token" if tokens == 1 else f"{tokens} tokens"
