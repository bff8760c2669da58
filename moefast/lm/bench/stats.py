"""From seconds to tokens per second: median, spread, and ratios between equal work only."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Rate(NamedTuple):
    """Tokens per second of one subject at one token count.

    Attributes:
        median, low, high: over the runs, in tokens per second. With an even number of runs the median is
            that of the seconds, turned into a rate.
        runs: how many there were; with one there is no spread.
    """

    median: float
    low: float
    high: float
    runs: int


def rate(tokens: int, seconds: Sequence[float]) -> Rate:
    """The rate of runs that each processed ``tokens`` tokens in so many ``seconds``.

    Raises:
        ValueError: there is no run.
    """
    if not seconds:
        raise ValueError("[rate] seconds must hold at least one run, got none.")
    return Rate(
        median=tokens / statistics.median(seconds),
        low=tokens / max(seconds),
        high=tokens / min(seconds),
        runs=len(seconds),
    )


class Ratio(NamedTuple):
    """How many times faster than a baseline, both at ``tokens`` tokens."""

    times: float
    baseline: str
    tokens: int


def ratio(rates: Mapping[int, Rate], baseline: str, baseline_rates: Mapping[int, Rate]) -> Ratio | None:
    """The quotient of medians at the largest token count both have been measured at, or None.

    Rates at different token counts are never divided: a longer prefill reads each weight once for more
    tokens, so their quotient would compare two different jobs.
    """
    common = rates.keys() & baseline_rates.keys()
    if not common:
        return None
    tokens = max(common)
    return Ratio(rates[tokens].median / baseline_rates[tokens].median, baseline, tokens)


def faster(candidates: Mapping[str, Mapping[int, Rate]]) -> str | None:
    """The name of the fastest candidate: what the others are compared with.

    All candidates had the same time, so one that managed more tokens in it is the faster; of those with
    the same token count, the one of higher median.
    """
    measured = {name: rates for name, rates in candidates.items() if rates}
    if not measured:
        return None
    return max(measured, key=lambda name: (max(measured[name]), measured[name][max(measured[name])].median))
