"""What the benchmark makes of seconds, and how it plans: statistics, and fake subjects on a fake clock."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest

from moefast.lm.bench import report
from moefast.lm.bench.measure import PHASES, Bench, Figures, Goal, baseline, ratio_to
from moefast.lm.bench.plan import Allowance, affordable, grow, share
from moefast.lm.bench.stats import Rate, faster, rate, ratio
from moefast.lm.bench.subjects import Verdict
from moefast.testing import Error, logits_bound

BOUND = logits_bound("float32", layers=2, hidden=64)


# -- statistics --------------------------------------------------------------------------------------------


def test_rate_is_the_median_run_between_slowest_and_fastest() -> None:
    assert rate(8, [4.0, 1.0, 2.0]) == Rate(median=4.0, low=2.0, high=8.0, runs=3)


def test_rate_needs_a_run() -> None:
    with pytest.raises(ValueError, match=r"\[rate\] seconds must hold at least one run"):
        rate(8, [])


def even(tokens_per_second: float) -> Rate:
    return Rate(tokens_per_second, tokens_per_second, tokens_per_second, 1)


def test_ratio_is_taken_at_the_largest_common_count_only() -> None:
    ours = {512: even(900.0), 8: even(100.0), 2: even(30.0)}
    theirs = {8: even(10.0), 2: even(6.0)}
    found = ratio(ours, "mlx-lm", theirs)
    assert found is not None
    assert (found.times, found.tokens, found.baseline) == (10.0, 8, "mlx-lm")
    assert ratio({512: even(900.0)}, "mlx-lm", theirs) is None


def test_faster_prefers_more_tokens_in_the_same_time_then_the_median() -> None:
    assert faster({"a": {2: even(50.0)}, "b": {4: even(5.0)}}) == "b"
    assert faster({"a": {4: even(6.0)}, "b": {4: even(5.0)}, "c": {}}) == "a"
    assert faster({"c": {}}) is None


# -- planning ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("full", "seconds", "count"),
    [
        (512, 600.0, 512),  # all of it fits
        (512, 500.0, 256),
        (500, 499.0, 256),  # below the goal only powers of two, so that counts of subjects meet
        (512, 1.5, 1),
        (512, 0.5, 0),  # not even one token
        (1, 1.0, 1),
    ],
)
def test_affordable(full: int, seconds: float, count: int) -> None:
    assert affordable(full, 1.0, seconds) == count


def test_grow_stops_where_time_is_proportional_to_tokens() -> None:
    asked: list[int] = []

    def run(tokens: int) -> float:
        asked.append(tokens)
        return tokens * 1.0

    assert grow(run, 512, 1.0, 10.0, fewest=2) == 8
    assert asked == [8]


def test_grow_reaches_the_goal_where_tokens_share_the_work() -> None:
    assert grow(lambda tokens: 1.0 + tokens / 1000, 512, 1.0, 10.0, fewest=2) == 512


def test_grow_tries_the_fewest_whatever_they_take_and_ends_at_a_failure() -> None:
    assert grow(lambda tokens: 100.0, 512, 100.0, 1.0, fewest=2) == 2
    assert grow(lambda tokens: math.inf, 512, 0.001, 10.0, fewest=2) == 512


def test_share_hands_on_what_is_left() -> None:
    assert share([1, 1, 2], 100.0) == 25.0
    assert share([2], 60.0) == 60.0
    assert share([1, 2], -5.0) == 0.0


def test_allowance_leaves_room_for_repeats() -> None:
    allowance = Allowance(30.0)
    assert 3 * sum(allowance.per_run(phase) for phase in PHASES) <= 30.0
    assert Allowance(-1.0).per_run("decode") == 0.0


# -- measuring, with fakes ---------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Fake:
    """A subject that takes a fixed time per run and per token, of a clock it moves itself."""

    label: str
    clock: Clock
    per_token: float
    per_run: float = 0.0
    backend: str | None = None
    dtype: str = "bfloat16"
    peak_bytes: int = 0
    right: bool = True
    refuses: bool = False
    log: list[str] = field(default_factory=list)

    def run(self, phase: str, tokens: int) -> None:
        self.log.append(f"{self.label} {phase} {tokens}")
        self.clock.now += self.per_run + tokens * self.per_token

    def verify(self, phase: str, tokens: int) -> tuple[Verdict, float]:
        if self.refuses:
            raise ValueError("[moe] backend 'x' must be able to run this, got no moe kernel.")
        start = self.clock.now
        self.clock.now += self.per_run + tokens * self.per_token
        error = Error(0.0, 0.0) if self.right else Error(1.0, 1.0)
        return Verdict(error, BOUND, BOUND.admits(error), tokens), self.clock.now - start


GOAL = Goal(prefill=512, decode=32, repeats=5)


def measured(clock: Clock, *subjects: Fake, seconds: float = 60.0) -> dict[str, Figures]:
    log: list[str] = []
    for subject in subjects:
        subject.log = log
    figures = Bench(GOAL, seconds, least=0.05 * seconds, clock=clock).measure(subjects)
    return {f.label: f for f in figures}


def test_fast_subjects_run_all_tokens_and_repeats_in_turn() -> None:
    clock = Clock()
    a, b = Fake("a", clock, 1e-4), Fake("b", clock, 2e-4, backend="b")
    found = measured(clock, a, b)
    for f in found.values():
        assert {phase: f.most(phase) for phase in PHASES} == {"prefill": 512, "decode": 32}
        assert all(len(point.seconds) == 5 for phase in PHASES for point in f.points[phase].values())
    assert a.log == ["a prefill 512", "a decode 32", "b prefill 512", "b decode 32"] * 5


def test_slow_subject_gets_fewer_tokens_and_ratios_are_at_equal_counts() -> None:
    clock = Clock()
    slow = Fake("mlx-lm-bf16", clock, 3.0)
    stock = Fake("mlx-lm-fp32", clock, 0.3, dtype="float32")
    ours = Fake("native", clock, 1e-5, per_run=0.01, backend="native")
    found = measured(clock, slow, stock, ours)
    counts = [found[s.label].most("prefill") for s in (slow, stock, ours)]
    assert 0 < counts[0] < counts[1] < counts[2] == 512
    for phase in PHASES:
        base = baseline(list(found.values()), phase)
        assert base is found["mlx-lm-fp32"]
        for f in found.values():
            against = ratio_to(base, f, phase)
            assert against is not None
            assert against.tokens in f.rates(phase)
            assert against.tokens in base.rates(phase)
            assert against.tokens == min(f.most(phase), base.most(phase))
    assert clock.now < 60.0 * 1.2


def test_subject_too_slow_for_a_prefill_says_so() -> None:
    clock = Clock()
    slow, stock = Fake("mlx-lm-bf16", clock, 14.0), Fake("mlx-lm-fp32", clock, 0.1)
    found = measured(clock, slow, stock, seconds=40.0)
    figures = found["mlx-lm-bf16"]
    assert figures.skipped == {"prefill": "2 tokens would take about 28 s"}
    assert figures.rates("decode")[1].runs == 1  # the verified run, which was long enough to count
    assert report.note_on(figures) == "no prefill: 2 tokens would take about 28 s"
    assert len(found["mlx-lm-fp32"].points["decode"]) == 2  # one token too, to compare


def test_slow_subject_does_not_take_the_time_of_others() -> None:
    clock = Clock()
    slow, quick = Fake("slow", clock, 4.0), Fake("quick", clock, 0.05, backend="quick")
    found = measured(clock, slow, quick)
    assert found["slow"].used <= 30.0
    assert all(len(p.seconds) >= 3 for phase in PHASES for p in found["quick"].points[phase].values())


def test_wrong_output_is_never_timed() -> None:
    clock = Clock()
    wrong = Fake("wrong", clock, 1e-4, backend="wrong", right=False)
    found = measured(clock, Fake("mlx-lm-fp32", clock, 1e-3), wrong)
    assert not found["wrong"].passed
    assert not any("wrong" in line for line in wrong.log)
    assert found["wrong"].rates("decode") == {}
    assert report.note_on(found["wrong"]) == "WRONG OUTPUT, not measured"


def test_refusal_is_reported_with_its_reason() -> None:
    clock = Clock()
    found = measured(clock, Fake("metal", clock, 1e-4, backend="metal", refuses=True))
    assert "no moe kernel" in report.note_on(found["metal"])
