"""One family: build its models over one set of weights, verify, measure, and put the figures together."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import mlx.core as mx

from ...acceleration import accelerate
from ..presets import preset
from .measure import PHASES, Bench, Figures, Goal, baseline, ratio_to
from .models import build, bytes_per_token, draw_weights, fill, in_float32
from .plan import affordable, grow
from .profile import Profile, parts_of, profile
from .subjects import ModelSubject
from .truth import Prompt, Truth

STOCK = {"mlx-lm-bf16": mx.bfloat16, "mlx-lm-fp32": mx.float32}
# mlx-lm's own model after moefast.accelerate.
ACCELERATED = {"accelerated-bf16": mx.bfloat16, "accelerated-fp32": mx.float32}

# Part of a family's time that one run of the reference in float32 may take, and the fewest tokens it runs.
_TRUTH_PART = 0.06
_TRUTH_TOKENS = 4
# MLX compiles fused CPU kernels when they are first met, a second each, and keeps them on disk: on a new
# machine that would count as the time of a model. A tiny model meets the same kernels.
_WARM_UP = Goal(prefill=8, decode=2, repeats=1)
_UNHURRIED = 3600.0
# Part of a family's time that every subject gets, even where building the models has used it up.
_LEAST_PART = 0.05
# Part of a family's time that profiles get, and forward passes of each kind that are enough.
_PROFILE_PART = 1 / 3
_PROFILE_PASSES = 9


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure.

    Attributes:
        size: ``layers=N`` of the real model, or another size of :func:`moefast.lm.preset`.
        bits: of the weights, in groups of 64.
        goal: token counts and repeats.
        subjects: labels: of ``STOCK`` or ``ACCELERATED``, or a backend of moefast.
        seed: of weights and prompts.
        profile: say, too, where the time goes.
    """

    size: str
    bits: int
    goal: Goal
    subjects: Sequence[str]
    seed: int
    profile: bool = False


class FamilyFigures(NamedTuple):
    """Everything found out about a family.

    Attributes:
        layers: of the model measured.
        read_bytes: weights that decoding a token reads.
        context: tokens in the cache where decoding starts.
        figures: one per subject.
        seconds: that all of it took.
        profiles: subject -> phase -> where its time goes; empty where nobody asked.
    """

    family: str
    layers: int
    read_bytes: int
    context: int
    figures: list[Figures]
    seconds: float
    profiles: dict[str, dict[str, Profile]]

    @property
    def passed(self) -> bool:
        """No verification failed."""
        return all(f.passed for f in self.figures)

    def as_json(self) -> dict[str, Any]:
        """Ready for JSON; times in seconds, rates in tokens per second, memory in bytes."""
        return {
            "family": self.family,
            "layers": self.layers,
            "read_bytes_per_token": self.read_bytes,
            "context": self.context,
            "seconds": round(self.seconds, 1),
            "baseline": {
                phase: base.label if (base := baseline(self.figures, phase)) else None for phase in PHASES
            },
            "subjects": [self._subject(f) for f in self.figures],
        }

    def _subject(self, f: Figures) -> dict[str, Any]:
        return {
            "subject": f.label,
            "dtype": f.dtype,
            "backend": f.backend,
            "verified": f.passed and not f.refused,
            "judged": any(v.bound is not None for found in f.verdicts.values() for v in found),
            "refused": f.refused or None,
            "skipped": f.skipped,
            "peak_bytes": f.peak_bytes,
            "error": {phase: found[-1].error._asdict() for phase, found in f.verdicts.items()},
            "compared_tokens": {phase: found[-1].tokens for phase, found in f.verdicts.items()},
            **{phase: self._phase(f, phase) for phase in PHASES},
            "profile": {phase: p.as_json() for phase, p in self.profiles.get(f.label, {}).items()} or None,
        }

    def _phase(self, f: Figures, phase: str) -> dict[str, Any]:
        ratio = ratio_to(baseline(self.figures, phase), f, phase)
        return {
            "points": [
                {"tokens": n, **rate._asdict(), "seconds": f.points[phase][n].seconds}
                for n, rate in sorted(f.rates(phase).items())
            ],
            "ratio": None if ratio is None else ratio._asdict(),
        }


def weight_of(family: str, settings: Settings) -> int:
    """A family's part of the whole time: the bytes it reads per token. Evaluates nothing."""
    return bytes_per_token(build(preset(family, settings.size), settings.bits))


def run_family(
    family: str,
    settings: Settings,
    seconds: float,
    *,
    progress: Callable[[str], None] = lambda _: None,
) -> FamilyFigures:
    """Build and measure one family.

    Args:
        seconds: for everything, building included.
        progress: told what is being done.
    """
    start = time.perf_counter()
    progress("warming up")
    _measure(family, replace(settings, size="tiny", goal=_WARM_UP, profile=False), _UNHURRIED, lambda _: None)
    left = seconds - (time.perf_counter() - start)
    figures = _measure(family, settings, left, progress)
    return figures._replace(seconds=time.perf_counter() - start)


def _measure(
    family: str, settings: Settings, seconds: float, progress: Callable[[str], None]
) -> FamilyFigures:
    start = time.perf_counter()
    config = preset(family, settings.size)
    progress("drawing weights")
    model = build(config, settings.bits)
    weights = draw_weights(model, settings.seed)
    weights32 = in_float32(weights)
    fill(model, weights)
    read_bytes = bytes_per_token(model)
    # The model whose float32 twin is the reference is also what every backend runs.
    truth_model = fill(build(config, settings.bits), weights32)
    goal = settings.goal
    prompt = Prompt.draw(config["vocab_size"], goal.prefill, goal.decode, settings.seed)
    progress("running the reference in float32")
    # mlx-lm in float32 routes by logits in float32, everyone else by logits in bfloat16.
    plain, rounded = (Truth(truth_model, prompt, rounded=rounded) for rounded in (False, True))
    _run_truth(rounded, goal.prefill, _TRUTH_PART * seconds)
    plain.run(rounded.context)

    subjects: list[ModelSubject] = []
    for label in settings.subjects:
        if label in STOCK or label in ACCELERATED:
            dtype = (STOCK | ACCELERATED)[label]
            single = dtype == mx.float32
            stock = build(config, settings.bits, stock=True)
            fill(stock, weights32 if single else weights, stock=True)
            if label in ACCELERATED:
                accelerate(stock)
                truth = plain if single else rounded
                subject = ModelSubject(label, stock, dtype, "auto", truth, steps=goal.decode, judged=True)
            else:
                # MLX's CPU sums quantized products in bfloat16; and what mlx-lm's blocks chose is not seen.
                subject = ModelSubject(label, stock, dtype, None, plain, steps=goal.decode, judged=single)
        else:
            subject = ModelSubject(label, model, mx.bfloat16, label, rounded, steps=goal.decode, judged=True)
        subjects.append(subject)
    left = seconds - (time.perf_counter() - start)
    measuring = left * (1 - _PROFILE_PART) if settings.profile else left
    bench = Bench(goal, measuring, least=_LEAST_PART * seconds, progress=progress)
    figures = bench.measure(subjects)
    profiles: dict[str, dict[str, Profile]] = {}
    if settings.profile:
        profiles = _profile(model, subjects, figures, seconds - (time.perf_counter() - start), progress)
    return FamilyFigures(
        family=family,
        layers=len(model.layers),
        read_bytes=read_bytes,
        context=rounded.context,
        figures=figures,
        seconds=time.perf_counter() - start,
        profiles=profiles,
    )


def _profile(
    model: Any,
    subjects: Sequence[ModelSubject],
    figures: Sequence[Figures],
    seconds: float,
    progress: Callable[[str], None],
) -> dict[str, dict[str, Profile]]:
    """Where the time of each subject goes that was measured, at its largest token counts if time allows."""
    parts = parts_of(model)
    wanted = [(s, f, phase) for s, f in zip(subjects, figures, strict=True) for phase in f.measured]
    end = time.perf_counter() + seconds
    found: dict[str, dict[str, Profile]] = {}
    for i, (subject, f, phase) in enumerate(wanted):
        left = max(0.0, end - time.perf_counter()) / (len(wanted) - i)
        rates = f.rates(phase)
        most = max(rates)
        # A run of either kind, and another one.
        tokens = max(1, affordable(most, 1 / rates[most].median, left / 4))
        progress(f"{f.label}: profiling {phase}, {tokens} tokens")
        made = profile(subject, parts, phase, tokens, passes=_PROFILE_PASSES, seconds=left)
        found.setdefault(f.label, {})[phase] = made
    return found


def _run_truth(truth: Truth, full: int, seconds: float) -> None:
    """Run as many tokens of the prompt as fit into the seconds."""

    def run(tokens: int) -> float:
        start = time.perf_counter()
        truth.run(tokens)
        return time.perf_counter() - start

    grow(run, full, run(1), seconds, min(_TRUTH_TOKENS, full))
