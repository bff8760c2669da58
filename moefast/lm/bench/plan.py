"""How much work fits into how much time.

Subjects differ by a factor of a thousand. A token count is chosen for each from what one token was seen to
cost, out of the powers of two, so that the counts of different subjects meet and can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence


def affordable(full: int, per_token: float, seconds: float) -> int:
    """The largest count out of 1, 2, 4, ... and ``full`` that fits into ``seconds``; 0 if none does."""
    if full * per_token <= seconds:
        return full
    count = 1
    if count * per_token > seconds:
        return 0
    while 2 * count < full and 2 * count * per_token <= seconds:
        count *= 2
    return count


def grow(run: Callable[[int], float], full: int, per_token: float, seconds: float, fewest: int) -> int:
    """The token count at which one run takes at most about ``seconds``.

    Args:
        run: does so many tokens and returns its seconds; infinity ends the search.
        full: the count to strive for.
        per_token: seconds that one token took by itself: an upper bound, since tokens share weights.
        seconds: for one run.
        fewest: tokens to try whatever they take.

    Returns:
        The count of the last run.
    """
    tokens = max(fewest, affordable(full, per_token, seconds))
    while True:
        spent = run(tokens)
        more = affordable(full, spent / tokens, seconds)
        if more <= tokens:
            return tokens
        tokens = more


def share(weights: Sequence[float], seconds: float) -> float:
    """The first one's part of the ``seconds`` left, by weight: what it leaves unused goes to the others."""
    return max(0.0, seconds) * weights[0] / sum(weights)


# A long prefill says more than a short one; a decoded token costs the same, however many follow it.
_PARTS = {"prefill": 2 / 3, "decode": 1 / 3}
# Runs that should fit: two in which token counts are found and verified, and the fewest that have a
# median apart from their ends.
_RUNS = 5


class Allowance:
    """One subject's seconds, divided among its phases so that a run can be repeated."""

    def __init__(self, seconds: float):
        self.seconds = max(0.0, seconds)

    def per_run(self, phase: str) -> float:
        """Seconds one run of ``phase`` may take."""
        return self.seconds * _PARTS[phase] / _RUNS
